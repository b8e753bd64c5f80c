"""One table, four forms: terminal, Markdown, CSV and LaTeX. The fifth, HTML, is in the template of the page."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from agentic_rag_env.terminal import printable
from algorithms.analysis.comparison.statistics import Estimate

NOTHING = "–"
#: Least shade that the terminal shows in red.
_SHADE_SHOWN = 0.2
#: Width of a terminal in which every table fits.
_UNBOUNDED = 100_000


@dataclass(frozen=True)
class Number:
    """A table cell with a figure.

    Attributes:
        value: The figure; None or NaN if there is none.
        low, high: Interval of the figure, if it has one.
        style: Format specification, such as ".3f", ".1%" or ",.0f".
        best: Whether the figure is the best of its column.
        shade: Darkness of the background in HTML, in [0, 1]; None: no shade.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    style: str = ".3f"
    best: bool = False
    shade: float | None = None

    @classmethod
    def of(cls, estimate: Estimate, style: str = ".3f") -> Number:
        """Make a cell from an estimate."""
        return cls(*estimate, style=style)

    @property
    def known(self) -> bool:
        """Whether there is a figure at all."""
        return self.value is not None and not math.isnan(self.value)

    @property
    def text(self) -> str:
        """The figure without its interval."""
        if self.value is None or not self.known:
            return NOTHING
        if self.style == "p":
            return "<0.001" if self.value < 0.001 else f"{self.value:.3f}"
        return self._told(self.value)

    @property
    def interval(self) -> str:
        """The interval in brackets; empty if there is none."""
        if self.low is None or self.high is None:
            return ""
        return f"[{self._told(self.low)}, {self._told(self.high)}]"

    def _told(self, value: float) -> str:
        """Format a value in the cell's style; a zero has no sign if no digit differs from 0."""
        text = f"{value:{self.style}}"
        return text if re.search("[1-9]", text) else text.lstrip("+-")


Cell = str | Number


