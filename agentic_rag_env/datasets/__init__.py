"""Datasets; importing this package registers the built-in ones."""

from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.datasets.benchmark import BenchmarkConfig
from agentic_rag_env.datasets.jsonl import JsonlConfig
from agentic_rag_env.datasets.mini import MiniConfig
from agentic_rag_env.datasets.mixture import MixtureConfig
from agentic_rag_env.datasets.tiny import TinyConfig

__all__ = ["BenchmarkConfig", "JsonlConfig", "MiniConfig", "MixtureConfig", "QuestionSet", "TinyConfig"]
