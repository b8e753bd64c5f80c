"""An environment for agents that search before they answer.

Importing the package registers `AgenticRAG-v0` with Gymnasium, and the built-in environments, datasets, retrievers and
rewards.
"""

from __future__ import annotations

import gymnasium

from agentic_rag_env import datasets as datasets
from agentic_rag_env import retrievers as retrievers
from agentic_rag_env.actions import Action, Answer, Malformed, Search, parse_action
from agentic_rag_env.answers import exact_match, f1_score, normalize_answer, sub_exact_match
from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.env import AgenticRAGEnv
from agentic_rag_env.errors import (
    AgenticRAGError,
    ConfigurationError,
    DataError,
    ResetNeededError,
    RetrieverError,
    UnknownNameError,
)
from agentic_rag_env.lifted import LiftedVectorEnv
from agentic_rag_env.registry import DATASETS, RETRIEVERS, REWARDS, Registry
from agentic_rag_env.retrievers.base import Retriever
from agentic_rag_env.rewards import Outcome, answer_reward
from agentic_rag_env.spaces import FreeText
from agentic_rag_env.types import Ending, Passage, Question, StepInfo
from agentic_rag_env.vector import AgenticRAGVectorEnv, info_at

__all__ = [
    "DATASETS",
    "RETRIEVERS",
    "REWARDS",
    "Action",
    "AgenticRAGEnv",
    "AgenticRAGError",
    "AgenticRAGVectorEnv",
    "Answer",
    "ConfigurationError",
    "DataError",
    "Ending",
    "FreeText",
    "LiftedVectorEnv",
    "Malformed",
    "Outcome",
    "Passage",
    "Question",
    "QuestionSet",
    "Registry",
    "ResetNeededError",
    "Retriever",
    "RetrieverError",
    "Search",
    "StepInfo",
    "UnknownNameError",
    "answer_reward",
    "exact_match",
    "f1_score",
    "info_at",
    "normalize_answer",
    "parse_action",
    "sub_exact_match",
]

gymnasium.register(
    id="AgenticRAG-v0",
    entry_point="agentic_rag_env.env:AgenticRAGEnv",
    vector_entry_point="agentic_rag_env.vector:AgenticRAGVectorEnv",
)
gymnasium.register(id="SkyRL-v0", entry_point="agentic_rag_env.skyrl:SkyRLEnv")
