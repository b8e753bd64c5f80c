"""The records that cross module borders: a question, a passage and what a step reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, TypeAlias, TypedDict

from agentic_rag_env.errors import ConfigurationError, RetrieverError


@dataclass(frozen=True, slots=True)
class Question:
    """One item of a dataset.

    Attributes:
        id: Unique within its dataset.
        text: The question as the agent reads it.
        golden_answers: Accepted answers, the canonical one first; empty only where an environment brings its own
            tasks and says itself what is correct.
        metadata: Whatever the source knows. Used by name here: `hops` (int) and `supporting` (gold passage ids).

    Raises:
        ConfigurationError: The accepted answers are one text, which would be read letter by letter.
    """

    id: str
    text: str
    golden_answers: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.golden_answers, str):
            raise ConfigurationError(
                f"golden_answers of question {self.id!r} must be a tuple of texts, got the text "
                f"{self.golden_answers!r}; write ({self.golden_answers!r},)."
            )


@dataclass(frozen=True, slots=True)
class Passage:
    """A retrievable unit of text, in the form of the Search-R1 corpora.

    Attributes:
        id: Unique within its corpus.
        contents: Title on the first line, text on the lines after it.
        score: Similarity to the query, higher is better; 0.0 outside a search result.
    """

    id: str
    contents: str
    score: float = 0.0

    @property
    def title(self) -> str:
        """The first line of the contents."""
        return self.contents.partition("\n")[0]

    @property
    def text(self) -> str:
        """Everything after the first line."""
        return self.contents.partition("\n")[2]


#: The result of a search for one query: passages, or the failure of this query alone.
Found: TypeAlias = Sequence[Passage] | RetrieverError


class Ending(StrEnum):
    """Why an episode is over; its members are strings, so JSON holds them as they are."""

    #: The agent answered, rightly or wrongly.
    ANSWERED = "answered"
    #: The last turn brought no answer.
    OUT_OF_TURNS = "out_of_turns"
    #: Its player had no room for another turn, say in a model's context.
    OUT_OF_TOKENS = "out_of_tokens"
    #: The retriever raised `RetrieverError`.
    SEARCH_FAILED = "search_failed"

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Ending | None:
        """Read why an episode is over.

        Args:
            info: Info of its last step. Older files without an `ending` are read too: their infos tell an answer and a
                failed search, but not running out of turns from running out of tokens.

        Returns:
            None where the info does not tell.
        """
        if info.get("ending") is not None:
            return cls(info["ending"])
        if info.get("error") is not None:
            return cls.SEARCH_FAILED
        return cls.ANSWERED if info.get("answer") is not None else None


class StepInfo(TypedDict):
    """What `step` reports beside the reward; the same keys every time, so that vector environments can stack them.

    `action` is None in the info of `reset`. `query` belongs to a search, `passages` to one that was executed,
    `answer`, `exact_match` and `f1` to an answer. `correct` is True only once an answer has matched exactly. `error`
    holds the message of a failed retrieval. `ending` says why the episode is over; None while it goes on.
    """

    question_id: str
    turn: int
    action: Literal["search", "answer", "malformed"] | None
    query: str | None
    passages: tuple[Passage, ...]
    answer: str | None
    exact_match: float
    f1: float
    num_searches: int
    correct: bool
    error: str | None
    ending: Ending | None


def blank_info(question_id: str, turn: int) -> StepInfo:
    """The info of a turn in which nothing happened."""
    return StepInfo(
        question_id=question_id,
        turn=turn,
        action=None,
        query=None,
        passages=(),
        answer=None,
        exact_match=0.0,
        f1=0.0,
        num_searches=0,
        correct=False,
        error=None,
        ending=None,
    )
