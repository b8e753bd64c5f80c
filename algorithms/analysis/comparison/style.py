"""Gives each method one colour, marker and dash in all figures, which the colour-blind can tell apart too."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agentic_rag_env.errors import required_library
from algorithms.analysis.comparison.methods import Method

#: The palette of Okabe and Ito without black and yellow, which vanish on one of the two backgrounds; plus a grey.
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", ":", "-.")
#: Methods with the same look in every comparison; other methods get the remaining looks.
_FIXED = ("dgpo", "ppo", "kd", "sft", "gkd", "grpo", "distillm", "taid", "sft_ppo", "dgpo_grpo", "maskable_ppo")


class Look(NamedTuple):
    """Colour, marker and dash of a method."""

    color: str
    marker: str
    dash: Any


class Theme(NamedTuple):
    """Colours of everything but the data."""

    text: str
    grid: str
    background: str


#: What tells a file's date or program, by kind.
_UNDATED: Mapping[str, dict[str, None]] = {
    "png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
}  # fmt: skip
LIGHT = Theme("#222222", "#D8D8D8", "#FFFFFF")
DARK = Theme("#E4E4E4", "#4A4A4A", "#16181B")


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn on any background.

    Attributes:
        name: Stem of the file's name.
        title: Content of the figure in one line.
        draw: Draws the figure on axes.
        size: Width and height in inches.
        described: Description for people who can't see the figure.
        legend: Looks by label; empty if the drawing needs no legend.
    """

    name: str
    title: str
    draw: Callable[[Any, Theme], None]
    size: tuple[float, float] = (4.6, 3.1)
    described: str = ""
    legend: Mapping[str, Look] = field(default_factory=dict)


def looks(methods: Sequence[Method]) -> dict[str, Look]:
    """Looks by label; the first method of a well-known base has that base's look."""
    taken: dict[str, int] = {}
    for method in methods:
        if method.base in _FIXED and _FIXED.index(method.base) not in taken.values():
            taken[method.label] = _FIXED.index(method.base)
    free = (number for number in range(len(_FIXED), len(_FIXED) + len(methods)))
    return {method.label: _look(taken[method.label] if method.label in taken else next(free)) for method in methods}


def _look(number: int) -> Look:
    at, turn = number % len(_COLORS), number // len(_COLORS)
    return Look(_COLORS[at], _MARKERS[(at + 3 * turn) % len(_MARKERS)], _DASHES[turn % len(_DASHES)])


def render(drawing: Drawing, kinds: Sequence[str], theme: Theme, with_legend: bool = False) -> dict[str, bytes]:
    """Draw a figure once and return its files by kind.

    Args:
        drawing: The figure.
        kinds: Some of "png", "svg" and "pdf".
        theme: Colours of axes, text and background.
        with_legend: Whether its legend stands beside the axes.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    with required_library('Drawing needs the library matplotlib: pip install "agentic-rag-env[compare]".'):
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    # The same figures give the same file: no random ids, no date. Names may hold dollars, which begin no formula.
    settings: Any = {"svg.hashsalt": drawing.name, "svg.fonttype": "none", "pdf.fonttype": 42, "text.parse_math": False,
                     "font.size": 9, "font.family": "sans-serif"}  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=drawing.size, layout="constrained", facecolor=theme.background)
        axes = figure.add_subplot()
        _dress(axes, theme)
        drawing.draw(axes, theme)
        if with_legend and drawing.legend:
            handles = [
                Line2D([], [], color=look.color, marker=look.marker, linestyle=look.dash, label=label, markersize=5)
                for label, look in drawing.legend.items()
            ]
            figure.legend(
                handles=handles,
                loc="outside right upper",
                frameon=False,
                labelcolor=theme.text,
                fontsize=8,
                handlelength=3,
            )
            figure.set_figwidth(drawing.size[0] + 1.0 + 0.055 * max(map(len, drawing.legend)))
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it is laid out, and each further time would cost as much again
        files = {kind: io.BytesIO() for kind in kinds}
        for kind, file in files.items():
            figure.savefig(file, format=kind, dpi=160, metadata=_UNDATED[kind])
    return {kind: file.getvalue() for kind, file in files.items()}


def data_uri(content: bytes, kind: str) -> str:
    """Turn a file's content into an address that needs no network."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _dress(axes: Any, theme: Theme) -> None:
    axes.set_facecolor(theme.background)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.text, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(theme.text)
