"""The policy plays: questions in, trajectories out. This room imports `algorithms.learner` and the environment only."""
