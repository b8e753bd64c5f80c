"""The ARC panel shows what the probes found about every model, so that one glance tells where each is weak."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from algorithms.analysis.comparison import statistics
from algorithms.analysis.comparison.methods import Method
from algorithms.analysis.comparison.statistics import Estimate
from algorithms.analysis.comparison.table_formats import NOTHING, Cell, Number, Table
from algorithms.analysis.runs import Run

_UNTRAINED = ("raw", "teacher")
#: Distributions, and counts of cases that were left out; only the full table shows them.
_DETAILS = re.compile(r"searches_\d+|.*without_gold|.*_f1|f1")
#: Share of the episodes with so many searches; a run has no such share above its largest number.
_SHARE_OF_COUNT = re.compile(r"searches_\d+")
#: Shares that a probe names only if they are above 0.
_LEFT_OUT_AT_ZERO = re.compile(r".*(too_long|search_failed)")
#: The built-in probes, and the ends of their figures' names, for older runs that do not declare what figures mean.
_BUILT_IN = ("source_referencing", "thinking", "query_rewriting", "search_behaviour")
_NO_SHARES = ("num_searches", "extra_searches", "effect", "gain", "gain_over_verbatim")
_LOW = ("failures", "invented", "copied", "malformed", "malformed_fraction", "repeated_query", "unanswered",
        "too_early", "stopped_midway", "searched_on")  # fmt: skip
_NEITHER = ("searched", "answered", "abstained", "hit_verbatim", "without_gold")
#: Least difference at which a model is called weaker than the teacher, and most weak points listed for each probe.
_WEAKER, _NUM_POINTS = 0.05, 2


class Meaning(NamedTuple):
    """How to read a figure.

    Attributes:
        best: "high", "low", or None where neither is good.
        share: Whether the figure lies in [0, 1].
    """

    best: str | None
    share: bool


@dataclass(frozen=True)
class Panel:
    """Figures of the probes.

    Attributes:
        models: Labels of the methods, then the untrained models.
        columns: (probe, metric) pairs.
        estimates: Estimates by model and column; a figure that a model lacks is left out.
        meanings: Meanings by column.
    """

    models: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]
    estimates: Mapping[tuple[str, tuple[str, str]], Estimate]
    meanings: Mapping[tuple[str, str], Meaning]

    def shortened(self) -> Panel:
        """The panel without distributions and without counts of cases that were left out."""
        columns = tuple(column for column in self.columns if not _DETAILS.fullmatch(column[1]))
        return Panel(self.models, columns, self.estimates, self.meanings)

    def weakness(self, model: str, column: tuple[str, str]) -> float | None:
        """How weak a model is in one column, in [0, 1]; None if the figure can't tell."""
        found, meaning = self.estimates.get((model, column)), self.meanings[column]
        if found is None or meaning.best is None or not meaning.share:
            return None
        return found.value if meaning.best == "low" else 1 - found.value

    def behind(self, model: str, column: tuple[str, str]) -> float | None:
        """How much weaker a model is than the teacher, or than the best possible if the teacher was not probed."""
        weakness = self.weakness(model, column)
        return None if weakness is None else max(0.0, weakness - (self.weakness("teacher", column) or 0.0))

    def weak_points(self) -> Table:
        """The figures of every probe in which each trained model is furthest behind the teacher."""
        probes = list(dict.fromkeys(probe for probe, _ in self.columns))
        rows: list[list[Cell]] = [
            [model, *(self._weakest(model, probe) for probe in probes)]
            for model in self.models
            if model not in _UNTRAINED
        ]
        note = (
            f"Of each probe the {_NUM_POINTS} shares in which a method is furthest behind the teacher (where that was "
            f"not probed, behind the best that could be), if by at least {_WEAKER:.2f}. In brackets the teacher's."
        )
        return Table("arc-weak-points", "ARC: where each is weak", ["method", *map(_words, probes)], rows, note)

    def _weakest(self, model: str, probe: str) -> str:
        behind = {column: self.behind(model, column) or 0.0 for column in self.columns if column[0] == probe}
        worst = sorted((column for column in behind if behind[column] >= _WEAKER), key=lambda column: -behind[column])
        return "; ".join(self._beside_teacher(model, column) for column in worst[:_NUM_POINTS]) or NOTHING

    def _beside_teacher(self, model: str, column: tuple[str, str]) -> str:
        teacher = self.estimates.get(("teacher", column))
        told = f"{_words(column[1])} {self.estimates[model, column].value:.2f}"
        return f"{told} ({teacher.value:.2f})" if teacher else told

    def table(self, name: str, title: str) -> Table:
        """Make the table with a row for each figure and a column for each model."""
        rows: list[list[Cell]] = []
        sections, last = [], ""
        for probe, metric in self.columns:
            if last and probe != last:
                sections.append(len(rows))
            last = probe
            best = self.meanings[probe, metric].best or NOTHING
            cells = [self._cell(model, (probe, metric)) for model in self.models]
            rows.append([f"{_words(probe)}: {_words(metric)}", best, *cells])
        note = (
            "Means over seeds with 95 % intervals over seeds and items. Best: which values are good. Shaded: how far a "
            "share is behind the teacher's (where that was not probed, behind the best that could be). ARC as defined "
            "here, not as published."
        )
        return Table(name, title, ["probe", "best", *self.models], rows, note, sections, brief=True)

    def _cell(self, model: str, column: tuple[str, str]) -> Cell:
        found = self.estimates.get((model, column))
        if found is None:
            return NOTHING
        return Number(*found, style=".2f", shade=self.behind(model, column))


