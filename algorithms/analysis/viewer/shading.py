"""Figures of single tokens as colours: which text a token is, and how strong its colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from agentic_rag_env.errors import AgenticRAGError, ConfigurationError
from algorithms.analysis.runs import Run
from algorithms.analysis.viewer.episodes import FIGURES, Turn
from algorithms.analysis.viewer.gallery import Gallery
from algorithms.assets import ASSETS, BUNDLED

#: Splits the text of a turn into that of its tokens; None where that can't be done.
Split = Callable[[Turn], Sequence[str] | None]
Decode = Callable[[Sequence[int]], str]

#: Log-probability, nats, from which on the colour is full; the same on every page.
_UNLIKELY = 5.0
#: What an unfinished character is decoded to.
_UNFINISHED = "�"


def splitter(run: Run) -> Split:
    """Splits by the tokenizer of a run.

    Raises:
        ConfigurationError: It can't be loaded.
    """
    decode = _decoder(_tokenizer_place(run))
    return lambda turn: split(turn, decode)


def no_split(turn: Turn) -> None:
    """Splits nothing, where no tokenizer is at hand."""


def splitters(gallery: Gallery) -> tuple[list[Split], list[str]]:
    """A splitter for each column, and why some split nothing."""
    made: list[Split] = []
    problems = []
    for run in gallery.runs:
        try:
            made.append(splitter(run))
        except (AgenticRAGError, OSError) as error:
            made.append(no_split)
            problems.append(f"No colours per token for {run.path}: {error}")
    return [made[column.run] for column in gallery.columns], problems


def split(turn: Turn, decode: Decode) -> list[str] | None:
    """The text of each token, "" for one that ends within a character.

    Args:
        turn: Its text and ids.
        decode: Of the tokenizer of the model that wrote it.

    Returns:
        Parts that make up the text again; None if the tokenizer is another one.
    """
    parts = [decode([token]) for token in turn.ids]
    if "".join(parts) == turn.text:
        return parts
    parts, known = [], ""
    for end in range(1, len(turn.ids) + 1):
        whole = decode(turn.ids[:end])
        # A character of several tokens stands with its last one; whatever does not fit by the end is put there.
        grown = whole.startswith(known) and (end == len(turn.ids) or not whole.endswith(_UNFINISHED))
        parts.append(whole[len(known) :] if grown else "")
        known = whole if grown else known
    return parts if known == turn.text else None


def scales(gallery: Gallery) -> dict[str, float]:
    """For each figure that any token has, the size from which on its colour is full."""
    values: dict[str, list[float]] = {name: [] for name in FIGURES}
    for item in gallery.items:
        for turn in (turn for episode in item.episodes if episode for turn in episode.turns):
            for name, of_tokens in turn.figures.items():
                values[name] += filter(math.isfinite, of_tokens)
    found = {name: np.abs(of_figure) for name, of_figure in values.items() if of_figure}
    full = {name: float(f"{np.percentile(of_figure, 98):.3g}") or 1.0 for name, of_figure in found.items()}
    return full | ({"logprobs": _UNLIKELY} if "logprobs" in full else {})


def _tokenizer_place(run: Run) -> str:
    """The newest checkpoint's, else that of the model that the run began with."""
    saved = sorted(file.parent for file in run.path.glob("checkpoints/*/tokenizer.json"))
    if saved:
        return str(saved[-1])
    policy = str((run.config.get("model") or {}).get("policy"))
    return str(ASSETS / policy) if policy in BUNDLED else policy


def _decoder(place: str) -> Decode:
    file = Path(place) / "tokenizer.json"
    if file.is_file():
        try:
            fast = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing more special
            raise ConfigurationError(f"{file} is no tokenizer ({error}).") from error
        return lambda ids: fast.decode(list(ids), skip_special_tokens=False)
    raise ConfigurationError("no checkpoint of it, and no folder of its model, holds a tokenizer.json.")