@dataclass
class Table:
    """Rows of cells under columns; the first column names the row.

    Attributes:
        name: Stem of the files' names.
        title: Heading of the table.
        columns: Headings of the columns.
        rows: Rows, each with one cell per column.
        note: Text that a reader needs to understand the table.
        sections: Indices of rows with a line above them.
        printed: Whether the terminal shows the table too.
        brief: Whether the terminal leaves the intervals out.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: list[list[Cell]]
    note: str = ""
    sections: Sequence[int] = ()
    printed: bool = True
    brief: bool = False

    def markdown(self) -> str:
        """The table in Markdown, with title and note."""

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cells) + " |"

        ruler = line(["---", *("---:" if number else "---" for number in self.numeric[1:])])
        body = [line([_markdown_cell(cell) for cell in row]) for row in self.rows]
        note = [f"\n{as_markdown(self.note)}"] if self.note else []
        head = [f"## {as_markdown(self.title)}\n", line([as_markdown(column) for column in self.columns])]
        return "\n".join([*head, ruler, *body, *note]) + "\n"

    def csv(self) -> str:
        """The table as CSV, with full precision; intervals have columns of their own."""
        with_bounds = [
            any(isinstance(row[at], Number) and row[at].low is not None for row in self.rows)  # type: ignore[union-attr]
            for at in range(len(self.columns))
        ]
        header: list[str] = []
        for column, bounds in zip(self.columns, with_bounds, strict=True):
            header += [column, f"{column} (low)", f"{column} (high)"] if bounds else [column]
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in self.rows:
            cells: list[str | float | None] = []
            for cell, bounds in zip(row, with_bounds, strict=True):
                values = (
                    [cell.value if cell.known else None, cell.low, cell.high] if isinstance(cell, Number) else [cell]
                )
                cells += [*values, None, None][:3] if bounds else values[:1]
            writer.writerow(cells)
        return file.getvalue()

    def records(self) -> list[dict[str, Any]]:
        """Rows as mappings for JSON; a figure with an interval is a list of three numbers."""
        return [dict(zip(self.columns, map(_record, row), strict=True)) for row in self.rows]

    def latex(self) -> str:
        """The table as a LaTeX `tabular` in the style of booktabs."""
        body = [" & ".join(_latex_cell(cell) for cell in row) + r" \\" for row in self.rows]
        columns = "".join("r" if number else "l" for number in self.numeric)
        return "\n".join(
            [
                " ".join(f"% {self.title}. {self.note}".splitlines()),
                r"\begin{tabular}{" + columns + "}",
                r"\toprule",
                " & ".join(_latex(column) for column in self.columns) + r" \\",
                r"\midrule",
                *body,
                r"\bottomrule",
                r"\end{tabular}",
                "",
            ]
        )

    def rich(self, console: Console) -> list[RichTable]:
        """The table for a terminal; intervals stand on their own line, and shades are colours of the text.

        Returns:
            One table. If it is too wide for the terminal: blocks of its columns that fit, so that no figure is broken;
            each begins with the columns before the first figure.
        """
        whole = self._block(range(len(self.columns)))
        blocks = [whole] if _widths(console, whole).maximum <= console.width else self._blocks(console)
        blocks[-1].caption = Text(printable(self.note), "table.caption") if self.note else None
        return blocks

    def _blocks(self, console: Console) -> list[RichTable]:
        num_repeated = self.numeric.index(True) if any(self.numeric) else 1
        repeated = list(range(num_repeated))
        blocks = [repeated]
        for column in range(num_repeated, len(self.columns)):
            longer = [*blocks[-1], column]
            fits = _widths(console, self._block(longer, narrow=True)).minimum <= console.width
            blocks = [*blocks[:-1], longer] if fits or blocks[-1] == repeated else [*blocks, [*repeated, column]]
        return [self._block(block, narrow=True) for block in blocks]

    def _block(self, columns: Sequence[int], narrow: bool = False) -> RichTable:
        """Some of the columns; with `narrow`, columns of figures are as narrow as figures and words allow."""
        table = RichTable(title=Text(printable(self.title), "table.title"), caption_justify="left")
        for at in columns:
            heading, number = Text(printable(self.columns[at])), self.numeric[at]
            parts = [
                *heading.plain.split(),
                *(line for row in self.rows for line in self._shown(row[at]).plain.split("\n")),
            ]
            width = max(map(cell_len, parts)) if narrow and number else None
            table.add_column(heading, justify="right" if number else "left", overflow="fold", width=width)
        for place, row in enumerate(self.rows):
            if place in self.sections:
                table.add_section()
            table.add_row(*(self._shown(row[at]) for at in columns))
        return table

    def _shown(self, cell: Cell) -> Text:
        """A cell as the terminal shows it."""
        if isinstance(cell, str):
            return Text(printable(cell))
        shade = "red" if (cell.shade or 0) >= _SHADE_SHOWN else ""
        figure = Text(cell.text, f"bold {shade}" if cell.best else shade)
        if self.brief or not cell.interval:
            return figure
        return Text.assemble(figure, "\n", (cell.interval.strip("[]"), "dim"))

    def mark_best(self, columns: Sequence[str], lowest: Sequence[str] = (), rows: int | None = None) -> None:
        """Mark the best figure of some columns, the highest or the lowest, among the first `rows` rows."""
        for column in (*columns, *lowest):
            at = list(self.columns).index(column)
            found = [row[at] for row in self.rows[:rows] if isinstance(row[at], Number) and row[at].known]  # type: ignore[union-attr]
            values = [cell.value for cell in found if isinstance(cell, Number) and cell.value is not None]
            if len(set(values)) < 2:
                continue
            best = min(values) if column in lowest else max(values)
            for row in self.rows[:rows]:
                cell = row[at]
                if isinstance(cell, Number) and cell.value == best:
                    row[at] = replace(cell, best=True)

    @property
    def numeric(self) -> list[bool]:
        """Say for each column whether it holds figures."""
        return [any(isinstance(row[at], Number) for row in self.rows) for at in range(len(self.columns))]


def _record(cell: Cell) -> Any:
    if isinstance(cell, str):
        return cell
    value = cell.value if cell.known else None
    return value if cell.low is None else [value, cell.low, cell.high]


def as_markdown(text: str) -> str:
    """A text as one line of Markdown that shows it as it is: a stranger's names bring no links, images or rows."""
    line = printable(text).replace("\n", "\\n")
    return re.sub(r"([\\`*|\[\]])", r"\\\1", line).replace("<", "&lt;")


def _markdown_cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return as_markdown(cell)
    text = f"**{cell.text}**" if cell.best else cell.text
    return f"{text} {cell.interval}".strip()


def _widths(console: Console, table: RichTable) -> Measurement:
    """The least and the most columns of a terminal that a table can use, however wide this one is."""
    return Measurement.get(console, console.options.update_width(_UNBOUNDED), table)


def _latex_cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return _latex(cell)
    text = _latex(cell.text)
    text = rf"\textbf{{{text}}}" if cell.best else text
    return rf"{text} {{\scriptsize {_latex(cell.interval)}}}" if cell.interval else text


def _latex(text: str) -> str:
    escaped = re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", r"\textbackslash "))
    for plain, command in (
        ("~", r"\textasciitilde "),
        ("^", r"\textasciicircum "),
        ("→", r"$\to$"),
        ("–", "--"),
        ("<", "$<$"),
        (">", "$>$"),
    ):
        escaped = escaped.replace(plain, command)
    return escaped
