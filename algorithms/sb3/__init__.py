"""Runs learners of other libraries on the discrete view of the environment; they are measured like any run."""
