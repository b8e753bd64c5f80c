"""Writes the comparison as one self-contained page without network or script; it can be used by keyboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from algorithms.analysis.comparison.checks import Finding
from algorithms.analysis.comparison.style import DARK, LIGHT, Drawing, Look, data_uri, render
from algorithms.analysis.comparison.table_formats import Table
from algorithms.analysis.html_page import render_page

#: Markers of drawings as letters.
_GLYPHS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}
#: Dashes of lines, as the border of a box.
_DASHES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dashed"}
#: Width in inches; wider drawings keep their size and scroll.
_WIDE = 5.5


class Picture(NamedTuple):
    """A drawing on the page: its description, its two addresses, and its width in pixels."""

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
        title: Heading of the section.
        drawings: Drawings at the top; small ones stand side by side.
        tables: Tables below the drawings.
        folded: Tables shown on demand.
        note: Text that a reader needs to understand the drawings.
    """

    title: str
    drawings: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = field(default_factory=tuple)
    note: str = ""

    @property
    def anchor(self) -> str:
        """Address of the section on the page."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())

    @property
    def legend(self) -> Mapping[str, Look]:
        """Legend of the section's drawings, by label."""
        return {label: look for drawing in self.drawings for label, look in drawing.legend.items()}

    def pictures(self) -> list[Picture]:
        """Render the section's drawings."""
        return [_picture(drawing) for drawing in self.drawings]


def page(title: str, sections: Sequence[Section], findings: Sequence[Finding], subtitle: str = "") -> str:
    """The whole document.

    Args:
        title: Title of the page.
        sections: Sections in their order; empty ones are left out.
        findings: Cautions, shown first.
        subtitle: Data, date and code.
    """
    shown = [section for section in sections if section.drawings or section.tables or section.folded]
    return render_page(
        "comparison.html",
        title=title,
        subtitle=subtitle,
        sections=shown,
        findings=findings,
        glyphs=_GLYPHS,
        dashes=_DASHES,
    )


def _picture(drawing: Drawing) -> Picture:
    light, dark = (data_uri(render(drawing, ("svg",), theme)["svg"], "svg+xml") for theme in (LIGHT, DARK))
    described = drawing.described or drawing.title
    return Picture(drawing.title, described, light, dark, round(96 * drawing.size[0]), drawing.size[0] > _WIDE)
