"""Reads the action in one turn of model text: a search, an answer, or neither.

Pass in only text that the model wrote. Retrieved passages are never passed in, so the tags in a passage cannot
search, answer or close anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
ANSWER_OPEN = "<answer>"
SEARCH_CLOSE = "</search>"
ANSWER_CLOSE = "</answer>"

#: A turn ends with the first of these; generation may stop here.
CLOSING_TAGS = (SEARCH_CLOSE, ANSWER_CLOSE)


@dataclass(frozen=True, slots=True)
class Search:
    """A request for passages; `query` is stripped and never empty."""

    query: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The final answer, stripped; an empty one is an answer too."""

    text: str


@dataclass(frozen=True, slots=True)
class Malformed:
    """A turn without a valid action; `reason` says why in a few words."""

    reason: str


Action: TypeAlias = Search | Answer | Malformed


def parse_action(text: str) -> Action:
    """Read one turn, in time linear in its length.

    The turn is cut at its earliest closing tag, and the action is the span from the first matching opening tag before
    it. What follows the cut is ignored.

    Args:
        text: What the model wrote in this turn and nothing else.
    """
    cuts = [(position, tag) for tag in CLOSING_TAGS if (position := text.find(tag)) >= 0]
    if not cuts:
        return Malformed("neither </search> nor </answer>")
    end, closing = min(cuts)
    opening = closing.replace("/", "")
    start = text.find(opening, 0, end)
    if start < 0:
        return Malformed(f"{closing} without {opening} before it")
    content = text[start + len(opening) : end].strip()
    if closing == ANSWER_CLOSE:
        return Answer(content)
    return Search(content) if content else Malformed("empty query")
