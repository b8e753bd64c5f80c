"""The policy plays: questions in, trajectories out. Imports `algorithms.learner` and the environment, nothing above."""
