"""Turns figures of single tokens into colours: finds the text of each token and the strength of its colour."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from agentic_rag_env.errors import AgenticRAGError, ConfigurationError
from algorithms.analysis.runs import Run
from algorithms.analysis.viewer.episodes import Turn
from algorithms.analysis.viewer.gallery import Gallery
from algorithms.assets import ASSETS, BUNDLED

#: Splits the text of a turn into the texts of its tokens; None if it can't be split.
Split = Callable[[Turn], Sequence[str] | None]
Decode = Callable[[Sequence[int]], str]

#: Size of a log-probability, in nats, at which the colour is full; the same on every page.
_UNLIKELY = 5.0
#: The text to which an unfinished character is decoded.
_UNFINISHED = "�"


def no_split(turn: Turn) -> None:
    """Split nothing; used without a tokenizer."""


def splitters(gallery: Gallery) -> tuple[list[Split], list[str]]:
    """Make a splitter for each column, and say why some split nothing."""
    made: list[Split] = []
    problems = []
    for run in gallery.runs:
        try:
            made.append(partial(split, decode=_decoder(_tokenizer_place(run))))
        except (AgenticRAGError, OSError) as error:
            made.append(no_split)
            problems.append(f"No colours per token for {run.path}: {error}")
    return [made[column.run] for column in gallery.columns], problems


def split(turn: Turn, decode: Decode) -> list[str] | None:
    """Return the text of each token, "" for a token that ends within a character.

    Args:
        turn: Turn with text and ids.
        decode: Decoder of the tokenizer of the model that wrote the turn.

    Returns:
        Parts that join to the text; None if the tokenizer does not fit the turn.
    """
    parts = [decode([token]) for token in turn.ids]
    if "".join(parts) == turn.text:
        return parts
    parts, known = [], ""
    for end in range(1, len(turn.ids) + 1):
        whole = decode(turn.ids[:end])
        # A character of several tokens stands with its last token; text left over at the end goes to the last token.
        grown = whole.startswith(known) and (end == len(turn.ids) or not whole.endswith(_UNFINISHED))
        parts.append(whole[len(known) :] if grown else "")
        known = whole if grown else known
    return parts if known == turn.text else None


def scales(gallery: Gallery) -> dict[str, float]:
    """The size at which the colour is full, for each figure that any token has."""
    values: dict[str, list[float]] = {}
    for item in gallery.items:
        for turn in (turn for episode in item.episodes if episode for turn in episode.turns):
            for name, of_tokens in turn.figures.items():
                values.setdefault(name, []).extend(filter(math.isfinite, of_tokens))
    highest = {name: np.percentile(np.abs(finite), 98) if finite else 0.0 for name, finite in values.items()}
    full = {name: float(f"{value:.3g}") or 1.0 for name, value in highest.items()}
    return full | ({"logprobs": _UNLIKELY} if "logprobs" in full else {})


def _tokenizer_place(run: Run) -> str:
    """Place of the newest checkpoint's tokenizer, else of the tokenizer of the model that the run began with."""
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
        except Exception as error:  # the library raises no narrower type
            raise ConfigurationError(f"{file} is no tokenizer ({error}).") from error
        return lambda ids: fast.decode(list(ids), skip_special_tokens=False)
    raise ConfigurationError("no checkpoint of it, and no folder of its model, holds a tokenizer.json.")
