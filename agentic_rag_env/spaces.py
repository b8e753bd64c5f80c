"""The space of free text."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import Space

_WORDS = ("who", "wrote", "the", "book", "about", "rivers", "when", "was", "its", "author", "born", "in", "a", "town")
_TURNS = (
    "{}",
    "<think> {} </think> <search> {} </search>",
    "<search> {} </search>",
    "<search> {}",
    "<think> {} </think> <answer> {} </answer>",
    "<answer> {} </answer>",
    "<answer> {} </search>",
    "<information>{}</information>\n\n",
    "",
)


class FreeText(Space[str]):
    """All strings of any length, the empty one included.

    Gymnasium's `Text` needs a longest length and a set of characters, and refuses a blank by default.

    Args:
        seed: Seed of `sample`, or the generator it draws from.
    """

    def __init__(self, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(dtype=str, seed=seed)

    def sample(self, mask: None = None, probability: None = None) -> str:
        """A few random words, often wrapped in tags of the protocol, well formed or not.

        Args:
            mask: Must be None; there is nothing to mask.
            probability: Must be None.

        Raises:
            ValueError: A mask or a probability is given.
        """
        if mask is not None or probability is not None:
            raise ValueError("FreeText.sample takes neither mask nor probability; pass None.")
        turn = _TURNS[self.np_random.integers(len(_TURNS))]
        phrases = [
            " ".join(self.np_random.choice(_WORDS, size=self.np_random.integers(1, 6)).tolist())
            for _ in range(turn.count("{}"))
        ]
        return turn.format(*phrases)

    def contains(self, x: Any) -> bool:
        """Whether x is a string."""
        return isinstance(x, str)

    @property
    def is_np_flattenable(self) -> bool:
        """No: strings have no longest length."""
        return False

    def __repr__(self) -> str:
        return "FreeText()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FreeText)
