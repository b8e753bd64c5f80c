"""Decides how much of the passages an agent reads: the text is cut to a budget, the tags around it never are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from agentic_rag_env.prompts import INFORMATION_OPEN, format_passages, information_block
from agentic_rag_env.types import Passage

#: Characters per token of the budget: how many are encoded first, and how many at most. Ordinary text has about four
#: in a token. A tokenizer may take a word of megabytes for one token, but such a word is of no use to an agent.
_CHARS_PER_TOKEN, _MOST_CHARS_PER_TOKEN = 4, 32


@dataclass(frozen=True)
class Budget:
    """The bound of an observation; at most one of `max_chars` and `max_tokens` is set.

    Attributes:
        max_chars: The bound in characters.
        max_tokens: The bound in tokens of the tokenizer; at most 32 characters are shown for each of them.
        tokenizer: An object with `encode(text, add_special_tokens=False)`. If it also tells where tokens end, it is
            asked less often; see `token_ends`.
    """

    max_chars: int | None
    max_tokens: int | None
    tokenizer: Any

    def length(self, observation: str) -> int:
        """The length of an observation in the unit of the bound."""
        if self.max_tokens is None:
            return len(observation)
        return len(self.tokenizer.encode(observation, add_special_tokens=False))

    def observation(self, passages: Sequence[Passage], suffix: str) -> str:
        """The passages in their tags, as many characters of them as fit.

        Text that does not fit is neither copied nor encoded, however long a passage is.

        Args:
            passages: The passages, best first.
            suffix: Text that follows the closing tag; it counts too.
        """
        if self.max_tokens is not None:
            return self._fitting(self.max_tokens, passages, suffix)
        room = None if self.max_chars is None else self.max_chars - len(information_block("") + suffix)
        return information_block(format_passages(passages, room)) + suffix

    def _fitting(self, max_tokens: int, passages: Sequence[Passage], suffix: str) -> str:
        def block(num_chars: int) -> str:
            return information_block(text[:num_chars]) + suffix

        def fits(num_chars: int) -> bool:
            return self.length(block(num_chars)) <= max_tokens

        size, most = _CHARS_PER_TOKEN * max_tokens, _MOST_CHARS_PER_TOKEN * max_tokens
        while True:
            text = format_passages(passages, size)
            ends = token_ends(self.tokenizer, block(size))
            count = self.length(block(size)) if ends is None else len(ends)
            if count > max_tokens:
                break
            if len(text) < size or size == most:
                return block(size)
            size = min(most, size + size // 2)
        if ends is None:
            return block(last_that_fits(fits, len(text) * max_tokens // count, len(text)))
        num_closing = sum(end > len(INFORMATION_OPEN) + len(text) for end in ends)
        kept = max(0, ends[max_tokens - num_closing - 1] - len(INFORMATION_OPEN))
        # The next character would begin another token, unless it is a blank.
        return block(kept if fits(kept) else last_that_fits(fits, min(kept, len(text) - 1), len(text)))


def token_ends(tokenizer: Any, text: str) -> list[int] | None:
    """Where in a text each of its tokens ends [characters]; None if the tokenizer can't tell.

    Three kinds of tokenizer can tell: one with a method `token_ends(text)`, one of the library tokenizers, and a fast
    tokenizer of transformers.
    """
    if hasattr(tokenizer, "token_ends"):
        return tokenizer.token_ends(text)
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    else:
        offsets = getattr(tokenizer.encode(text, add_special_tokens=False), "offsets", None)
    return None if offsets is None else [end for _, end in offsets]


def last_that_fits(fits: Callable[[int], bool], guess: int, excess: int) -> int:
    """A number that fits while the next one does not, found in few trials if the guess is good.

    Args:
        fits: Tells whether a number fits; 0 does.
        guess: A number in [0, excess).
        excess: A number that does not fit.
    """
    fitting, step = 0, 1
    if fits(guess):
        fitting = guess
        while fitting + step < excess and fits(fitting + step):
            fitting, step = fitting + step, 2 * step
        excess = min(excess, fitting + step)
    else:
        excess = guess
        while excess - step > 0 and not fits(excess - step):
            excess, step = excess - step, 2 * step
        fitting = max(0, excess - step)
    while excess - fitting > 1:
        middle = (fitting + excess) // 2
        if fits(middle):
            fitting = middle
        else:
            excess = middle
    return fitting