def make_panel(methods: Sequence[Method]) -> Panel | None:
    """Collect the `arc` sections of all summaries; None if no run was probed."""
    named = [(method.label, [_probed(run, run.final) for run in method.runs]) for method in methods]
    for model in _UNTRAINED:
        found = next((of_run for method in methods for run in method.runs if (of_run := _probed(run, model))), {})
        named.append((model, [found]))
    meanings = _meanings(of_run for _, of_runs in named for of_run in of_runs)
    estimates: dict[tuple[str, tuple[str, str]], Estimate] = {}
    for label, of_runs in named:
        for column, meaning in meanings.items():
            if figures := [figure for of_run in of_runs if (figure := _figure(of_run, column)) is not None]:
                estimates[label, column] = _estimate(figures, meaning.share)
    models = tuple(label for label, of_runs in named if any(of_runs))
    ordered = sorted(meanings, key=lambda column: [probe for probe, _ in meanings].index(column[0]))
    return Panel(models, tuple(ordered), estimates, meanings) if estimates else None


def _probed(run: Run, model: str) -> dict[tuple[str, str], Mapping[str, Any]]:
    of_model = run.summary.get("arc", {}).get(model) or {}
    return {(probe, metric): figure for probe, metrics in of_model.items() for metric, figure in metrics.items()}


def _meanings(
    of_runs: Iterable[Mapping[tuple[str, str], Mapping[str, Any]]],
) -> dict[tuple[str, str], Meaning]:
    """How to read each figure, in order of first occurrence; one run's declaration holds for all runs."""
    meanings: dict[tuple[str, str], Meaning] = {}
    for of_run in of_runs:
        for column, figure in of_run.items():
            if "best" in figure:
                meanings[column] = Meaning(figure["best"], bool(figure.get("share")))
            else:
                meanings.setdefault(column, _undeclared(*column))
    return meanings


def _undeclared(probe: str, metric: str) -> Meaning:
    """How to read a figure without a declaration; nothing is known about a probe that is not built in."""
    if probe not in _BUILT_IN or metric.endswith(_NO_SHARES):
        return Meaning(None, share=False)
    if metric.endswith(_NEITHER) or _SHARE_OF_COUNT.fullmatch(metric):
        return Meaning(None, share=True)
    return Meaning("low" if metric.endswith(_LOW) else "high", share=True)


def _figure(of_run: Mapping[tuple[str, str], Mapping[str, Any]], column: tuple[str, str]) -> Mapping[str, Any] | None:
    """A figure of a run; the share of what never occurred is 0, not unknown, if its probe ran."""
    probe, metric = column
    of_probe = {name: figure for (its_probe, name), figure in of_run.items() if its_probe == probe}
    is_zero = _LEFT_OUT_AT_ZERO.fullmatch(metric) or (_SHARE_OF_COUNT.fullmatch(metric) and "searches_0" in of_probe)
    if of_probe and metric not in of_probe and is_zero:
        n = max(int(figure["n"]) for figure in of_probe.values())
        return {"value": 0.0, "n": n, "interval": [0.0, 0.0]}
    return of_probe.get(metric)


def _estimate(figures: Sequence[Mapping[str, Any]], is_share: bool) -> Estimate:
    """Mean over seeds; the items are the same for all of them, so their variance does not shrink with the seeds."""
    values = np.array([figure["value"] for figure in figures], dtype=float)
    widths = [high - low for low, high in (figure["interval"] for figure in figures if figure.get("interval"))]
    if not widths:
        return Estimate(float(values.mean()))
    items = min(int(figure["n"]) for figure in figures)
    interval = statistics.crossed if is_share else statistics.crossed_mean
    return interval(values, statistics.variance_of_interval(float(np.mean(widths))), items)


def _words(name: str) -> str:
    return name.replace("_", " ")
