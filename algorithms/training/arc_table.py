"""The figures of the ARC probes in the terminal: capabilities down, models across, weak points marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agentic_rag_env.probes import Figure
from algorithms.training.evaluation import Evaluated

#: Shares at least this far from the best they could be are marked.
WEAK = 0.5


class Row(NamedTuple):
    """A figure that the table shows first.

    Attributes:
        probe, metric: Names under which the figure stands in the summary.
        label: Name of the figure in the table.
        judged: Whether a value that is far from the best is a weakness.
        is_difference: Whether values are differences, which are shown with their sign.
    """

    probe: str
    metric: str
    label: str
    judged: bool = True
    is_difference: bool = False


ROWS = (
    Row("source_referencing", "exact_match", "reads the answer off gold passages"),
    Row("source_referencing", "distractors_exact_match", "... among distractors"),
    Row("source_referencing", "distractors_effect", "... effect of the distractors", is_difference=True),
    Row("source_referencing", "absent_answered", "answers where there is no evidence"),
    Row("source_referencing", "absent_invented", "... with what no passage says"),
    Row("source_referencing", "too_long", "prompts too long to be read", judged=False),
    Row("source_referencing", "distractors_too_long", "... with distractors", judged=False),
    Row("thinking", "exact_match", "thinks over gold passages and answers"),
    Row("thinking", "gain", "... gain over answering at once", is_difference=True),
    Row("thinking", "format_failures", "... thought never closed or no action"),
    Row("query_rewriting", "hit_first_round", "first query finds the answer", judged=False),  # can't, of several hops
    Row("query_rewriting", "gain_over_verbatim", "... gain over the question itself", is_difference=True),
    Row("query_rewriting", "hit_any_round", "any query finds the answer"),
    Row("query_rewriting", "search_failed", "... left out, as the search failed", judged=False),
    Row("search_behaviour", "num_searches", "searches per episode"),
    Row("search_behaviour", "evidence_complete", "sees all of the evidence"),
    Row("search_behaviour", "stopped_too_early", "wrong answer before any evidence"),
    Row("search_behaviour", "stopped_midway", "wrong answer with half of the evidence"),
    Row("search_behaviour", "searched_on", "searches on with all of it"),
    Row("search_behaviour", "malformed_fraction", "malformed turns"),
    Row("search_behaviour", "unanswered", "episodes without an answer"),
    Row("search_behaviour", "search_failed", "... left out, as the search failed", judged=False),
    Row("counterfactual", "reads", "answers what changed passages say"),
    Row("counterfactual", "remembers", "... what they no longer say"),
    Row("counterfactual", "shown", "... was shown such a passage", judged=False),
    Row("counterfactual", "search_failed", "... left out, as the search failed", judged=False),
    Row("shuffled", "exact_match", "right with the passages of others"),
    Row("shuffled", "closed_book_exact_match", "... right without any passage"),
    Row("shuffled", "search_failed", "... left out, as the search failed", judged=False),
)


def show_arc(terminal: Console, evaluated: Sequence[Evaluated]) -> None:
    """Print what the probes found, and each model's weakest point. Without probes, print nothing.

    Args:
        terminal: Where to print.
        evaluated: The models; those that were not probed are left out.
    """
    probed = [model for model in evaluated if model.arc]
    if not probed:
        return
    terminal.print(arc_table(probed))
    for model in probed:
        terminal.print(f"weakest of {model.name}: {weakest(model)}", markup=False, highlight=False)


def arc_table(probed: Sequence[Evaluated]) -> Table:
    """Make a table with a row for each figure of which any model has a value."""
    title = f"ARC probes (own definitions), 95 % intervals; !: {WEAK} or more off the best"
    table = Table(title=title)
    table.add_column("capability")
    for model in probed:
        table.add_column(model.name, justify="right")
    last = ROWS[0].probe
    for row in _rows(probed):
        figures = [_figure(model, row) for model in probed]
        if any(figures):
            if row.probe != last:
                table.add_section()
            last = row.probe
            table.add_row(row.label, *(_cell(figure, row) for figure in figures))
    return table


def weakest(model: Evaluated) -> str:
    """Name the share of a model that is furthest from its best possible value, in words."""
    found = [
        (distance, row, figure)
        for row in _rows([model])
        if (figure := _figure(model, row)) and (distance := _distance(figure, row)) is not None
    ]
    if not found:
        return "no share says which way is good"
    distance, row, figure = max(found, key=lambda weakness: weakness[0])
    if not distance:
        return "nothing"
    return f"{row.label.removeprefix('... ')} ({row.probe}/{row.metric} {figure['value']:.3f})"


def _rows(probed: Sequence[Evaluated]) -> list[Row]:
    """List the rows above, then every figure of probes that are not among them, such as those of plug-ins."""
    known = {row.probe for row in ROWS}
    others = {(probe, metric): None for model in probed for probe, of in model.arc.items() for metric in of}
    return [*ROWS, *(Row(*one, ": ".join(one).replace("_", " ")) for one in others if one[0] not in known)]


def _figure(model: Evaluated, row: Row) -> Figure | None:
    return model.arc.get(row.probe, {}).get(row.metric)


def _distance(figure: Figure, row: Row) -> float | None:
    """Distance of a share to its best possible value; None where a distance is no weakness."""
    if figure["best"] is None or not figure["share"] or not row.judged:
        return None
    return figure["value"] if figure["best"] == "low" else 1.0 - figure["value"]


def _cell(figure: Figure | None, row: Row) -> Text:
    if figure is None:
        return Text("-")
    low, high = figure["interval"]
    sign = "+" if row.is_difference else ""
    text = f"{figure['value']:{sign}.3f} ({low:{sign}.2f} to {high:{sign}.2f})"
    distance = _distance(figure, row)
    if distance is None:
        return Text(text)
    style = "red" if distance >= WEAK else "yellow" if distance >= WEAK / 2 else "green"
    return Text(("! " if distance >= WEAK else "") + text, style=style)
