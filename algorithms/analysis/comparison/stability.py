"""Measures how steadily a method learned, from its checks on the dev split in the last stage of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from algorithms.analysis.comparison import statistics
from algorithms.analysis.comparison.methods import Method
from algorithms.analysis.comparison.statistics import Estimate
from algorithms.analysis.comparison.table_formats import NOTHING, Cell, Number, Table
from algorithms.analysis.runs import Run

_METRIC = "dev/exact_match"
#: A collapse leaves at most this share of the best check before it, and is at least this deep.
_SHARE, _DEPTH = 0.5, 0.1


class Stability(NamedTuple):
    """Figures of the checks of one run.

    Attributes:
        best: Highest exact match.
        last: Exact match of the last check.
        area: Mean over the steps that the checks span: area under the curve (trapezoidal rule) over its width.
        collapse: Step of the run at which exact match first was at most half of the best check before it, and at least
            0.1 below it; None: never. The last check of the stage before is one of those before it.
    """

    best: float
    last: float
    area: float
    collapse: int | None


def of_run(run: Run) -> Stability | None:
    """Measure the checks in the last stage; None if there was none."""
    stage = run.metrics[-1].get("stage") if run.metrics else None
    checks = [row for row in run.metrics if row.get(_METRIC) is not None and row.get("stage") == stage]
    if not checks:
        return None
    steps, scores = np.array([row["step"] for row in checks]), np.array([row[_METRIC] for row in checks], dtype=float)
    between = (scores[1:] + scores[:-1]) / 2
    area = np.average(between, weights=np.diff(steps)) if len(between) else scores[0]
    earlier = [row[_METRIC] for row in run.metrics if row.get(_METRIC) is not None and row.get("stage") != stage]
    best = np.maximum.accumulate([*earlier[-1:], *scores])[-len(scores) :]
    fallen = steps[(scores <= _SHARE * best) & (scores <= best - _DEPTH)]
    return Stability(float(scores.max()), float(scores[-1]), float(area), int(fallen[0]) if len(fallen) else None)


def table(methods: Sequence[Method]) -> Table | None:
    """Make the table of best, last and mean check and of collapses for each method; None if no run has a check."""
    rows: list[list[Cell]] = []
    for method in methods:
        found = [each for run in method.runs if (each := of_run(run)) is not None]
        if found:
            fallen = [each.collapse for each in found if each.collapse is not None]
            figures = [Number.of(_mean([getattr(each, name) for each in found])) for name in ("best", "last", "area")]
            share = f"{len(fallen)} of {len(found)}"
            rows.append([method.label, *figures, share, str(min(fallen)) if fallen else NOTHING])
    note = (
        "Exact match of the checks on the dev split in the last stage: means over seeds with 95 % t intervals over "
        "seeds alone, none where all seeds agree. Area: mean over the steps. A run has collapsed at the first check "
        "that is at most half of the best one before it, and at least 0.1 below it, where the last check of the stage "
        "before counts as one before it; the step is that of the seed that did so first."
    )
    columns = ["method", "best", "last", "area", "collapsed", "first collapse"]
    return Table("stability", "Stability of training", columns, rows, note) if rows else None


def _mean(by_seed: Sequence[float]) -> Estimate:
    """Mean of a share over seeds; its interval is cut at 0 and 1, and there is none where nothing varies."""
    value, low, high = statistics.crossed_mean(np.array(by_seed), 0.0, 1)
    assert low is not None
    assert high is not None
    return Estimate(value) if low == high else Estimate(value, max(0.0, low), min(1.0, high))
