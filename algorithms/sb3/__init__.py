"""Learners of other libraries, on the discrete view of the environment; measured and written down like any run."""
