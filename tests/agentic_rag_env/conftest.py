from __future__ import annotations

import pytest

from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.types import Passage, Question


@pytest.fixture(scope="session")
def world() -> QuestionSet:
    """Four questions and a corpus that is small enough to know by heart."""
    questions = (
        Question("capital", "What is the capital of France", ("Paris",)),
        Question("river", "Which river flows through Paris?", ("Seine", "the river Seine")),
        Question("tower", "Who built the tower in Paris?", ("Gustave Eiffel",)),
        Question("band", "Who sang Let It Be?", ("The Beatles",)),
    )
    corpus = (
        Passage("1", '"France"\nFrance is a country whose capital is Paris.'),
        Passage("2", '"Seine"\nThe Seine flows through Paris.'),
        Passage("3", '"Eiffel Tower"\nThe tower was built by Gustave Eiffel.'),
        Passage("4", '"Let It Be"\nLet It Be is a song by the Beatles.'),
        Passage("5", '"Berlin"\nBerlin lies on the Spree.'),
    )
    return QuestionSet("small", questions, corpus)
