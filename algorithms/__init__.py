"""The algorithms: one file each, over the shared learner in `algorithms.learner`."""
