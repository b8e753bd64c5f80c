"""One self-contained page: no network, no script, light and dark, narrow and wide, and usable by keyboard."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from algorithms.analysis.comparison.checks import Finding
from algorithms.analysis.comparison.style import DARK, LIGHT, Drawing, Look, data_uri, render
from algorithms.analysis.comparison.table_formats import Table
from algorithms.analysis.html_page import document

_STYLE = """
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 4px }
figure { margin: 0 0 1.4rem } figcaption, .note { color: var(--soft); font-size: .85rem; max-width: 60rem }
figcaption { margin-top: .4rem }
table { border-collapse: collapse; font-size: .9rem; width: 100% }
th, td { padding: .35rem .7rem; text-align: left; white-space: nowrap; vertical-align: top }
thead th { background: var(--band); border-bottom: 1px solid var(--line) }
tbody th { font-weight: 500; background: var(--page) }
tbody th, thead th:first-child { position: sticky; left: 0 }
tr.section > * { border-top: 1px solid var(--line) }
tbody tr:hover > * { background: var(--band) }
.number { text-align: right; font-variant-numeric: tabular-nums }
td small { display: block; color: var(--soft); font-size: .75rem } td[style] small { color: inherit }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1rem }
.figures img { width: 100%; height: auto; display: block } .single img { max-width: 100%; height: auto; display: block }
.figures .spread { grid-column: 1 / -1 } .wide { overflow-x: auto } .figures .wide img { width: auto; max-width: none }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; list-style: none; font-size: .9rem }
.legend span { display: inline-block; width: 1.6rem; border-top: 3px; vertical-align: middle; margin-right: .2rem }
summary { cursor: pointer; margin: .6rem 0; font-weight: 500 }
@media (max-width: 40rem) { tbody th { white-space: normal; min-width: 7rem; max-width: 8.5rem } }
@media print { .scroll { overflow: visible } }
"""

#: Markers of drawings, as letters.
_GLYPHS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}
#: Inches; drawings wider than that keep their size and scroll.
_WIDE = 5.5


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


def page(title: str, sections: Sequence[Section], findings: Sequence[Finding]) -> str:
    """The whole document.

    Args:
        title: Of the page.
        sections: In their order; empty ones are left out.
        findings: What to keep in mind, shown first.
    """
    shown = [section for section in sections if section.drawings or section.tables or section.folded]
    links = "".join(f'<li><a href="#{part.anchor}">{html.escape(part.title)}</a></li>' for part in shown)
    body = "\n".join(map(_section, shown))
    return document(
        title,
        _STYLE,
        f'<a class="skip" href="#main">To the figures</a>\n<header><h1>{html.escape(title)}</h1>\n'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n<main id="main">\n'
        f"{_findings(findings)}{body}\n</main>",
    )


def _findings(findings: Sequence[Finding]) -> str:
    items = "".join(
        f"<li>{'<strong>Not comparable:</strong> ' if finding.refuses else ''}{html.escape(finding.text)}</li>"
        for finding in findings
    )
    return f'<ul class="findings" aria-label="To keep in mind">{items}</ul>\n' if items else ""


def _section(section: Section) -> str:
    parts = [f'<section id="{section.anchor}"><h2>{html.escape(section.title)}</h2>']
    if legend := {label: look for drawing in section.drawings for label, look in drawing.legend.items()}:
        parts.append(_legend(legend))
    if section.drawings:
        if section.note:
            parts.append(f'<p class="note">{html.escape(section.note)}</p>')
        layout = "figures" if len(section.drawings) > 1 else "single"
        parts.append(f'<div class="{layout}">{"".join(map(_picture, section.drawings))}</div>')
    several = len(section.tables) > 1
    for table in section.tables:
        parts.append((f"<h3>{html.escape(table.title)}</h3>" if several else "") + table.html())
    for table in section.folded:
        parts.append(f"<details><summary>{html.escape(table.title)}</summary>{table.html()}</details>")
    return "\n".join([*parts, "</section>"])


def _legend(legend: Mapping[str, Look]) -> str:
    dashes = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dashed"}
    items = "".join(
        f'<li><span style="border-top-style: {dashes[look.dash]}; border-color: {look.color}"></span>'
        f'<b style="color: {look.color}" aria-hidden="true">{_GLYPHS[look.marker]}</b> {html.escape(label)}</li>'
        for label, look in legend.items()
    )
    return f'<ul class="legend" aria-label="Methods">{items}</ul>'


def _picture(drawing: Drawing) -> str:
    light, dark = (data_uri(render(drawing, "svg", theme), "svg+xml") for theme in (LIGHT, DARK))
    width = round(96 * drawing.size[0])
    wide = drawing.size[0] > _WIDE
    described, title = (html.escape(text, quote=True) for text in (drawing.described or drawing.title, drawing.title))
    scroll = f' class="wide" tabindex="0" role="region" aria-label="{title}"' if wide else ""
    return (
        f"<figure{' class=spread' if wide else ''}><div{scroll}><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" width="{width}" alt="{described}"></picture></div>'
        f"<figcaption>{title}</figcaption></figure>"
    )
