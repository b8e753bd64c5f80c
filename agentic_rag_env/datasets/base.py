"""Defines a dataset: questions in a fixed order, with or without a corpus to search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.types import Passage, Question


class QuestionSet(Sequence[Question]):
    """Questions in a fixed order.

    Args:
        name: Name under which scores are reported where a question's metadata has no "dataset".
        questions: The questions, at least one.
        corpus: Passages that a local retriever may index; None where the retriever brings its own.

    Raises:
        ConfigurationError: There are no questions.
    """

    def __init__(self, name: str, questions: Sequence[Question], corpus: Sequence[Passage] | None = None) -> None:
        if not len(questions):
            raise ConfigurationError(f"dataset {name!r} has no questions; an environment needs at least one.")
        self.name = name
        self.questions = questions
        self.corpus = corpus

    def __len__(self) -> int:
        return len(self.questions)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | Sequence[Question]:
        return self.questions[index]
