"""Makes the tables of a comparison."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from algorithms.analysis.comparison import published, statistics
from algorithms.analysis.comparison.methods import Method
from algorithms.analysis.comparison.statistics import Estimate
from algorithms.analysis.comparison.table_formats import NOTHING, Cell, Number, Table
from algorithms.analysis.runs import ALL, Run

REFERENCES = ("raw", "teacher")
_LETTERS, _MACRO = "letters", "mean of groups"
#: Figures over all questions behind the scores, with their styles.
_REST = (("f1", ".3f"), ("num_searches", ".2f"), ("malformed_fraction", ".1%"))


def results(
    methods: Sequence[Method],
    mode: str,
    groups: Sequence[str],
    letters: Mapping[str, str] | None = None,
    with_paper: bool = False,
) -> Table:
    """Make the table of results: methods, untrained models and, on the paper's datasets, the paper's rows.

    Args:
        methods: Methods in the order of the rows.
        mode: Mode of decoding.
        groups: Groups of questions; the group of all questions comes first.
        letters: Letters by label, see `pairwise.letters`; None or empty: the column is left out.
        with_paper: Show the paper's average even if no dataset is one of the paper's.
    """
    parts = groups[1:]
    columns = ["method", "seeds", groups[0], *([_LETTERS] if letters else []), *parts,
               *([_MACRO] if parts else []), "F1", "searches", "malformed"]  # fmt: skip
    datasets = published.shown_datasets(parts) if parts else _only_dataset(methods)
    with_paper = with_paper or bool(datasets)
    columns += ["paper's average"] if with_paper else []

    def row(label: str, base: str, seeds: str, figures: Sequence[Cell]) -> list[Cell]:
        letter = [letters.get(label, NOTHING)] if letters else []
        return [label, seeds, figures[0], *letter, *figures[1:], *([_published(base)] if with_paper else [])]

    rows = [row(each.label, each.base, str(len(each.runs)), _figures(each, mode, groups)) for each in methods]
    for model, figures in reference_figures(methods, mode).items():
        rows.append(row(model, model, NOTHING, _reference_figures(figures, groups)))
    trained, sections = len(methods), [len(methods), len(rows)]
    rows += _paper_rows(columns, datasets) if datasets else []
    table = Table(
        f"results-{mode}", f"Exact match, {mode}", columns, rows, _results_note(methods, mode, groups), sections
    )
    if letters:
        table.note += (
            " Methods that share a letter are not told apart at the 5 % level, after Holm's correction for all pairs: "
            "over seeds and questions, or where one has a single seed over questions alone, which judges only these "
            "policies."
        )
    table.mark_best([*groups, *([_MACRO] if parts else []), "F1"], lowest=["malformed"], rows=trained)
    return table


def aggregates(methods: Sequence[Method], mode: str, groups: Sequence[str], resamples: int) -> list[Table]:
    """Make the tables of interquartile means and of the chance that one method beats another."""
    scores = score_tables(methods, mode, groups)
    middle = {name: statistics.interquartile_mean(table, resamples) for name, table in scores.items()}
    tasks = groups[1:] or groups
    note = (
        f"Scores: exact match by seed and group of questions ({', '.join(tasks)}). 95 % intervals as in rliable: "
        f"bootstrap over seeds, stratified by group, {resamples} resamples; none for one seed. They are too narrow: "
        "seeds are few, and groups are drawn apart although one run answers all of them."
    )
    iqm: list[list[Cell]] = [[name, str(len(scores[name])), Number.of(found)] for name, found in middle.items()]
    first = Table(f"iqm-{mode}", f"Interquartile mean, {mode}", ["method", "seeds", "interquartile mean"], iqm, note)
    first.mark_best(["interquartile mean"])
    first.printed = any(len(table) > 1 for table in scores.values())  # with one seed it is just another mean
    chances = {
        pair: statistics.probability_of_improvement(scores[pair[0]], scores[pair[1]], resamples)
        for pair in combinations(scores, 2)
    }
    rows: list[list[Cell]] = [[*pair, Number.of(found)] for pair, found in chances.items()]
    second = Table(
        f"improvement-{mode}", f"Probability of improvement, {mode}", ["first", "second", "P(first > second)"], rows,
        "Chance that a run of the first scores above one of the second, mean over groups; ties count half.",
        printed=False,
    )  # fmt: skip
    return [table for table in (first, second) if table.rows]


def costs(methods: Sequence[Method], mode: str) -> Table:
    """Make the table of each method's costs, as mean over seeds, beside its score."""
    columns = ["method", "exact match", "episodes", "env steps", "sampled tokens", "trained tokens", "teacher tokens",
               "teacher share", "training s", "demos s", "memory MB"]  # fmt: skip
    rows: list[list[Cell]] = []
    for method in methods:
        spent = [cost_figures(run) for run in method.runs]
        mean = {name: float(np.mean([each[name] for each in spent])) for name in spent[0]}
        counts: list[Cell] = [Number(mean[name], style=",.0f") for name in
                  ("episodes", "env_steps", "sampled_tokens", "trained_tokens", "teacher_tokens")]  # fmt: skip
        rows.append([
            method.label, Number.of(method.exact_match(mode)), *counts, Number(mean["teacher_share"], style=".1%"),
            Number(mean["training_s"], style=",.0f"), Number(mean["demonstrations_s"], style=",.0f"),
            Number(mean["peak_memory_mb"], style=",.0f"),
        ])  # fmt: skip
    note = (
        "Means over seeds, all stages. Teacher tokens: sampled for demonstrations and scored in training; the share is "
        "theirs of all tokens of training. Training seconds: rollouts, scoring and updates, without checks, "
        "checkpoints and evaluation; those of demonstrations are near 0 where an earlier run had left them in the "
        "cache. Memory: the most that the process ever had."
    )
    return Table("costs", f"Cost beside score ({mode})", columns, rows, note, brief=True)


