"""Reads saved trajectories into a form for people: question, turns, verdict."""

from __future__ import annotations

import re
import reprlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from agentic_rag_env.actions import Malformed, parse_action
from agentic_rag_env.files import read_rows
from agentic_rag_env.prompts import format_passages, information_block
from agentic_rag_env.rewards import normalize_answer
from agentic_rag_env.types import Ending, Passage

#: Tokenizers know fewer ids than this.
_IDS = 2**32
#: Figures of model-written tokens: their names, and their labels on the page.
FIGURES = {
    "logprobs": "log-probability",
    "advantages": "advantage",
    "ref_kl": "KL to the reference",
    "teacher_kl": "KL to the teacher",
}


@dataclass(frozen=True)
class Turn:
    """One action of the model and the environment's reply.

    Attributes:
        text: Text that the model wrote.
        ids: Token ids of the text.
        figures: Figures of each token, by a name in `FIGURES`.
        action: "search", "answer", "malformed", or a word of an environment; None if that says nothing.
        query: Query of a search.
        passages: Passages that the search found.
        problem: Reason why the action had no result; None if it had one.
        reply: Text that the model read next; None if that was just the passages, or nothing.
    """

    text: str
    ids: Sequence[int]
    figures: Mapping[str, Sequence[float]]
    action: str | None
    query: str | None
    passages: Sequence[Passage]
    problem: str | None
    reply: str | None


@dataclass(frozen=True)
class Episode:
    """One question that was played to the end.

    Attributes:
        question_id: Unique within the dataset.
        question: Text of the question.
        golden_answers: Accepted answers; empty if they are not known.
        group: Dataset of the question; None if it is not known.
        hops: Number of searches that the question takes; None if it is not known.
        ending: Why the episode is over; None if an old file does not tell.
        verdict: "right" or "wrong" for an answer, else why there is none; "no answer" if the reason is not known.
        answer: The answer that was given.
        f1: F1 of the answer.
        reward: Reward of the episode.
        num_searches: Number of executed searches.
        source: Who wrote the turns: "policy" or "teacher".
        turns: At least one.
    """

    question_id: str
    question: str
    golden_answers: Sequence[str]
    group: str | None
    hops: float | str | None
    ending: Ending | None
    verdict: str
    answer: str | None
    f1: float
    reward: float
    num_searches: int
    source: str
    turns: Sequence[Turn]

    @property
    def correct(self) -> bool:
        """Whether the answer matched exactly."""
        return self.verdict == "right"

    @property
    def num_malformed(self) -> int:
        """Turns without a valid action."""
        return sum(turn.action == "malformed" for turn in self.turns)

    @property
    def num_tokens(self) -> int:
        """Model-written tokens."""
        return sum(len(turn.ids) for turn in self.turns)

    def holds(self, text: str) -> bool:
        """Whether the question, the answers or the model's words contain a text; case does not matter."""
        parts = (self.question_id, self.question, *self.golden_answers, *(turn.text for turn in self.turns))
        return any(text.casefold() in part.casefold() for part in parts)


def read_episodes(path: Path, answers: Mapping[str, Mapping[str, Any]]) -> list[Episode]:
    """Read the episodes of a file of trajectories.

    Args:
        path: The file.
        answers: `golden_answers` and `dataset` by question, for rows without their question.

    Raises:
        DataError: The file does not hold trajectories.
    """
    return list(read_rows(path, lambda row: _episode(row, answers)))


def find_answers(text: str, golden_answers: Sequence[str]) -> list[tuple[int, int]]:
    """Find a golden answer in a text as whole words, compared as exact match compares.

    Args:
        text: Text of a passage.
        golden_answers: Accepted answers.

    Returns:
        Start and end of each place, in characters, from left to right and without overlap.
    """
    pattern = _pattern(tuple(golden_answers))
    return [match.span() for match in pattern.finditer(text)] if pattern else []


@lru_cache(maxsize=1024)
def _pattern(golden_answers: tuple[str, ...]) -> re.Pattern[str] | None:
    """Pattern that finds normalized answers: case, ASCII punctuation, articles and the kind of blanks do not matter."""
    mark = f"[{re.escape(string.punctuation)}]"
    between = rf"{mark}*\s(?:{mark}|\s|\b(?:a|an|the)\b)*"
    aliases = sorted({normalize_answer(answer) for answer in golden_answers} - {""}, key=len, reverse=True)
    alternatives = [between.join(f"{mark}*".join(map(re.escape, word)) for word in alias.split()) for alias in aliases]
    if not alternatives:
        return None
    return re.compile(rf"(?<!\w)(?:{'|'.join(alternatives)})(?!\w)", re.IGNORECASE)


