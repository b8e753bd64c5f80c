"""Datasets; importing this package registers the built-in ones."""

# Each of these files registers its part.
from agentic_rag_env.datasets import benchmark, jsonl, mini, mixture, tiny  # noqa: F401