def cost_figures(run: Run) -> dict[str, float]:
    """Costs of one run, by their names in the table."""
    spent: Mapping[str, float] = run.summary.get("costs", {})
    names = ("episodes", "env_steps", "sampled_tokens", "trained_tokens", "demonstrations_s")
    return {
        **{name: float(spent.get(name, 0.0)) for name in names},
        "teacher_tokens": spent.get("teacher_sampled_tokens", 0.0) + spent.get("teacher_scored_tokens", 0.0),
        "teacher_share": float(run.summary.get("teacher_share_of_training", 0.0)),
        "training_s": sum(spent.get(name, 0.0) for name in ("rollout_s", "score_s", "update_s")),
        "peak_memory_mb": float(run.summary.get("peak_memory_mb", float("nan"))),
    }


def order(methods: Sequence[Method], mode: str) -> Table | None:
    """Make the table of our order of methods beside the paper's; None with fewer than two methods of the paper."""
    matched = [(method, name) for method in methods if (name := published.matching_method(method.base)) is not None]
    if len(matched) < 2:
        return None
    scores = [method.exact_match(mode).value for method, _ in matched]
    theirs = [published.PUBLISHED[name][published.AVERAGE] for _, name in matched]
    tau, rho = statistics.rank_agreement(scores, theirs)
    rows: list[list[Cell]] = [
        [method.label, Number(score), Number(their)]
        for (method, _), score, their in zip(matched, scores, theirs, strict=True)
    ]
    rows.sort(key=lambda row: -(row[2].value or 0.0) if isinstance(row[2], Number) else 0.0)
    note = f"Agreement of the two orders: Kendall's tau {tau:.2f}, Spearman's rho {rho:.2f}, over {len(rows)} methods."
    return Table(f"order-{mode}", f"The paper's order, {mode}", ["method", "here", "paper's average"], rows, note)


