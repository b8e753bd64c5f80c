"""Makes curves over training and over a setting, from `metrics.jsonl` and the final scores."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from algorithms.analysis.comparison.methods import Method, make_methods
from algorithms.analysis.comparison.statistics import Estimate
from algorithms.analysis.comparison.table_formats import Number, Table
from algorithms.analysis.runs import ALL, Run

#: Costs of training, in words; tokens and turns are logged as `cost/...`, summed from the start of the run.
AXES = {
    "steps": "training steps",
    "tokens": "model tokens, sampled and trained",
    "env_steps": "environment steps",
    "seconds": "seconds of rollouts, scoring and updates",
}
_COST_PREFIX = "cost/"
_COSTS_OF_AXIS = {"tokens": ("sampled_tokens", "trained_tokens"), "env_steps": ("env_steps",)}
_SECONDS = ("time/rollout_s", "time/score_s", "time/update_s")

#: Metrics that are drawn as curves, in words.
WORDS = {
    "dev/exact_match": "exact match on the dev split",
    "rollout/exact_match": "exact match of the rollouts",
    "dev/num_searches": "searches per question, dev split",
    "rollout/num_searches": "searches per question, rollouts",
    "dev/malformed_fraction": "share of malformed turns, dev split",
    "rollout/malformed_fraction": "share of malformed turns, rollouts",
}
#: Their axes: scores are drawn against every cost, the others against steps alone.
CURVES = {metric: tuple(AXES) if metric.endswith("exact_match") else ("steps",) for metric in WORDS}

#: What the intervals of a `Line` are.
POOLED = (
    "95 % t intervals over seeds and questions. The variance between seeds is taken to be the same at all values of "
    "the setting: it is pooled over those of a method, with the sum of their degrees of freedom. Where a method has a "
    "single seed at every value, its intervals are over questions alone and say nothing about another seed."
)


@dataclass(frozen=True)
class Curve:
    """A metric over training as the mean over the seeds of a method.

    Attributes:
        x: Places on the axis, [points]; mean over seeds.
        mean: Mean of the metric, [points].
        low, high: Smallest and largest value among the seeds, [points].
    """

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Line:
    """The final score of a method by a setting.

    Attributes:
        label: The method, without the setting.
        base: See `Method`.
        x: Values of the setting, in ascending order.
        scores: One score for each value; their intervals share one variance between seeds.
        by_seed: The scores of the seeds behind each score.
    """

    label: str
    base: str
    x: tuple[float, ...]
    scores: tuple[Estimate, ...]
    by_seed: tuple[np.ndarray, ...]


def positions(run: Run, axis: str) -> list[float] | None:
    """Where each line of a run's metrics lies on an axis; None if the run did not log it."""
    rows = run.metrics
    if axis == "steps":
        return [row["step"] for row in rows]
    if axis == "seconds":
        spent = [sum(row.get(name) or 0.0 for name in _SECONDS) for row in rows]
        return np.cumsum(spent).tolist()
    if not any(name.startswith(_COST_PREFIX) for row in rows for name in row):
        return None
    return [sum(row.get(_COST_PREFIX + name) or 0.0 for name in _COSTS_OF_AXIS[axis]) for row in rows]


def curve(method: Method, metric: str, axis: str) -> Curve | None:
    """Make a learning curve at the steps that all seeds have logged; None without such steps or without such a cost.

    Steps are counted within each stage, because the same stage of another seed may be longer.
    """
    found: list[dict[tuple[int, int], tuple[float, float]]] = []
    for run in method.runs:
        if (along := positions(run, axis)) is None:
            return None
        values = zip(run.metrics, _places(run), along, strict=True)
        found.append({place: (x, row[metric]) for row, place, x in values if row.get(metric) is not None})
    steps = sorted(set.intersection(*map(set, found)))
    if not steps:
        return None
    points = np.array([[by_step[step] for step in steps] for by_step in found])  # [seeds, points, 2]
    x, y = points[..., 0].mean(axis=0), points[..., 1]
    if not x.any():  # this method does not have that cost
        return None
    return Curve(x, y.mean(axis=0), y.min(axis=0), y.max(axis=0))


def _places(run: Run) -> list[tuple[int, int]]:
    """The number of the stage and the step within it, of each line of a run's metrics."""
    places: list[tuple[int, int]] = []
    number, begun, stage, last = 0, 0, None, 0
    for row in run.metrics:
        if places and row.get("stage") != stage:
            number, begun = number + 1, last
        stage, last = row.get("stage"), row["step"]
        places.append((number, last - begun))
    return places


def curves_csv(methods: Sequence[Method]) -> str:
    """Write every point of every curve: one line per run, step and metric, with its place on all axes."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", "seed", "metric", *AXES, "value"])
    for method in methods:
        for run in method.runs:
            nowhere = [float("nan")] * len(run.metrics)
            along = [positions(run, axis) or nowhere for axis in AXES]
            for row, *where in zip(run.metrics, *along, strict=True):
                for metric in CURVES:
                    if row.get(metric) is not None:
                        writer.writerow([method.label, run.seed, metric, *where, row[metric]])
    return file.getvalue()


def score_by_setting(runs: Sequence[Run], names: Sequence[str], mode: str) -> list[Line]:
    """Plot exact match against a numeric setting, with a line for each method that has it.

    Args:
        runs: Finished runs.
        names: Dotted names of settings; the first one that is a number in a run counts.
        mode: Mode of decoding.
    """
    lines = []
    for method in make_methods([run for run in runs if _number(run.settings, names) is not None], ignore=names):
        by_value: dict[float, list[Run]] = {}
        for run in method.runs:
            value = _number(run.settings, names)
            assert value is not None
            by_value.setdefault(value, []).append(run)
        values = tuple(sorted(by_value))
        members = [Method(method.label, method.base, tuple(by_value[value])) for value in values]
        scores = tuple(each.exact_match(mode, alike=members) for each in members)
        by_seed = tuple(each.means(mode, ALL, "exact_match") for each in members)
        lines.append(Line(method.label, method.base, values, scores, by_seed))
    return lines


def setting_table(lines: Sequence[Line], words: str, names: Sequence[str], mode: str) -> Table:
    """The points of `score_by_setting`."""
    rows: list[list[Any]] = [
        [line.label, Number(x, style="g"), str(len(by_seed)), Number.of(score)]
        for line in lines
        for x, score, by_seed in zip(line.x, line.scores, line.by_seed, strict=True)
    ]
    note = f"Setting: the first of {', '.join(names)} that a run has. Methods without it are left out. {POOLED}"
    return Table(
        f"setting-{mode}", f"Exact match by {words}, {mode}", ["method", words, "seeds", "exact match"], rows, note
    )


def _number(settings: Mapping[str, Any], names: Sequence[str]) -> float | None:
    for name in names:
        value = settings.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None
