"""What a run was asked and what it searched, told by hashes: equal where the data are, wherever they lie."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from agentic_rag_env.corpus import fingerprint
from agentic_rag_env.errors import AgenticRAGError
from agentic_rag_env.retrievers.base import hash_of
from agentic_rag_env.types import Question
from agentic_rag_env.vector import AgenticRAGVectorEnv


def fingerprints(
    tested: AgenticRAGVectorEnv, num_tested: int, trained: Sequence[Question] | None = None
) -> dict[str, str | None]:
    """Hashes of the data behind the figures of a run.

    Args:
        tested: The environments of the evaluation.
        num_tested: How many of their questions were asked, the first ones.
        trained: The training questions; None where nothing was trained.

    Returns:
        `questions` and `training_questions`: of ids, texts and golden answers, in their order. `corpus`: of the
        dataset's passages. `retriever`: of all that the results of a search depend on, the passages included. None
        stands for what does not exist or can't tell; nothing holds a path, and nothing reads a corpus on disk again.
    """
    corpus = tested.dataset.corpus
    return {
        "questions": of_questions(tested.dataset[:num_tested]),
        "training_questions": None if trained is None else of_questions(trained),
        "corpus": None if corpus is None else fingerprint(corpus),
        "retriever": _of_retriever(tested.retriever),
    }


def of_questions(questions: Sequence[Question]) -> str:
    """Hash of ids, texts and golden answers in their order."""
    return hash_of([[question.id, question.text, list(question.golden_answers)] for question in questions])


def _of_retriever(retriever: Any) -> str | None:
    """What a retriever says of itself; a service that can't be asked or does not tell is unknown."""
    try:
        said = getattr(retriever, "fingerprint", None)
    except AgenticRAGError as error:
        warnings.warn(f"What was searched is not known to the summary: {error}", stacklevel=2)
        return None
    return None if said is None else str(said)