def found_runs(runs: Sequence[Run], methods: Sequence[Method], mode: str) -> Table:
    """Make the table of all run directories that were found, with the unfinished ones."""
    labels = {run.path: method.label for method in methods for run in method.runs}
    root = Path(os.path.commonpath([run.path.resolve().parent for run in runs]))
    rows: list[list[Cell]] = []
    for run in runs:
        score: Cell = NOTHING if run.missing else Number(run.figures(mode).get(ALL, {}).get("exact_match"))
        seed = NOTHING if run.seed is None else str(run.seed)
        name = str(run.path.resolve().relative_to(root))
        rows.append([name, labels.get(run.path, run.name), seed, run.missing or "finished", score])
    columns = ["run directory", "method", "seed", "state", f"exact match, {mode}"]
    return Table("runs", "Runs", columns, rows, f"Directories in {root}.", printed=False)


def score_tables(methods: Sequence[Method], mode: str, groups: Sequence[str]) -> dict[str, np.ndarray]:
    """Exact match by seed and group of questions, [seeds, groups] for each method; without groups, of all questions."""
    return {
        method.label: np.stack([method.means(mode, group, "exact_match") for group in groups[1:] or groups], axis=1)
        for method in methods
    }


def _figures(method: Method, mode: str, groups: Sequence[str]) -> list[Cell]:
    cells: list[Cell] = [Number.of(method.exact_match(mode, group)) for group in groups]
    if groups[1:]:
        cells.append(Number.of(method.macro_exact_match(mode, groups[1:])))
    return [*cells, *(_mean(method.means(mode, ALL, figure), style) for figure, style in _REST)]


def reference_figures(methods: Sequence[Method], mode: str) -> dict[str, Mapping[str, Any]]:
    """Figures of the untrained models by group; they are the same in all runs that have evaluated them."""
    runs = [run for method in methods for run in method.runs]
    found = {model: next(filter(None, (run.figures(mode, model) for run in runs)), None) for model in REFERENCES}
    return {model: figures for model, figures in found.items() if figures}


def _reference_figures(figures: Mapping[str, Any], groups: Sequence[str]) -> list[Cell]:
    cells: list[Cell] = [Number.of(_untrained(figures, [group])) for group in groups]
    if groups[1:]:
        cells.append(Number.of(_untrained(figures, groups[1:])))
    return [*cells, *(Number(figures[ALL].get(figure), style=style) for figure, style in _REST)]


def _untrained(figures: Mapping[str, Any], groups: Sequence[str]) -> Estimate:
    """Mean exact match of some groups, with the interval over questions alone."""
    values = np.array([figures[group]["exact_match"] for group in groups])
    counts = np.array([figures[group]["n"] for group in groups])
    variance = float((values * (1 - values) / np.maximum(1, counts - 1)).sum()) / len(groups) ** 2
    return statistics.crossed(values.mean(keepdims=True), variance, int(counts.sum()))


def _mean(values: np.ndarray, style: str) -> Number:
    return Number(float(values.mean()) if values.size else None, style=style)


def _results_note(methods: Sequence[Method], mode: str, groups: Sequence[str]) -> str:
    run = methods[0].runs[0]
    sizes = ", ".join(f"{group} {run.figures(mode)[group]['n']}" for group in groups)
    return (
        f"Questions: {sizes}. Means with 95 % t intervals over seeds and questions (crossed); "
        "with one seed over questions alone, so they say nothing about another seed. F1, searches per episode and "
        "malformed turns are means."
    )


def _only_dataset(methods: Sequence[Method]) -> dict[str, str]:
    name = published.matching_dataset(methods[0].runs[0].data)
    return {ALL: name} if name else {}


def _published(base: str) -> Number:
    name = published.matching_method(base)
    return Number(published.PUBLISHED[name][published.AVERAGE] if name else None)


def _paper_rows(columns: Sequence[str], datasets: Mapping[str, str]) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for name, scores in published.PUBLISHED.items():
        by_column = {group: scores.get(dataset) for group, dataset in datasets.items()}
        by_column["paper's average"] = scores[published.AVERAGE]
        cells: list[Cell] = [Number(by_column[column]) if column in by_column else NOTHING for column in columns[2:]]
        rows.append([f"paper: {published.published_name(name)}", "1", *cells])
    return rows
