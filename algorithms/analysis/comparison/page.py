"""One self-contained page: no network, no script, light and dark, narrow and wide, and usable by keyboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from algorithms.analysis.comparison.checks import Finding
from algorithms.analysis.comparison.style import DARK, LIGHT, Drawing, Look, data_uri, render
from algorithms.analysis.comparison.table_formats import Table
from algorithms.analysis.html_page import render_page

#: Markers of drawings, as letters.
_GLYPHS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}
#: Dashes of lines, as the border of a box.
_DASHES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dashed"}
#: Inches; drawings wider than that keep their size and scroll.
_WIDE = 5.5


class Picture(NamedTuple):
    """A drawing as the page shows it: what a person reads, its two addresses, and its width in pixels."""

    title: str
    described: str
    light: str
    dark: str
    width: int
    is_wide: bool


@dataclass
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        drawings: Shown first; small ones side by side.
        tables: Below them.
        folded: Tables shown on demand.
        note: What one must know to read the drawings.
    """

    title: str
    drawings: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = field(default_factory=tuple)
    note: str = ""

    @property
    def anchor(self) -> str:
        """Its address on the page."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())

    @property
    def legend(self) -> Mapping[str, Look]:
        """What its drawings show, by label."""
        return {label: look for drawing in self.drawings for label, look in drawing.legend.items()}

    def pictures(self) -> list[Picture]:
        """Its drawings, drawn."""
        return [_picture(drawing) for drawing in self.drawings]


def page(title: str, sections: Sequence[Section], findings: Sequence[Finding]) -> str:
    """The whole document.

    Args:
        title: Of the page.
        sections: In their order; empty ones are left out.
        findings: What to keep in mind, shown first.
    """
    shown = [section for section in sections if section.drawings or section.tables or section.folded]
    return render_page(
        "comparison.html", title=title, sections=shown, findings=findings, glyphs=_GLYPHS, dashes=_DASHES
    )


def _picture(drawing: Drawing) -> Picture:
    light, dark = (data_uri(render(drawing, "svg", theme), "svg+xml") for theme in (LIGHT, DARK))
    described = drawing.described or drawing.title
    return Picture(drawing.title, described, light, dark, round(96 * drawing.size[0]), drawing.size[0] > _WIDE)