def _episode(row: Mapping[str, Any], answers: Mapping[str, Mapping[str, Any]]) -> Episode:
    question_id, last = _value(row, "question_id", str), row["turns"][-1]["info"]
    known = row.get("question") or {"text": _asked(row["prompt"]), **answers.get(question_id, {})}
    counts = [0, *(_value(turn["info"], "num_searches", int) for turn in row["turns"])]
    answer = _value(last, "answer", str, int, float, None)
    return Episode(
        question_id=question_id,
        # A task of an environment stands in its prompt only.
        question=_value(known, "text", str) or _value({"message": "", **row}, "message", str).strip(),
        golden_answers=tuple(map(str, _value({"golden_answers": [], **known}, "golden_answers", list))),
        group=_value({"dataset": None, **known}, "dataset", str, None),
        hops=_value({"hops": None, **known}, "hops", int, float, str, None),
        ending=(ending := Ending.of(last)),
        verdict=_verdict(row["correct"], ending),
        answer=None if answer is None else str(answer),
        f1=float(_value(last, "f1", int, float)),
        reward=float(_value(row, "reward", int, float)),
        num_searches=counts[-1],
        source=_value(row, "source", str),
        turns=tuple(
            _turn(turn, turn["info"]["num_searches"] > before)
            for turn, before in zip(row["turns"], counts, strict=False)  # no turn begins at the last count
        ),
    )


def _value(row: Mapping[str, Any], name: str, *kinds: type | None) -> Any:
    """A value of a row, which may be a stranger's.

    Raises:
        KeyError: There is none.
        TypeError: It has another type than those of `kinds`, where None stands for JSON's null.
    """
    value = row[name]
    if (None if value is None else type(value)) not in kinds:
        allowed = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
        raise TypeError(f"{name} must be {allowed}, got {reprlib.repr(value)}")
    return value


def _asked(prompt: str) -> str:
    """The question in one of our prompts; the whole prompt if it has another form."""
    return prompt.rpartition("Question: ")[2].strip()


def _verdict(correct: bool, ending: Ending | None) -> str:
    if correct:
        return "right"
    if ending is Ending.ANSWERED:
        return "wrong"
    return ending.replace("_", " ") if ending else "no answer"


def _turn(row: Mapping[str, Any], searched: bool) -> Turn:
    info, text = row["info"], _value(row, "action", str)
    passages = tuple(map(_passage, _value(info, "passages", list)))
    plain = information_block(format_passages(passages)) if searched else ""
    ids = _value(row, "action_ids", list)
    if any(type(each) is not int or not 0 <= each < _IDS for each in ids):
        raise ValueError(f"action_ids must be integers from 0 to {_IDS - 1}, got {reprlib.repr(ids)}")
    figures = {"logprobs": _figures(row, "action_logprobs")} | {
        name: _figures(row, name) for name in FIGURES if name in row
    }
    if any(len(values) != len(ids) for values in figures.values()):
        raise ValueError("figures of tokens that are not there")
    observation = _value(row, "observation", str)
    return Turn(
        text=text,
        ids=ids,
        figures=figures,
        action=_value(info, "action", str, None),
        query=_value(info, "query", str, None),
        passages=passages,
        problem=_problem(info, text, searched),
        reply=None if observation == plain else observation,
    )


def _passage(row: Mapping[str, Any]) -> Passage:
    score = float(_value({"score": 0.0, **row}, "score", int, float))
    return Passage(_value(row, "id", str), _value(row, "contents", str), score)


def _figures(row: Mapping[str, Any], name: str) -> list[float]:
    values = _value(row, name, list)
    if any(type(each) not in (int, float) for each in values):
        raise TypeError(f"{name} must be numbers, got {reprlib.repr(values)}")
    return [float(each) for each in values]


def _problem(info: Mapping[str, Any], text: str, searched: bool) -> str | None:
    if info["error"]:
        return f"the search failed: {info['error']}"
    if info["action"] == "malformed":
        read = parse_action(text)
        return read.reason if isinstance(read, Malformed) else "no valid action"
    if info["action"] == "search" and not searched:
        return "not executed, no turn was left"
    return "nothing found" if searched and not info["passages"] else None
