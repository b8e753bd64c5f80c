"""Writes one self-contained page of trajectories: no network, filters, colours per token, runs side by side."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from algorithms.analysis.html_page import render_page
from algorithms.analysis.viewer.episodes import FIGURES, Episode, Turn, find_answers
from algorithms.analysis.viewer.gallery import Gallery
from algorithms.analysis.viewer.shading import Split, scales


def page(title: str, gallery: Gallery, splits: Sequence[Split], notes: Sequence[str] = ()) -> str:
    """The whole document.

    Args:
        title: Title of the page.
        gallery: Gallery that the page shows.
        splits: Splits the turns of each column into tokens.
        notes: Cautions, shown first.
    """
    folder = files("algorithms.analysis.viewer")
    style, script = (folder.joinpath(f"viewer.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    data = Markup(inert(contents(gallery, splits)))
    values = {"data": data, "style": Markup(style), "script": Markup(script)}
    return render_page("viewer.html", title=title, policy=policy, notes=notes, **values)


def inert(data: Any) -> str:
    """Write data as JSON that can stand in a page: no character of it begins markup."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def contents(gallery: Gallery, splits: Sequence[Split]) -> dict[str, Any]:
    """Data for the page's script; texts that models read repeatedly, such as passages, stand in it once."""
    texts: dict[str, int] = {}
    full = scales(gallery)
    return {
        "columns": [column.label() for column in gallery.columns],
        "figures": {name: {"label": label, "full": full[name]} for name, label in FIGURES.items() if name in full},
        "items": [
            {
                "place": item.place,
                "players": [column.label(item.step) for column in gallery.columns],
                "id": item.first.question_id,
                "question": item.first.question,
                "golden": item.first.golden_answers,
                "group": item.first.group,
                "hops": item.first.hops,
                "episodes": [
                    episode and _episode(episode, split, texts)
                    for episode, split in zip(item.episodes, splits, strict=True)
                ],
            }
            for item in gallery.items
        ],
        "texts": list(texts),  # comes last: it is filled while the items are made
    }


def _episode(episode: Episode, split: Split, texts: dict[str, int]) -> dict[str, Any]:
    return {
        "verdict": episode.verdict,
        "ending": episode.ending,
        "answer": episode.answer,
        "f1": _rounded(episode.f1),
        "reward": _rounded(episode.reward),
        "searches": episode.num_searches,
        "tokens": episode.num_tokens,
        "malformed": episode.num_malformed,
        "source": episode.source,
        "turns": [_turn(turn, episode.golden_answers, split, texts) for turn in episode.turns],
    }


def _turn(turn: Turn, golden: Sequence[str], split: Split, texts: dict[str, int]) -> dict[str, Any]:
    parts = split(turn)
    return {
        "action": turn.action,
        "query": turn.query,
        "problem": turn.problem,
        "parts": parts or [turn.text],
        "figures": {name: list(map(_rounded, values)) for name, values in turn.figures.items()} if parts else {},
        "passages": [
            [
                texts.setdefault(passage.contents, len(texts)),
                _rounded(passage.score),
                find_answers(passage.contents, golden),
            ]
            for passage in turn.passages
        ],
        "reply": texts.setdefault(turn.reply, len(texts)) if turn.reply else None,
    }


def _rounded(value: float) -> float | None:
    """Round to the three decimals that a page shows; JSON knows no infinity."""
    return round(value, 3) if math.isfinite(value) else None
