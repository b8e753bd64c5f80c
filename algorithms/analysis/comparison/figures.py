"""Draws the figures of a comparison; each figure is a function that draws on given axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from algorithms.analysis.comparison import statistics, tables
from algorithms.analysis.comparison.arc_panel import Panel
from algorithms.analysis.comparison.curves import AXES, CURVES, WORDS, Curve, Line, curve
from algorithms.analysis.comparison.methods import Method
from algorithms.analysis.comparison.pairwise import Pair, judge
from algorithms.analysis.comparison.style import Drawing, Look, Theme
from algorithms.analysis.runs import ALL

THRESHOLDS = np.linspace(0, 1, 101)
#: Between the marks of two methods at the same value of a setting, as a share of the distance of the outer values.
_ASIDE = 0.015


def scores(methods: Sequence[Method], mode: str, shown: Mapping[str, Look]) -> Drawing:
    """Draw the exact match of every method with its interval, and the untrained models as lines."""
    estimates = [method.exact_match(mode) for method in methods]
    references = tables.reference_figures(methods, mode)
    untrained = {model: found[ALL]["exact_match"] for model, found in references.items()}

    def draw(axes: Any, theme: Theme) -> None:
        for at, (method, (value, low, high)) in enumerate(zip(methods, estimates, strict=True)):
            look = shown[method.label]
            axes.plot([low, high], [at, at], color=look.color, linewidth=2)
            axes.plot([value], [at], marker=look.marker, color=look.color, markersize=7)
        for model, value in untrained.items():
            axes.axvline(value, color=theme.text, linestyle=":", linewidth=1)
            side = "right" if value > 0.5 else "left"
            axes.annotate(f" {model} ", (value, -0.5), color=theme.text, fontsize=8, ha=side, va="bottom")
        axes.set_yticks(range(len(methods)), [method.label for method in methods])
        axes.set_ylim(len(methods) - 0.5, -0.9)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel(f"exact match, {in_words(mode)}")

    told = ", ".join(f"{method.label} {found.value:.3f}" for method, found in zip(methods, estimates, strict=True))
    size = (4.6, 1.1 + 0.3 * len(methods))
    return Drawing(f"scores-{mode}", f"Exact match on the test questions, {in_words(mode)}", draw, size, told)


def differences(labels: Sequence[str], pairs: Sequence[Pair], mode: str) -> Drawing:
    """Draw the difference of each pair in points, row minus column, and whether it is beyond chance."""
    cells: dict[tuple[str, str], tuple[float, str]] = {}
    for (first, second, found), verdict in zip(pairs, judge(pairs), strict=True):
        value = 100 * found.difference.value
        cells |= {(first, second): (value, verdict.sign), (second, first): (-value, verdict.sign)}

    def draw(axes: Any, theme: Theme) -> None:
        matrix = np.array([[cells.get((row, column), (np.nan, ""))[0] for column in labels] for row in labels])
        bound = max(1.0, float(np.nanmax(np.abs(matrix)))) if cells else 1.0
        image = axes.imshow(matrix, cmap="PuOr_r", vmin=-bound, vmax=bound)
        _frame(axes, labels, labels)
        for at, row in enumerate(labels):
            for across, column in enumerate(labels):
                if (row, column) in cells:
                    value, sign = cells[row, column]
                    text = f"{value:+.0f}{sign}" if round(value) else f"0{sign}"
                    _write_cell(axes, image, at, across, text, bold=sign == "*")

    side = 1.5 + 0.42 * len(labels)
    title = (
        f"Row minus column in points of exact match, {in_words(mode)}. * The methods differ, ° these policies do (at "
        "the 5 % level)"
    )
    told = ", ".join(f"{pair.first} minus {pair.second} {100 * pair.found.difference.value:+.0f}" for pair in pairs)
    return Drawing(f"differences-{mode}", title, draw, (side + 0.6, side), told)


def learning_curves(methods: Sequence[Method], shown: Mapping[str, Look]) -> list[Drawing]:
    """Draw one figure for each metric and axis that any run has logged."""
    drawings = []
    for metric, axes_of_metric in CURVES.items():
        for axis in axes_of_metric:
            found = {method.label: line for method in methods if (line := curve(method, metric, axis)) is not None}
            if found:
                title = f"{WORDS[metric].capitalize()}, by {AXES[axis]}"
                name = f"curve-{metric.replace('/', '-')}-{axis}"
                draw = partial(_draw_curves, curves=found, shown=shown, metric=metric, axis=axis)
                told = f"{title}, for {', '.join(found)}"
                legend = {label: shown[label] for label in found}
                drawings.append(Drawing(name, title, draw, described=told, legend=legend))
    return drawings


def _draw_curves(
    axes: Any, theme: Theme, curves: Mapping[str, Curve], shown: Mapping[str, Look], metric: str, axis: str
) -> None:
    for label, line in curves.items():
        look = shown[label]
        every = max(1, len(line.x) // 8)
        axes.fill_between(line.x, line.low, line.high, color=look.color, alpha=0.18, linewidth=0)
        axes.plot(line.x, line.mean, look.dash, color=look.color, marker=look.marker, markevery=every, markersize=4)
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel(WORDS[metric])
    _compact(axes.xaxis)
    if not metric.endswith("num_searches"):
        axes.set_ylim(-0.02, 1.02)


def profiles(scored: Mapping[str, np.ndarray], mode: str, shown: Mapping[str, Look], resamples: int) -> Drawing:
    """Draw the share of runs and groups of questions above every score."""
    found = {name: statistics.performance_profile(table, THRESHOLDS, resamples) for name, table in scored.items()}

    def draw(axes: Any, theme: Theme) -> None:
        for name, (share, low, high) in found.items():
            look = shown[name]
            axes.fill_between(THRESHOLDS, low, high, color=look.color, alpha=0.15, linewidth=0)
            axes.plot(THRESHOLDS, share, look.dash, color=look.color)
        axes.set_xlabel("threshold of exact match")
        axes.set_ylabel("share of runs and groups above it")

    title = f"How many runs and groups of questions score above a threshold, {in_words(mode)}"
    return Drawing(f"profiles-{mode}", title, draw, described=f"{title}, of {', '.join(found)}", legend=shown)


def cost_beside_score(methods: Sequence[Method], mode: str, shown: Mapping[str, Look]) -> list[Drawing]:
    """Draw exact match against cost, one figure for each kind of cost that any method has."""
    spent = {method.label: [tables.cost_figures(run) for run in method.runs] for method in methods}
    estimates = {method.label: method.exact_match(mode) for method in methods}
    kinds = {
        "tokens": ("model tokens, sampled and trained", ("sampled_tokens", "trained_tokens")),
        "teacher": ("teacher tokens, sampled and scored", ("teacher_tokens",)),
        "env_steps": ("environment steps", ("env_steps",)),
        "seconds": ("seconds of training and of demonstrations", ("training_s", "demonstrations_s")),
    }

    def cost(label: str, names: Sequence[str]) -> float:
        return float(np.mean([sum(each[name] for name in names) for each in spent[label]]))

    def draw(axes: Any, theme: Theme, words: str, names: Sequence[str]) -> None:
        for label, (value, low, high) in estimates.items():
            look, x = shown[label], cost(label, names)
            axes.plot([x, x], [low, high], color=look.color, linewidth=1.5)
            axes.plot([x], [value], marker=look.marker, color=look.color, markersize=7, linestyle="none")
        axes.set_xlim(0, 1.08 * max(cost(label, names) for label in estimates))
        axes.set_xlabel(words)
        axes.set_ylabel(f"exact match, {in_words(mode)}")
        _compact(axes.xaxis)

    return [
        Drawing(
            f"cost-{kind}",
            f"Exact match by {words}, {in_words(mode)}",
            partial(draw, words=words, names=names),
            legend=shown,
        )
        for kind, (words, names) in kinds.items()
        if any(cost(label, names) for label in estimates)
    ]


def probed(panel: Panel) -> Drawing | None:
    """Draw how far every model is behind the teacher in each share that the probes measure; None without shares."""
    columns = [each for each in panel.columns if any(panel.behind(model, each) is not None for model in panel.models)]
    if not columns:
        return None
    behind = np.array([[panel.behind(model, each) for model in panel.models] for each in columns], dtype=float)

    def draw(axes: Any, theme: Theme) -> None:
        image = axes.imshow(behind, cmap="Oranges", vmin=0, vmax=1, aspect="auto")
        _frame(axes, [f"{probe}: {metric}".replace("_", " ") for probe, metric in columns], panel.models)
        for row, column in enumerate(columns):
            for across, model in enumerate(panel.models):
                if (found := panel.estimates.get((model, column))) is not None:
                    _write_cell(axes, image, row, across, f"{found.value:.2f}")

    title = "What the probes measured, as shares. The darker, the further behind the teacher"
    size = (3.4 + 0.5 * len(panel.models), 1.5 + 0.26 * len(columns))
    return Drawing("arc", title, draw, size, f"{title}; of {', '.join(panel.models)}. The table below has the numbers")


def in_words(mode: str) -> str:
    """A mode of decoding in words."""
    return "decoding greedily" if mode == "greedy" else f"sampled at {mode.replace('=', ' = ')}"


def by_setting(lines: Sequence[Line], words: str, mode: str, shown: Mapping[str, Look]) -> Drawing:
    """Draw the final score of each method against a setting, with a dot for each seed; methods stand side by side."""

    def draw(axes: Any, theme: Theme) -> None:
        every = sorted({x for line in lines for x in line.x})
        least = min((x for x in every if x > 0), default=0.0)
        if every[0] >= 0 and every[-1] >= 8 * least > 0:
            linear = {"linthresh": least, "linscale": 0.4} if every[0] == 0 else {}
            axes.set_xscale("symlog" if linear else "log", **linear)
        scale = axes.xaxis.get_transform()
        width = np.ptp(scale.transform(np.array([every[0], every[-1]])))
        for number, line in enumerate(lines):
            look = shown[line.label]
            aside = (number - (len(lines) - 1) / 2) * _ASIDE * width
            places = scale.inverted().transform(scale.transform(np.array(line.x)) + aside)
            values = np.array([found.value for found in line.scores])
            low = [found.low or 0.0 for found in line.scores]
            high = [found.high or 0.0 for found in line.scores]
            axes.errorbar(places, values, [values - low, high - values], color=look.color, fmt=look.dash,
                          marker=look.marker, markersize=5, linewidth=1, elinewidth=1)  # fmt: skip
            seeds = [(x, each) for x, by_seed in zip(places, line.by_seed, strict=True) for each in by_seed]
            axes.plot(*zip(*seeds, strict=True), ".", color=look.color, alpha=0.6, markersize=4)
        axes.set_xticks(every, [f"{x:g}" for x in every])
        axes.minorticks_off()
        axes.set_xlabel(words)
        axes.set_ylabel(f"exact match, {in_words(mode)}")

    title = f"Exact match by {words}, {in_words(mode)}"
    return Drawing(f"setting-{mode}", title, draw, (5.6, 3.4), described=title, legend=shown)


def _frame(axes: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Name the rows and columns of an image, and take away what is drawn around it."""
    axes.grid(visible=False)
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _write_cell(axes: Any, image: Any, row: int, column: int, text: str, bold: bool = False) -> None:
    ink = "#FFFFFF" if _is_dark(image.to_rgba(image.get_array()[row, column])) else "#222222"
    weight = "bold" if bold else "normal"
    axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8, fontweight=weight)


def _is_dark(color: Sequence[float]) -> bool:
    """Whether white is easier to read than our dark grey on a colour (red, green, blue in [0, 1])."""
    return float(np.dot((0.2126, 0.7152, 0.0722), np.asarray(color[:3]) ** 2.2)) < 0.21


def _compact(axis: Any) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(sep=""))
