"""Comparing runs: every figure recomputed from the files, and what must not be compared."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import re
import sys
import types
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations, product
from itertools import pairwise as pairwise_of
from pathlib import Path
from typing import Any

import markdown
import numpy as np
import pytest
from made_runs import CONFIG, as_evaluated, make_run
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agentic_rag_env.errors import ConfigurationError, DataError
from algorithms import compare as command
from algorithms.analysis.comparison import arc_panel, pairwise, published, statistics
from algorithms.analysis.comparison.checks import check
from algorithms.analysis.comparison.curves import Line, curve, score_by_setting
from algorithms.analysis.comparison.figures import by_setting, cost_beside_score, probed
from algorithms.analysis.comparison.methods import Method, make_methods
from algorithms.analysis.comparison.page import Section, page
from algorithms.analysis.comparison.study import Options, compare, study, subtitle, write
from algorithms.analysis.comparison.style import DARK, LIGHT, looks, render
from algorithms.analysis.comparison.table_formats import Number, Table
from algorithms.analysis.runs import find_runs
from algorithms.training.settings import settings_without_effect

QUESTIONS = 40
COSTS = {
    "episodes": 96, "env_steps": 300, "sampled_tokens": 4000, "trained_tokens": 6000, "teacher_sampled_tokens": 1000,
    "teacher_scored_tokens": 1500, "rollout_s": 3.0, "score_s": 1.0, "update_s": 6.0, "demonstrations_s": 2.0,
}  # fmt: skip


def answers(chance: float, seed: int) -> dict[str, np.ndarray]:
    """Right or wrong, by mode of decoding; harder questions first."""
    rng = np.random.default_rng(seed)
    chances = np.clip(chance + np.linspace(-0.3, 0.3, QUESTIONS), 0, 1)
    return {mode: rng.random(QUESTIONS) < chances for mode in ("greedy", "T=1")}


def metrics(seed: int, steps: int = 3) -> list[dict]:
    return [
        {"step": step, "stage": "x", "dev/exact_match": 0.1 * step + 0.01 * seed, "rollout/exact_match": 0.2 * step,
         "time/rollout_s": 1.0, "time/score_s": 0.5, "time/update_s": 2.0 + seed, "cost/sampled_tokens": 10.0 * step,
         "cost/trained_tokens": 20.0 * step, "cost/env_steps": 7.0 * step}
        for step in range(1, steps + 1)
    ]  # fmt: skip


PROBED = {"thinking": {"exact_match": {"value": 0.4, "n": 40, "interval": [0.3, 0.5]},
                       "format_failures": {"value": 0.2, "n": 40, "interval": [0.1, 0.3]},
                       "gain": {"value": -0.1, "n": 40, "interval": [-0.2, 0.0]}},
          "search_behaviour": {"num_searches": {"value": 1.5, "n": 40, "interval": [1.4, 1.6]},
                               "searches_0": {"value": 0.1, "n": 40, "interval": [0.0, 0.2]}}}  # fmt: skip


@pytest.fixture(scope="module")
def truth():
    return {("kd", seed): answers(0.4, seed) for seed in range(3)} | {
        ("dgpo", seed): answers(0.75, 100 + seed) for seed in range(3)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, truth):
    root = tmp_path_factory.mktemp("runs")
    for (algo, seed), right in truth.items():
        path = root / algo / f"seed={seed}"
        make_run(path, algo, seed, right, costs=COSTS, metrics=metrics(seed), arc={algo: PROBED, "teacher": PROBED})
    return root


@pytest.fixture(scope="module")
def written(folder, tmp_path_factory):
    """Everything that one comparison writes, and what it prints."""
    out = tmp_path_factory.mktemp("comparison")
    terminal = Console(file=io.StringIO(), width=160)
    compare([folder], out, Options(resamples=50, with_paper=True), terminal)
    return out, terminal.file.getvalue()


def rows(out, name) -> list[dict[str, str]]:
    return list(csv.DictReader((out / f"{name}.csv").open(encoding="utf-8")))


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["greedy", "T=1"])
def test_the_table_of_results_is_what_the_answers_say(written, truth, mode):
    table = {row["method"]: row for row in rows(written[0], f"results-{mode}")}
    assert list(table) == ["dgpo", "kd", "raw", "teacher"]
    for algo in ("kd", "dgpo"):
        right = np.array([truth[algo, seed][mode] for seed in range(3)], dtype=float)
        even, odd = right[:, 0::2], right[:, 1::2]
        row = table[algo]
        assert row["seeds"] == "3"
        assert float(row["all"]) == pytest.approx(right.mean())
        assert float(row["single_hop"]) == pytest.approx(even.mean())
        assert float(row["multi_hop"]) == pytest.approx(odd.mean())
        assert float(row["mean of groups"]) == pytest.approx((even.mean() + odd.mean()) / 2)
        # Two variances, each with Student's quantile for its own degrees of freedom, written out.
        of_seeds = right.mean(axis=1).var(ddof=1) / 3
        of_questions = right.mean(axis=0).var(ddof=1) / QUESTIONS
        half = (4.302653**2 * of_seeds + stats.t.ppf(0.975, QUESTIONS - 1) ** 2 * of_questions) ** 0.5
        assert float(row["all (low)"]) == pytest.approx(max(0, right.mean() - half))
        assert float(row["all (high)"]) == pytest.approx(min(1, right.mean() + half))
        # Of a group, and of the mean of groups, likewise from their own questions.
        variances = [part.mean(axis=0).var(ddof=1) / part.shape[1] for part in (even, odd)]
        of_seeds = even.mean(axis=1).var(ddof=1) / 3
        half = (4.302653**2 * of_seeds + stats.t.ppf(0.975, even.shape[1] - 1) ** 2 * variances[0]) ** 0.5
        assert float(row["single_hop (high)"]) == pytest.approx(min(1, even.mean() + half))
        of_seeds = ((even.mean(axis=1) + odd.mean(axis=1)) / 2).var(ddof=1) / 3
        half = (4.302653**2 * of_seeds + stats.t.ppf(0.975, QUESTIONS - 1) ** 2 * sum(variances) / 4) ** 0.5
        assert float(row["mean of groups (low)"]) == pytest.approx(max(0, (even.mean() + odd.mean()) / 2 - half))
        assert float(row["F1"]) == 0.5
        assert float(row["malformed"]) == 0.125
    assert float(table["kd"]["paper's average"]) == 0.298
    assert float(table["raw"]["all"]) == 0
    assert float(table["raw"]["all (high)"]) == pytest.approx(1 - 0.025 ** (1 / QUESTIONS))  # Clopper and Pearson


def test_pairs_are_tested_on_the_same_questions(written, truth):
    (row,) = rows(written[0], "significance-greedy")
    kd, dgpo = (np.array([truth[algo, seed]["greedy"] for seed in range(3)], dtype=float) for algo in ("kd", "dgpo"))
    by_question = dgpo.mean(axis=0) - kd.mean(axis=0)
    assert (row["first"], row["second"]) == ("dgpo", "kd")
    assert float(row["difference"]) == pytest.approx(by_question.mean())
    signs = np.random.default_rng(0).choice([-1, 1], size=(20_000, QUESTIONS))
    drawn = np.abs((signs * by_question).mean(axis=1))
    expected = (drawn >= abs(by_question.mean()) - 1e-12).mean()
    assert float(row["p, policies"]) == pytest.approx(expected, abs=4 * (0.25 / 20_000) ** 0.5)
    # The seeds of both methods after Welch and Satterthwaite; the p-value is where the interval just holds 0.
    first, second = (x.mean(axis=1).var(ddof=1) / 3 for x in (kd, dgpo))
    freedom, of_questions = (first + second) ** 2 / (first**2 / 2 + second**2 / 2), by_question.var(ddof=1) / QUESTIONS
    tail = float(row["p, methods"]) / 2
    half = stats.t.isf(tail, freedom) ** 2 * (first + second) + stats.t.isf(tail, QUESTIONS - 1) ** 2 * of_questions
    assert half**0.5 == pytest.approx(abs(by_question.mean()))
    assert tail * 2 > float(row["p, policies"])
    assert row["at the 5 % level"] == "methods differ"


def test_costs_stand_beside_the_score(written):
    row = rows(written[0], "costs")[1]
    assert row["method"] == "kd"
    expected = {"env steps": 300, "sampled tokens": 4000, "trained tokens": 6000, "teacher tokens": 2500,
                "teacher share": 0.25, "training s": 10, "demos s": 2, "memory MB": 500}  # fmt: skip
    assert {name: float(row[name]) for name in expected} == expected


def test_a_kind_of_cost_that_no_method_has_is_not_drawn(tmp_path):
    spent = {"env_steps": 0, "trained_tokens": 6000}
    for seed in range(2):
        make_run(tmp_path / f"{seed}", "kd", seed, answers(0.5, seed), costs=spent)
    methods = make_methods(find_runs([tmp_path]))
    drawn = [each.name for each in cost_beside_score(methods, "greedy", {})]
    assert "cost-env_steps" not in drawn
    assert "cost-tokens" in drawn


def test_learning_curves_are_means_over_seeds_on_every_axis(folder, written):
    method = next(method for method in make_methods(find_runs([folder])) if method.label == "kd")
    for axis, x in (("steps", [1, 2, 3]), ("tokens", [30, 60, 90]), ("env_steps", [7, 14, 21]),
                    ("seconds", [4.5, 9, 13.5])):  # fmt: skip
        found = curve(method, "dev/exact_match", axis)
        assert found.x == pytest.approx(x)
        assert found.mean == pytest.approx([0.11, 0.21, 0.31])
        assert found.low == pytest.approx([0.1, 0.2, 0.3])
        assert found.high == pytest.approx([0.12, 0.22, 0.32])
    assert curve(method, "dev/num_searches", "steps") is None
    lines = rows(written[0], "curves")
    assert len(lines) == 6 * 3 * 2
    first_of_kd = {"method": "kd", "seed": "0", "metric": "dev/exact_match", "steps": "1", "tokens": "30.0",
                   "env_steps": "7.0", "seconds": "3.5", "value": "0.1"}  # fmt: skip
    assert lines[len(lines) // 2] == first_of_kd


def test_stages_of_different_length_lose_no_points(tmp_path):
    for seed, cold in enumerate((100, 96)):
        lines = [{"step": step, "stage": "kd", "dev/exact_match": 0.4} for step in range(20, cold + 1, 20)]
        lines += [{"step": cold + step, "stage": "dgpo", "dev/exact_match": 0.6} for step in (0, 10, 20) if step]
        lines.insert(-2, {"step": cold, "stage": "kd"})
        make_run(tmp_path / str(seed), "dgpo", seed, answers(0.5, seed), metrics=lines)
    (method,) = make_methods(find_runs([tmp_path]))
    found = curve(method, "dev/exact_match", "steps")
    assert found.x.tolist() == [20, 40, 60, 80, 108, 118]  # 10 and 20 steps after 100 and 96
    assert found.mean == pytest.approx([0.4] * 4 + [0.6] * 2)


def test_without_logged_costs_there_are_steps_and_seconds(tmp_path):
    lines = [{name: value for name, value in row.items() if not name.startswith("cost/")} for row in metrics(0)]
    make_run(tmp_path / "a", "kd", 0, answers(0.5, 0), metrics=lines)
    (method,) = make_methods(find_runs([tmp_path]))
    assert curve(method, "dev/exact_match", "tokens") is None
    assert curve(method, "dev/exact_match", "seconds").x == pytest.approx([3.5, 7, 10.5])


def test_the_panel_of_probes_tells_faults_from_merits(folder, written):
    panel = arc_panel.make_panel(make_methods(find_runs([folder])))
    assert panel.models == ("kd", "dgpo", "teacher")
    thinking = {metric: panel.weakness("kd", ("thinking", metric)) for metric in PROBED["thinking"]}
    assert thinking == pytest.approx({"exact_match": 0.6, "format_failures": 0.2, "gain": None})
    assert panel.weakness("kd", ("search_behaviour", "num_searches")) is None
    value, low, high = panel.estimates["kd", ("thinking", "exact_match")]
    se = 0.1 / 1.959964
    assert (value, low, high) == pytest.approx(
        (0.4, 0.4 - stats.t.ppf(0.975, 39) * se, 0.4 + stats.t.ppf(0.975, 39) * se)
    )
    assert ("search_behaviour", "searches_0") in panel.columns
    assert ("search_behaviour", "searches_0") not in panel.shortened().columns
    assert next(row["probe"] for row in rows(written[0], "arc")) == "thinking: exact match"


def test_a_number_of_searches_that_a_seed_never_made_counts_as_none(tmp_path):
    for seed, shares in enumerate(([0.5, 0.5], [0.4, 0.3, 0.3], [1.0])):
        figures = {f"searches_{j}": {"value": x, "n": 40, "interval": [x, x]} for j, x in enumerate(shares)}
        made = {"kd": {"search_behaviour": figures}}
        make_run(tmp_path / str(seed), "kd", seed, answers(0.5, seed), arc=made)
    panel = arc_panel.make_panel(make_methods(find_runs([tmp_path])))
    means = [panel.estimates["kd", ("search_behaviour", f"searches_{j}")][0] for j in range(3)]
    assert means == pytest.approx([1.9 / 3, 0.8 / 3, 0.1])
    # Nor is it unknown where another method alone has made so many.
    made = {"search_behaviour": {"searches_0": figures["searches_0"]}, "thinking": {"gain": figures["searches_0"]}}
    make_run(tmp_path / "other", "dgpo", 0, answers(0.5, 0), arc={"dgpo": made})
    panel = arc_panel.make_panel(make_methods(find_runs([tmp_path])))
    assert [panel.estimates["dgpo", ("search_behaviour", f"searches_{j}")].value for j in range(3)] == [1.0, 0.0, 0.0]
    assert ("kd", ("thinking", "gain")) not in panel.estimates


@pytest.mark.parametrize("name", ["too_long", "absent_too_long", "distractors_too_long", "search_failed"])
def test_what_went_wrong_for_one_seed_alone_counts_as_none_for_the_others(tmp_path, name):
    figure = {"value": 0.3, "n": 40, "interval": [0.2, 0.4]}
    for seed in range(4):
        shares = {"exact_match": figure} | ({name: figure, "exact_match_well_formed": figure} if seed == 0 else {})
        made = {"kd": {"source_referencing": shares} if seed < 3 else {}}  # the last one was not probed
        make_run(tmp_path / str(seed), "kd", seed, answers(0.5, seed), arc=made)
    panel = arc_panel.make_panel(make_methods(find_runs([tmp_path])))
    assert panel.estimates["kd", ("source_referencing", name)].value == pytest.approx(0.1)
    assert panel.estimates["kd", ("source_referencing", "exact_match_well_formed")].value == pytest.approx(0.3)


def made_figure(value: float, **declared: Any) -> dict:
    return {"value": value, "n": 40, "interval": [value, value], **declared}


def test_a_figure_is_judged_by_what_its_probe_declares(tmp_path):
    declared = {
        "seconds": made_figure(30.0, best="low", share=False),
        "mean_rank": made_figure(2.5, best="low", share=False),
        "failures": made_figure(0.7, best="high", share=True),  # whatever its name ends with
        "gain": made_figure(0.25, best="low", share=True),
        "colour": made_figure(0.5, best=None, share=True),
    }
    make_run(tmp_path / "a", "kd", 0, answers(0.5, 0), arc={"kd": {"own": declared}})
    panel = arc_panel.make_panel(make_methods(find_runs([tmp_path])))
    weakness = {name: panel.weakness("kd", ("own", name)) for name in declared}
    assert weakness == {
        "seconds": None, "mean_rank": None, "failures": pytest.approx(0.3), "gain": 0.25, "colour": None
    }  # fmt: skip
    table = {row[0]: row[1] for row in panel.table("arc", "ARC panel").rows}
    assert table == {"own: seconds": "low", "own: mean rank": "low", "own: failures": "high", "own: gain": "low",
                     "own: colour": "–"}  # fmt: skip
    assert panel.estimates["kd", ("own", "seconds")] == pytest.approx((30, 30, 30))


def test_figures_of_old_runs_are_known_by_name_and_those_of_plug_ins_have_no_direction(tmp_path):
    figures = {name: made_figure(0.5) for name in ("exact_match", "format_failures", "gain", "searched", "seconds")}
    arc = {"kd": {"thinking": figures, "own": figures}}
    make_run(tmp_path / "a", "kd", 0, answers(0.5, 0), arc=arc)
    panel = arc_panel.make_panel(make_methods(find_runs([tmp_path])))
    best = {column: meaning.best for column, meaning in panel.meanings.items()}
    assert {name: best["thinking", name] for name in ("exact_match", "format_failures", "gain", "searched")} == {
        "exact_match": "high", "format_failures": "low", "gain": None, "searched": None
    }  # fmt: skip
    assert {best["own", name] for name in figures} == {None}
    newer = {"thinking": {"gain": made_figure(0.5, best="high", share=False)}}
    make_run(tmp_path / "b", "dgpo", 0, answers(0.5, 0), arc={"dgpo": newer})
    panel = arc_panel.make_panel(make_methods(find_runs([tmp_path])))
    assert panel.meanings["thinking", "gain"] == ("high", False)


def test_weak_points_are_where_the_teacher_is_ahead(tmp_path):
    directions = {"hit": {"best": "high", "share": True}, "malformed": {"best": "low", "share": True}}

    def probed(**values: float) -> dict:
        return {"p": {name: made_figure(value, **directions.get(name, {})) for name, value in values.items()}}

    arc_of = {"kd": probed(hit=0.5, malformed=0.3, num_searches=9), "teacher": probed(hit=0.6, malformed=0.0)}
    make_run(tmp_path / "a", "kd", 0, answers(0.5, 0), arc=arc_of)
    make_run(tmp_path / "b", "dgpo", 0, answers(0.9, 1), arc={"dgpo": probed(hit=0.58), "teacher": arc_of["teacher"]})
    panel = arc_panel.make_panel(make_methods(find_runs([tmp_path])))
    assert panel.weak_points().rows == [["kd", "malformed 0.30 (0.00); hit 0.50 (0.60)"], ["dgpo", "–"]]
    # Nothing out of 40 is no certainty: Clopper and Pearson.
    assert panel.estimates["teacher", ("p", "malformed")] == pytest.approx((0, 0, 1 - 0.025 ** (1 / 40)))
    assert panel.estimates["kd", ("p", "num_searches")] == pytest.approx((9, 9, 9))
    cells = {row[0]: row[2].shade for row in panel.table("arc", "ARC panel").rows}
    assert cells == {"p: hit": pytest.approx(0.1), "p: malformed": pytest.approx(0.3), "p: num searches": None}
    del arc_of["teacher"]
    make_run(tmp_path / "alone" / "c", "kd", 0, answers(0.5, 0), arc=arc_of)
    alone = arc_panel.make_panel(make_methods(find_runs([tmp_path / "alone"])))
    assert alone.weak_points().rows == [["kd", "hit 0.50; malformed 0.30"]]


# --- statistics against independent oracles --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rliable():
    """The reference implementation; its bootstrap without the rest of `arch`, which needs another pandas."""
    if "arch" not in sys.modules:
        stand_in = types.ModuleType("arch")
        stand_in.__path__ = list(importlib.util.find_spec("arch").submodule_search_locations)
        sys.modules["arch"] = stand_in
    from rliable import library, metrics

    return library, metrics


SCORES = {
    "a": np.array([[0.1, 0.5], [0.3, 0.7], [0.2, 0.9], [0.6, 0.5]]),
    "b": np.array([[0.2, 0.4], [0.3, 0.1], [0.5, 0.3]]),
}


def test_aggregates_agree_with_rliable(rliable):
    library, metrics = rliable
    np.random.seed(0)  # rliable draws from the global generator
    points, bounds = library.get_interval_estimates(
        {"a": SCORES["a"]}, lambda table: np.array([metrics.aggregate_iqm(table)]), reps=2000
    )
    found = statistics.interquartile_mean(SCORES["a"], 4000)
    assert found.value == pytest.approx(points["a"][0])
    assert (found.low, found.high) == pytest.approx(tuple(bounds["a"][:, 0]), abs=0.02)
    pair = [SCORES["a"], SCORES["b"]]
    points, bounds = library.get_interval_estimates(
        {"ab": pair}, lambda a, b: np.array([metrics.probability_of_improvement(a, b)]), reps=400
    )
    found = statistics.probability_of_improvement(*pair, 4000)
    assert found.value == pytest.approx(points["ab"][0])
    assert (found.low, found.high) == pytest.approx(tuple(bounds["ab"][:, 0]), abs=0.06)
    thresholds = np.array([0.0, 0.25, 0.5, 0.8])
    points, bounds = library.create_performance_profile({"a": SCORES["a"]}, thresholds, reps=400)
    found = statistics.performance_profile(SCORES["a"], thresholds, 2000)
    assert found[0] == pytest.approx(points["a"])
    assert found[1:] == pytest.approx(bounds["a"], abs=0.13)  # a step of 1/8


def test_by_hand():
    assert statistics.interquartile_mean(np.array([[0.0, 0.2], [0.4, 1.0]]), 10).value == pytest.approx(0.3)
    # Group 1: 2 of 4 pairs above, 1 tie; group 2: all above.
    first, second = np.array([[0.5, 0.9], [0.7, 0.8]]), np.array([[0.5, 0.1], [0.6, 0.2]])
    assert statistics.probability_of_improvement(first, second, 10).value == pytest.approx((2.5 / 4 + 1) / 2)
    assert statistics.interquartile_mean(SCORES["a"][:1], 10).low is None


@pytest.mark.parametrize("seed", range(5))
def test_the_sign_flip_test_is_exact(seed):
    rng = np.random.default_rng(seed)
    differences = rng.integers(-3, 4, size=10)
    observed = abs(differences.sum())
    every = [abs(np.dot(signs, differences)) >= observed for signs in product((-1, 1), repeat=10)]
    assert statistics.sign_flip_p_value(differences) == pytest.approx(np.mean(every))


def test_between_single_runs_it_is_mcnemars_test():
    first, second = np.array([1] * 9 + [0] * 2 + [1] * 5, bool), np.array([0] * 9 + [1] * 2 + [1] * 5, bool)
    found = statistics.paired(first[None], second[None])
    assert found.p_questions == pytest.approx(stats.binomtest(9, 11).pvalue)
    assert found.p_methods is None
    assert found.difference.value == pytest.approx(7 / 16)


def test_of_many_questions_it_is_still_exact():
    """With one size of difference it is the binomial test; 20,000 questions take the way over Fourier transforms."""
    differences = np.repeat([2, -2, 0], [10_200, 9_800, 5_000])
    assert statistics.sign_flip_p_value(differences) == pytest.approx(stats.binomtest(9_800, 20_000).pvalue, abs=1e-9)
    mixed = np.concatenate([differences, np.repeat([1, -1], [4_000, 4_000]), np.repeat([3, -3], [3_000, 3_000])])
    # The sum of so many independent signs is normal: sd of the sum from the squares, half a step of continuity.
    z = (mixed.sum() - 0.5) / np.sqrt((mixed.astype(float) ** 2).sum())
    assert statistics.sign_flip_p_value(mixed) == pytest.approx(2 * stats.norm.sf(z), rel=0.01)


def test_where_nothing_varies_doubt_remains():
    """Four questions that one method always answers and the other never: a sign test of 4 and no more."""
    always, never = np.ones((3, 4), bool), np.zeros((3, 4), bool)
    found = statistics.paired(always, never)
    assert found.p_questions == found.p_methods == pytest.approx(2 * 0.5**4)
    # A fifth question may differ by -1 with a chance of up to 1 - 0.025^(1/4) = 0.602.
    assert found.difference == pytest.approx((1.0, 1 - 2 * 0.60236, 1.0), abs=1e-4)
    same = statistics.paired(never, never)
    assert same.difference == pytest.approx((0.0, -0.60236, 0.60236), abs=1e-4)
    assert same.p_methods == 1.0
    thirds = np.eye(3, dtype=bool)  # each question right with one seed of three
    assert statistics.paired(thirds, np.zeros((3, 3), bool)).difference.low < 0


def answers_of(means: list[float], count: int = 100) -> np.ndarray:
    """So many questions answered by each seed, the first ones right, [seeds, questions]."""
    return np.arange(count) < count * np.array(means)[:, None]


def test_methods_with_the_same_seeds_are_compared_seed_by_seed():
    first, second = answers_of([0.30, 0.52, 0.71]), answers_of([0.27, 0.50, 0.67])
    independent, by_seed = statistics.paired(first, second), statistics.paired(first, second, by_seed=True)
    # Differences .03, .02 and .04: variance 1e-4 over 3 seeds. Nine questions have a difference of a third.
    questions = (9 / 9 - 9**2 / 9 / 100) / 99 / 100
    seeds = 1e-4 / 3
    half = (stats.t.ppf(0.975, 99) ** 2 * questions + stats.t.ppf(0.975, 2) ** 2 * seeds) ** 0.5
    assert by_seed.difference == pytest.approx((0.03, 0.03 - half, 0.03 + half))
    tail = by_seed.p_methods / 2
    assert stats.t.isf(tail, 99) ** 2 * questions + stats.t.isf(tail, 2) ** 2 * seeds == pytest.approx(0.03**2)
    # As independent seeds their spread of 0.2 hides the difference.
    assert independent.difference.low < -0.4
    assert independent.p_methods > 0.8
    assert independent.p_questions == by_seed.p_questions


@pytest.mark.parametrize(("seeds", "by_seed"), [((0, 1, 2), True), ((0, 1, 3), False), ((None, 1, 2), False)])
def test_only_the_same_seeds_are_pairs(tmp_path, seeds, by_seed):
    right = {"dgpo": answers_of([0.30, 0.52, 0.71]), "kd": answers_of([0.27, 0.50, 0.67])}
    for algo, own in (("dgpo", (0, 1, 2)), ("kd", seeds)):
        for number, seed in enumerate(own):
            make_run(tmp_path / algo / str(number), algo, seed, {"greedy": right[algo][number]})
    ((_, _, found),) = pairwise.compare_pairs(study([tmp_path], Options(resamples=10)).methods, "greedy")
    expected = statistics.paired(right["dgpo"], right["kd"], by_seed=by_seed)
    assert found.difference == pytest.approx(expected.difference)
    assert found.p_methods == pytest.approx(expected.p_methods)


def pair(first, second, p_questions, p_methods=None) -> pairwise.Pair:
    return pairwise.Pair(first, second, statistics.Paired(statistics.Estimate(0.1), p_questions, p_methods))


def test_methods_that_share_a_letter_are_not_told_apart():
    # a and c differ, and both from d; b is like a and like c.
    found = [pair("a", "b", 0.5), pair("a", "c", 0.001), pair("b", "c", 0.9), pair("a", "d", 1e-6),
             pair("b", "d", 1e-6), pair("c", "d", 1e-6)]  # fmt: skip
    assert pairwise.letters("abcd", found) == {"a": "a", "b": "ab", "c": "b", "d": "c"}
    assert pairwise.letters("ab", [pair("a", "b", 1e-6)]) == {"a": "a", "b": "b"}
    assert pairwise.letters("abc", [pair("a", "b", 0.5), pair("a", "c", 1e-6)]) == {}, "b and c were not compared"
    assert pairwise.letters("a", []) == {}
    # With several seeds it is they that count.
    assert pairwise.letters("ab", [pair("a", "b", 1e-6, 0.2)]) == {"a": "a", "b": "a"}
    rng = np.random.default_rng(0)
    for _ in range(20):  # by definition: a shared letter if and only if the pair is not told apart
        every = [pair(*two, rng.choice([1e-9, 0.9])) for two in combinations("abcdefg", 2)]
        shown = pairwise.letters("abcdefg", every)
        for each in every:
            assert bool(set(shown[each.first]) & set(shown[each.second])) == (each.found.p_questions > 0.5)


def test_holm():
    # By hand: 4 x 0.01, then 3 x 0.02, then 2 x 0.03 and 0.04, none below the one before.
    assert statistics.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.1])
@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(seeds, spread):
    """Seeds and questions both drawn anew: 95 % of the intervals hold the true mean, whatever most of the noise is."""
    rng, held, trials = np.random.default_rng(0), 0, 400
    for _ in range(trials):
        chance = np.clip(0.5 + spread * rng.normal(size=(seeds, 1)) + 0.25 * rng.normal(size=(1, 100)), 0, 1)
        right = rng.random((seeds, 100)) < chance
        by_seed, by_question = right.mean(axis=1), right.mean(axis=0)
        _, low, high = statistics.crossed(by_seed, by_question.var(ddof=1) / 100, 100)
        held += low <= 0.5 <= high
    assert 0.93 <= held / trials <= 1.0


def test_two_seeds_raise_no_more_false_alarms_than_the_level_says():
    rng, alarms, trials = np.random.default_rng(0), 0, 400
    for _ in range(trials):
        chance = rng.uniform(0.2, 0.8, size=200)
        shift = 0.07 * rng.normal(size=(2, 2, 1))
        first, second = rng.random((2, 2, 200)) < np.clip(chance + shift, 0, 1)
        found = statistics.paired(first, second, by_seed=True)
        assert (found.p_methods < 0.05) <= (not found.difference.low <= 0 <= found.difference.high)
        alarms += found.p_methods < 0.05
    assert alarms / trials < 0.065


def test_a_p_value_is_that_of_the_interval_that_just_holds_zero():
    # By hand: variance between seeds alone, so Student's t of the seeds' differences.
    first = np.array([[True] * 60 + [False] * 40, [True] * 70 + [False] * 30, [True] * 66 + [False] * 34])
    second = np.zeros_like(first)
    second[:, :50] = True
    parts = statistics._between_seeds(first.mean(axis=1) - second.mean(axis=1))
    found = statistics._t_p_value(float(first.mean() - second.mean()), parts)
    assert found == pytest.approx(stats.ttest_rel(first.mean(axis=1), second.mean(axis=1)).pvalue)
    assert statistics._t_p_value(0.0, parts) == 1.0
    assert statistics._t_p_value(0.5, [statistics._Part(1e-8, 10**6)]) == 0.0


def test_rank_agreement():
    tau, rho = statistics.rank_agreement([1, 2, 3, 4], [1, 2, 4, 3])
    assert tau == pytest.approx((5 - 1) / 6)
    assert rho == pytest.approx(1 - 6 * 2 / (4 * 15))


# --- the published figures -------------------------------------------------------------------------------------------


def test_the_papers_averages_are_the_means_of_its_datasets():
    for name, scores in published.PUBLISHED.items():
        found = [scores[dataset] for dataset in published.DATASETS if dataset in scores]
        if len(found) == len(published.DATASETS):
            assert np.mean(found) == pytest.approx(scores[published.AVERAGE], abs=6e-4), name


def test_the_papers_rows_stand_beside_ours_where_the_dataset_is_the_same(tmp_path):
    groups = ("nq", "HotpotQA", "ours")
    make_run(tmp_path / "a", "kd", 0, answers(0.5, 0), groups=groups)
    (table, *_) = study([tmp_path], Options(resamples=10)).tables
    row = next(row for row in table.rows if row[0] == "paper: DGPO")
    cells = dict(zip(table.columns, row, strict=True))
    assert (cells["nq"].value, cells["HotpotQA"].value, cells["paper's average"].value) == (0.378, 0.342, 0.329)
    assert cells["ours"] == cells["all"] == "–"


@pytest.mark.parametrize(
    ("dataset", "data", "score"),
    [
        ({"name": "benchmark", "subset": "nq"}, "nq", 0.378),
        ({"name": "nq"}, "nq", 0.378),
        ({"name": "mixture", "sources": {"nq": {"name": "benchmark"}, "ours": {"name": "jsonl"}}}, "nq + ours", None),
        (None, "unknown", None),
    ],
)
def test_a_benchmark_is_named_by_its_subset_and_a_mixture_by_its_sources(tmp_path, dataset, data, score):
    make_run(tmp_path / "a", "kd", 0, answers(0.5, 0), groups=["all"], config={"dataset": dataset})
    found = study([tmp_path], Options(resamples=10))
    assert f"Data: {data}, {QUESTIONS} test questions" in subtitle(found.methods)
    of_paper = {row[0]: row[2].value for row in found.tables[0].rows if str(row[0]).startswith("paper")}
    assert of_paper.get("paper: DGPO") == score


def test_the_order_is_compared_with_the_papers(written):
    text = (written[0] / "comparison.md").read_text()
    assert "Kendall's tau 1.00, Spearman's rho 1.00, over 2 methods" in text


# --- the score by a setting ------------------------------------------------------------------------------------------


def test_points_of_a_line_share_their_variance_between_seeds(tmp_path):
    """Two seeds .1, .02, .1, .0 and .06 apart, and a point with one seed."""
    scores = {1: (0.5, 0.6), 2: (0.54, 0.56), 3: (0.5, 0.6), 4: (0.55, 0.55), 5: (0.5, 0.56), 6: (0.55,)}
    for value, of_seeds in scores.items():
        for seed, score in enumerate(of_seeds):
            right = {"greedy": np.arange(100) < round(100 * score)}
            make_run(tmp_path / f"{value}-{seed}", "kd", seed, right, settings={"x": value}, groups=["all"])
    (line,) = score_by_setting(find_runs([tmp_path]), ["algo.x"], "greedy")
    assert [tuple(by_seed) for by_seed in line.by_seed] == list(scores.values())
    # Pooled: half of the squares of the distances, over five degrees of freedom; each with its own questions.
    variance = (0.1**2 + 0.02**2 + 0.1**2 + 0.06**2) / 2 / 5
    for (value, of_seeds), score in zip(scores.items(), line.scores, strict=True):
        by_question = np.mean([np.arange(100) < round(100 * each) for each in of_seeds], axis=0)
        of_questions = stats.t.ppf(0.975, 99) ** 2 * by_question.var(ddof=1) / 100
        half = (stats.t.ppf(0.975, 5) ** 2 * variance / len(of_seeds) + of_questions) ** 0.5
        assert score == pytest.approx((np.mean(of_seeds), np.mean(of_seeds) - half, np.mean(of_seeds) + half)), value
    widths = [score.high - score.low for score in line.scores]
    assert max(widths[:5]) < 1.2 * min(widths[:5])
    assert widths[5] > max(widths[:5])


def test_none_right_is_no_certainty_however_alike_the_seeds_of_other_settings_are():
    none, some = np.zeros(3), np.array([0.001, 0.002, 0.001])
    found = statistics.crossed(none, 0.0, 600, alike=[none, some])
    assert (found.low, found.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 600)))


def test_settings_with_zero_are_told_apart_on_their_axis():
    values = (0.0, 0.0005, 0.001, 0.002, 0.005, 0.02)
    scores = tuple(statistics.Estimate(0.5, 0.4, 0.6) for _ in values)
    lines = [Line(label, label, values, scores, (np.array([0.45, 0.55]),) * 6) for label in ("dgpo", "ppo")]
    drawing = by_setting(lines, "kl coef", "greedy", looks([Method(line.label, line.base, ()) for line in lines]))
    colors = [look.color for look in drawing.legend.values()]
    figure = Figure(figsize=drawing.size, layout="constrained")
    axes = figure.add_subplot()
    drawing.draw(axes, LIGHT)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.0005", "0.001", "0.002", "0.005", "0.02"]
    assert all(left.x1 < right.x0 for left, right in pairwise_of(boxes))
    # Marks of two methods at the same value stand side by side.
    first, second = (next(line.get_xdata() for line in axes.lines if line.get_color() == of) for of in colors)
    assert np.all(first < second)


# --- which runs make a method ----------------------------------------------------------------------------------------


def test_methods_are_told_apart_by_what_differs(tmp_path):
    right = answers(0.5, 0)
    for count, seed in product((50, 100), (0, 1)):
        make_run(tmp_path / f"kd{count}-{seed}", "kd", seed, right, settings={"num_demonstrations": count},
                 overrides=[f"algo.num_demonstrations={count}", f"seed={seed}"])  # fmt: skip
        start = {"warm_start": {"name": "kd", "num_demonstrations": count}, "steps": count}
        make_run(tmp_path / f"dgpo{count}-{seed}", "dgpo", seed, right, settings=start,
                 overrides=[f"algo.warm_start.num_demonstrations={count}"])  # fmt: skip
    make_run(tmp_path / "x", "dgpo", 0, right, settings={"selective": False}, overrides=["+method=uniform_kl"])
    methods = make_methods(find_runs([tmp_path]))
    assert [method.label for method in methods] == [
        "kd (num_demonstrations=50)", "kd (num_demonstrations=100)", "dgpo (num_demonstrations=50)",
        "dgpo (num_demonstrations=100)", "uniform_kl",
    ]  # fmt: skip
    assert [method.seeds for method in methods] == [[0, 1]] * 4 + [[0]]
    names = ("algo.num_demonstrations", "algo.warm_start.num_demonstrations")
    plain = [run for run in find_runs([tmp_path]) if run.name != "uniform_kl"]
    lines = score_by_setting(plain, names, "greedy")
    # The steps differ as well and are no seed: one line each.
    assert [(line.base, line.x) for line in lines] == [("kd", (50, 100)), ("dgpo", (50,)), ("dgpo", (100,))]
    assert lines[0].scores[0].value == pytest.approx(right["greedy"].mean())


@pytest.mark.parametrize(
    ("places", "labels"),
    [
        (["/runs/dgpo/checkpoints/000450", "/runs/kd/checkpoints/000450"], ["dgpo@000450", "kd@000450"]),
        (["runs/kd/checkpoints/000300", "runs/kd/checkpoints/000450"], ["kd@000300", "kd@000450"]),
        (["HuggingFaceTB/SmolLM2-135M", "/models/mine/v2"], ["HuggingFaceTB/SmolLM2-135M", "v2"]),
        (["/a/b/x/kd/checkpoints/000450", "/a/b/y/kd/checkpoints/000450"],
         ["kd@000450 (policy=x/kd/checkpoints/000450)", "kd@000450 (policy=y/kd/checkpoints/000450)"]),
    ],
)  # fmt: skip
def test_checkpoints_that_were_evaluated_are_told_apart(tmp_path, places, labels):
    for number, place in enumerate(places):
        as_evaluated(make_run(tmp_path / str(number), "kd", 0, answers(0.5, number)), place)
    assert sorted(method.label for method in make_methods(find_runs([tmp_path]))) == sorted(labels)


def evaluated(
    folder: Path, method: str, seed: int, right, step: str = "000450", is_last: bool = True, **changed
) -> None:
    """Make the directory of an evaluation of a run's checkpoint on tiny; `changed` is what its training had otherwise.

    The command line named the method. Each seed's run lies in a place of its own.
    """
    config = {**CONFIG, "algo": {"name": "dgpo", "kl_coef": 0.01}, "seed": seed, **changed}
    trained = {"config": config, "overrides": [f"+method={method}", f"seed={seed}"], "is_last": is_last}
    run = make_run(folder, method, seed, right)
    as_evaluated(run, f"/runs/method-{method}+seed-{seed}/checkpoints/{step}", trained)


def test_seeds_of_evaluated_checkpoints_are_those_of_their_runs(tmp_path):
    """A comparison of the runs' checkpoints says what that of the runs themselves says of the same answers."""
    for algo, chance in (("uniform_kl", 0.4), ("no_penalty", 0.75)):
        for seed in range(3):
            right = answers(chance, 10 * seed + len(algo))
            make_run(tmp_path / "runs" / f"{algo}{seed}", algo, seed, right)
            evaluated(tmp_path / "evaluated" / f"{algo}{seed}", algo, seed, right)
    runs, checkpoints = (study([tmp_path / part], Options(resamples=10)) for part in ("runs", "evaluated"))
    for found in (runs, checkpoints):
        assert [(method.label, method.seeds) for method in found.methods] == [
            ("no_penalty", [0, 1, 2]), ("uniform_kl", [0, 1, 2]),
        ]  # fmt: skip
    first, second = ({table.name: table.records() for table in found.tables} for found in (runs, checkpoints))
    for name in ("significance-greedy", "significance-T=1"):
        assert first[name] == second[name]
        assert second[name][0]["p, methods"] is not None


def test_settings_of_the_training_belong_to_its_checkpoint(tmp_path):
    for value, seed in product((0.01, 0.1), range(2)):
        algo = {"name": "dgpo", "kl_coef": value}
        evaluated(tmp_path / f"{value}-{seed}", "dgpo", seed, answers(0.5, seed), algo=algo)
    other = {"name": "tiny", "num_passages": 150}
    evaluated(tmp_path / "other data", "dgpo", 0, answers(0.5, 0), dataset=other)
    methods = make_methods(find_runs([tmp_path]))
    assert sorted(method.seeds for method in methods) == [[0], [0, 1], [0, 1]]
    assert any("trained on other data" in finding.text and "150 in" in finding.text for finding in check(methods))
    (line, _) = score_by_setting(find_runs([tmp_path]), ["algo.kl_coef"], "greedy")
    assert (line.x, [len(each) for each in line.by_seed]) == ((0.01, 0.1), [2, 2])


def test_checkpoints_of_one_run_stay_apart(tmp_path):
    for step, seed in product(("000300", "000450"), range(2)):
        evaluated(tmp_path / f"{step}-{seed}", "dgpo", seed, answers(0.5, seed), step, is_last=step == "000450")
    methods = make_methods(find_runs([tmp_path]))
    assert [(method.label, method.seeds) for method in methods] == [("dgpo", [0, 1]), ("dgpo@000300", [0, 1])]


@pytest.mark.parametrize("is_told", [False, True], ids=["older summaries", "summaries that name them"])
def test_what_says_only_how_a_run_is_carried_out_makes_no_method(tmp_path, is_told):
    one = {"cache_dir": "/here", "threads": 2, "checkpoint_every": 5, "keep_checkpoints": None, "probe_every": 10}
    other = {"cache_dir": "/there", "resume": "/there/run", "keep_checkpoints": 1}
    for seed, config in enumerate((one, other, {})):
        folder = make_run(tmp_path / f"{seed}", "kd", seed, answers(0.5, seed), config=config)
        if is_told:
            summary = json.loads((folder / "summary.json").read_text())
            summary["settings_without_effect"] = sorted(settings_without_effect())
            (folder / "summary.json").write_text(json.dumps(summary))
    (method,) = make_methods(find_runs([tmp_path]))
    assert (method.label, method.seeds) == ("kd", [0, 1, 2])
    make_run(tmp_path / "3", "kd", 3, answers(0.5, 3), config={"num_envs": 8})
    assert sorted(method.seeds for method in make_methods(find_runs([tmp_path]))) == [[0, 1, 2], [3]]


def test_probes_make_no_other_method(tmp_path):
    for seed, probes in enumerate((["thinking", "search_behaviour"], [])):
        make_run(tmp_path / str(seed), "kd", seed, answers(0.5, seed), config={"probes": probes})
    (method,) = make_methods(find_runs([tmp_path]))
    assert method.seeds == [0, 1]


# --- unfinished, single, incomparable --------------------------------------------------------------------------------


def test_unfinished_runs_are_told(tmp_path):
    make_run(tmp_path / "done", "kd", 0, answers(0.5, 0))
    make_run(tmp_path / "killed", "dgpo", 1, {}, finished=False, metrics=metrics(1))
    broken = make_run(tmp_path / "broken", "kd", 2, answers(0.5, 0))
    (broken / "summary.json").write_text('{"algo": "kd"')
    found = study([tmp_path], Options(resamples=10))
    runs = {str(row[0]): row for row in found.tables[-1].rows}
    assert runs["killed"][1:4] == ["dgpo", "1", "unfinished: no summary.json, stopped after step 3"]
    assert "summary.json is damaged" in runs["broken"][3]
    told = " ".join(finding.text for finding in found.findings)
    assert f"2 of 3 runs are left out: {tmp_path / 'broken'} (" in told
    assert f"{tmp_path / 'killed'} (unfinished: no summary.json, stopped after step 3)" in told


def test_nothing_finished_and_nothing_at_all(tmp_path):
    make_run(tmp_path / "killed", "dgpo", 1, {}, finished=False)
    with pytest.raises(ConfigurationError, match=r"No run is finished: .*killed: unfinished"):
        study([tmp_path], Options())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="holds no run"):
        study([tmp_path / "empty"], Options())
    with pytest.raises(ConfigurationError, match="is no folder"):
        study([tmp_path / "absent"], Options())


def test_a_single_seed_says_nothing_about_another(tmp_path):
    first, second = answers(0.2, 0), answers(0.8, 1)
    make_run(tmp_path / "a", "kd", 0, first)
    make_run(tmp_path / "b", "dgpo", 0, second)
    found = {table.name: table for table in study([tmp_path], Options(resamples=10)).tables}
    row = found["results-greedy"].rows[1]
    mean, count = first["greedy"].mean(), QUESTIONS
    half = stats.t.ppf(0.975, count - 1) * (mean * (1 - mean) / (count - 1)) ** 0.5
    assert row[2].low == pytest.approx(max(0, mean - half))
    assert "one seed" in found["results-greedy"].note
    assert found["iqm-greedy"].rows[0][2].low is None
    (pair,) = found["significance-greedy"].rows
    assert not pair[5].known
    assert pair[7] == "these policies differ; one seed can't tell about methods"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"config": {"dataset": {"name": "tiny", "seed": 1}}, "fingerprints": {"questions": "9f"}},
            "other questions .*: dataset.seed is 1 in kd, but 0 in dgpo",
        ),
        (
            {"config": {"env": {"name": "agentic_rag", "max_turns": 2, "top_k": 3}}},
            "environment: env.max_turns is 2 in kd, but 4 in dgpo",
        ),
        (
            {"config": {"retriever": {"name": "bm25", "k1": 1.5}}, "fingerprints": {"retriever": "9f"}},
            "another retriever: retriever.k1 is 1.5 in kd, but 0.9 in dgpo",
        ),
        ({"config": {"reward": {"name": "f1"}}}, "another reward: reward.name is f1 in kd, but exact_match in dgpo"),
        (
            {"config": {"rollout": {"temperature": 0.5}}},
            "other decoding: rollout.temperature is 0.5 in kd, but 1.0 in dgpo",
        ),
        ({"fingerprints": {"corpus": "9f"}}, "another corpus: the fingerprint is 9f in kd, but 3c in dgpo"),
        ({"fingerprints": {"retriever": "9f"}}, "another way to search them: the fingerprint is 9f in kd, but 4d in"),
        ({"fingerprints": {"questions": "9f"}}, "other test questions: the fingerprint is 9f in kd, but 1a in dgpo"),
        (
            {"fingerprints": {"training_questions": "9f"}},
            "other training questions: the fingerprint is 9f in kd, but 2b in dgpo",
        ),
        ({"prefix": "p"}, "80 test questions, greedy, of dgpo .* are not those of kd"),
    ],
)
def test_runs_that_are_not_comparable_are_refused(tmp_path, change, expected):
    make_run(tmp_path / "a", "dgpo", 0, answers(0.5, 0))
    make_run(tmp_path / "b", "kd", 0, answers(0.5, 1), **change)
    with pytest.raises(ConfigurationError, match=f"(?s)not comparable:.*{expected}.*--force"):
        study([tmp_path], Options())
    forced = study([tmp_path], Options(force=True, resamples=10))
    assert any(finding.refuses for finding in forced.findings)


def elsewhere(**fingerprints):
    """The change of a run whose files lie elsewhere."""
    config = {"dataset": {"name": "jsonl", "corpus": "/there"}, "retriever": {"name": "bm25", "k1": 0.9, "cache": "/x"}}
    return {"config": config, "fingerprints": fingerprints}


def test_the_same_data_in_another_place_are_the_same(tmp_path):
    make_run(tmp_path / "a", "dgpo", 0, answers(0.5, 0))
    make_run(tmp_path / "b", "kd", 0, answers(0.5, 1), **elsewhere())
    told = [finding for finding in check(make_methods(find_runs([tmp_path]))) if "agree" in finding.text]
    assert not any(finding.refuses for finding in told)
    texts = [finding.text for finding in told]
    assert "the fingerprints of the data agree, although dataset.corpus is /there in kd, but absent in dgpo." in texts


def test_of_what_a_retriever_does_not_tell_nothing_is_assumed(tmp_path):
    make_run(tmp_path / "a", "dgpo", 0, answers(0.5, 0))
    make_run(tmp_path / "b", "kd", 0, answers(0.5, 1), **elsewhere(retriever=None))
    findings = check(make_methods(find_runs([tmp_path])))
    assert any(each.refuses and "dataset.corpus is /there" in each.text for each in findings)
    (told,) = [each for each in findings if each.text.startswith("what was searched is not known of kd:")]
    assert not told.refuses


def test_the_same_seed_twice_is_refused(tmp_path):
    for name in "aab":
        make_run(tmp_path / name / str(len(list(tmp_path.rglob("*")))), "kd", 0, answers(0.5, ord(name)))
    with pytest.raises(ConfigurationError, match="kd has 2 runs with seed 0"):
        study([tmp_path], Options())


def test_a_mere_repetition_counts_once(tmp_path):
    for name in ("main_table", "ablations"):
        make_run(tmp_path / name, "dgpo", 0, answers(0.5, 0))
    found = study([tmp_path], Options(resamples=10))
    assert [method.seeds for method in found.methods] == [[0]]
    assert "main_table repeats another run's seed and figures; counted once" in found.findings[-1].text


def test_transcripts_stand_in_for_predictions(tmp_path):
    right = answers(0.5, 0)
    run = make_run(tmp_path / "a", "kd", 0, right)
    (run / "trajectories").mkdir()
    for mode in right:
        file = run / "predictions" / f"test-kd-{mode}.jsonl"
        (run / "trajectories" / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    (found,) = find_runs([tmp_path])
    assert list(found.outcomes["greedy"].values()) == right["greedy"].tolist()


def test_doubts_that_do_not_refuse(tmp_path):
    make_run(tmp_path / "a", "kd", 0, answers(0.5, 0), costs={"trained_tokens": 100})
    make_run(tmp_path / "b", "dgpo", 0, answers(0.5, 1), costs={"trained_tokens": 900})
    make_run(tmp_path / "c", "dgpo", 1, answers(0.5, 1), costs={"trained_tokens": 900})
    summary = json.loads((tmp_path / "c" / "summary.json").read_text())
    summary["versions"]["torch"] = "2.1"
    summary["evaluation"]["dgpo"]["greedy"]["all"]["retriever_errors"] = 3
    summary["evaluation"]["teacher"]["greedy"]["all"]["exact_match"] = 0.5
    (tmp_path / "c" / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "c" / "predictions" / "test-dgpo-greedy.jsonl").unlink()
    findings = check(make_methods(find_runs([tmp_path])))
    assert not any(finding.refuses for finding in findings)
    told = "\n".join(finding.text for finding in findings)
    for expected in (
        "numbers of seeds differ: kd 1, dgpo 2", "trained tokens from 100 (kd) to 900 (dgpo)", "torch is 2.0",
        "3 test episodes of dgpo", "'teacher', greedy, has exact match 1.0000", "has no predictions of greedy",
    ):  # fmt: skip
        assert expected in told


def test_who_writes_no_token_is_no_language_model(tmp_path):
    make_run(tmp_path / "a", "kd", 0, answers(0.5, 0), costs={"trained_tokens": 100})
    make_run(tmp_path / "b", "maskable_ppo", 0, answers(0.5, 1), costs={"env_steps": 900})
    make_run(tmp_path / "c", "ppo", 0, answers(0.5, 2), costs={"env_steps": 900, "sampled_tokens": 9000})
    (told,) = [finding.text for finding in check(make_methods(find_runs([tmp_path]))) if "language" in finding.text]
    assert told.startswith("no language model: maskable_ppo took its steps")


def test_runs_without_a_common_mode_have_nothing_to_show(tmp_path):
    for algo, mode in (("kd", "greedy"), ("dgpo", "T=1")):
        make_run(tmp_path / algo, algo, 0, {mode: answers(0.5, 0)[mode]})
    with pytest.raises(ConfigurationError, match=r"not comparable"):
        study([tmp_path], Options())
    with pytest.raises(ConfigurationError, match=r"No mode of decoding was evaluated in all"):
        study([tmp_path], Options(force=True))


def test_files_that_are_cut_off_are_named(tmp_path):
    run = make_run(tmp_path / "a", "kd", 0, answers(0.5, 0), metrics=metrics(0))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "dev/')
    assert len(find_runs([tmp_path])[0].metrics) == 3
    with (run / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 5}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl, line 4"):
        _ = find_runs([tmp_path])[0].metrics
    file = run / "predictions" / "test-kd-greedy.jsonl"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DataError, match=r"test-kd-greedy.jsonl, line 1: no such row"):
        _ = find_runs([tmp_path])[0].outcomes


# --- what is written -------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """Checks that tags are closed in order, and collects whatever could fetch something."""

    VOID = frozenset({"meta", "link", "img", "source", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open, self.addresses, self.ids, self.images = [], [], set(), []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids |= {attributes["id"]} if "id" in attributes else set()
        self.addresses += [attributes[name] for name in ("src", "href", "srcset") if name in attributes]
        self.images += [attributes.get("alt")] if tag == "img" else []
        assert tag != "script"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(written):
    text = (written[0] / "comparison.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.open == []
    for address in page.addresses:
        assert address.startswith(("data:", "#")), address[:80]
        assert not address.startswith("#") or address[1:] in page.ids
    assert "url(" not in text
    assert "@import" not in text
    assert page.images
    assert all(page.images)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_every_form_is_written_and_printed(written):
    out, printed = written
    assert {"comparison.md", "comparison.html", "comparison.json", "results-greedy.csv", "results-greedy.tex",
            "curves.csv", "tb", "figures"} <= {path.name for path in out.iterdir()}  # fmt: skip
    images = {path.name: path.read_bytes() for path in (out / "figures").iterdir()}
    assert {"scores-greedy", "differences-greedy", "curve-dev-exact_match-tokens", "profiles-T=1", "cost-tokens",
            "curve-rollout-exact_match-seconds"} <= {Path(name).stem for name in images}  # fmt: skip
    begin = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    for name, image in images.items():
        assert image.startswith(begin[Path(name).suffix]), name
    stems = {suffix: {Path(name).stem for name in images if name.endswith(suffix)} for suffix in begin}
    assert stems[".png"] == stems[".svg"] == stems[".pdf"] != set()
    for expected in ("Exact match, greedy", "Paired comparisons, greedy", "ARC panel", "Cost beside score", "page:"):
        assert expected in printed
    tables = json.loads((out / "comparison.json").read_text())["tables"]
    assert tables["results-greedy"][0]["method"] == "dgpo"
    latex = (out / "results-greedy.tex").read_text()
    assert latex.count(r"\\") == 5
    assert r"single\_hop" in latex


def test_tensorboard_shows_the_comparison(written, truth):
    out, _ = written
    events = EventAccumulator(str(out / "tb" / "dgpo" / "seed1")).Reload()
    points = [(event.step, event.value) for event in events.Scalars("dev/exact_match")]
    assert points == [(step, pytest.approx(0.1 * step + 0.01)) for step in (1, 2, 3)]
    assert events.Scalars("eval/all/exact_match")[0].value == pytest.approx(truth["dgpo", 1]["greedy"].mean())
    assert b"method" in events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert EventAccumulator(str(out / "tb" / "figures")).Reload().Tags()["images"]


def test_the_same_runs_give_the_same_files(folder, written):
    again = study([folder], Options(resamples=50, with_paper=True))
    for table in again.tables:
        assert (written[0] / f"{table.name}.csv").read_text(encoding="utf-8") == table.csv()
    drawing = next(drawing for drawing in again.drawings if drawing.name == "profiles-greedy")
    drawn = render(drawing, ("png", "svg", "pdf"), LIGHT, with_legend=True)
    begin = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    for kind, file in drawn.items():
        assert (written[0] / "figures" / f"profiles-greedy.{kind}").read_bytes() == file
        assert file.startswith(begin[kind])
    assert render(drawing, ("svg",), DARK) == render(drawing, ("svg",), DARK)


def test_thirteen_methods_have_thirteen_looks_that_differ_in_more_than_colour():
    methods = [Method(name, name, ()) for name in (*"abcdefghijk", "dgpo", "ppo")]
    found = list(looks(methods).values())
    assert len(set(found)) == len({(look.color, look.dash) for look in found}) == 13
    for color in {look.color for look in found}:  # for who sees no colour, and in print
        same = [look for look in found if look.color == color]
        assert len({look.marker for look in same}) == len({look.dash for look in same}) == len(same)


def test_the_probes_are_drawn_by_how_far_each_is_behind(folder, written):
    assert (written[0] / "figures" / "arc.png").is_file()
    panel = arc_panel.make_panel(make_methods(find_runs([folder]))).shortened()
    drawing = probed(panel)
    assert render(drawing, ("svg",), DARK)["svg"].count(b"thinking: exact match") == 1
    assert probed(replace(panel, columns=(("search_behaviour", "num_searches"),))) is None, "it is no share"


def test_a_comparison_says_its_data_date_and_code_and_replaces_no_other(tmp_path):
    right = {"greedy": np.array([True, False] * 6)}
    for name, seed in (("one", 0), ("one", 1), ("two", 0)):
        make_run(tmp_path / name / f"s{seed}", "kd", seed, right)
    for seed, commit in ((0, "abc"), (1, "def")):
        file = tmp_path / "one" / f"s{seed}" / "summary.json"
        told = {"date": f"2026-11-0{seed + 1}T10:00:00+00:00", "commit": commit}
        file.write_text(json.dumps(json.loads(file.read_text()) | told))
    out, terminal = tmp_path / "out", Console(file=io.StringIO())
    found = compare([tmp_path / "one"], out, Options(resamples=10), terminal)
    expected = "Data: tiny, 12 test questions; 2 runs of 1 methods; measured 2026-11-01 to 2026-11-02; commit abc, def."
    assert subtitle(found.methods) == expected
    assert expected in (out / "comparison.html").read_text()
    assert expected in (out / "comparison.md").read_text()
    with pytest.raises(ConfigurationError, match=r"holds the comparison of other runs, such as .*one"):
        compare([tmp_path / "two"], out, Options(resamples=10), terminal)
    compare([tmp_path / "one", tmp_path / "two"], out, Options(resamples=10, force=True), terminal)


@pytest.fixture
def eleven(tmp_path):
    """The tables of eleven methods with figures of many digits."""
    rng = np.random.default_rng(0)
    for number in range(11):
        costs = {name: float(rng.integers(10**5, 10**7)) for name in COSTS}
        figures = {f"rate_{each}": made_figure(float(rng.random()), best="high", share=True) for each in "abc"}
        make_run(tmp_path / str(number), f"method_{number}", 0, answers(0.5, number), costs=costs,
                 arc={f"method_{number}": {"thinking": figures}})  # fmt: skip
    return {table.name: table for table in study([tmp_path], Options(resamples=10)).tables}


@pytest.mark.parametrize("name", ["arc", "costs", "results-greedy", "significance-greedy"])
def test_in_a_narrow_terminal_no_figure_is_broken(eleven, name):
    table, terminal = eleven[name], Console(file=io.StringIO(), width=80)
    blocks = table.rich(terminal)
    for block in blocks:
        terminal.print(block)
    lines = terminal.file.getvalue().splitlines()
    assert len(blocks) > 1
    assert max(map(len, lines)) <= 80
    assert sum(line.strip() == table.title for line in lines) == len(blocks)
    cells = Counter(cell.strip() for line in lines for cell in line.split("│"))
    figures = Counter(cell.text for row in table.rows for cell in row if isinstance(cell, Number))
    if not table.brief:
        intervals = (cell.interval for row in table.rows for cell in row if isinstance(cell, Number))
        figures += Counter(interval.strip("[]") for interval in intervals if interval)
    assert all(cells[figure] >= count for figure, count in figures.items())
    wide = Console(file=io.StringIO(), width=400)
    assert len(table.rich(wide)) == 1


def test_blocks_of_pairs_name_both():
    table = Table("t", "T", ["first", "second", *"abcdefgh"], [["kd", "dgpo", *[Number(0.123456, style=".6f")] * 8]])
    blocks = table.rich(Console(width=40))
    headings = [[str(column.header) for column in block.columns] for block in blocks]
    assert headings[0][:2] == headings[-1][:2] == ["first", "second"]
    assert [heading for block in headings for heading in block[2:]] == list("abcdefgh")


def test_names_of_methods_are_no_formulas(tmp_path):
    for algo in ("dgpo$^$x", "a$b$"):
        make_run(tmp_path / algo[0], algo, 0, answers(0.5, 0), metrics=metrics(0))
    found = study([tmp_path], Options(resamples=10))
    for drawing in found.drawings:
        drawn = render(drawing, ("svg", "png"), LIGHT, with_legend=True)["svg"].decode()
        if drawing.name in ("scores-greedy", "curve-dev-exact_match-steps"):
            assert "dgpo$^$x" in drawn
            assert "a$b$" in drawn


def test_cells():
    table = Table("t", "T", ["a", "b|c", "p"], [["x_1", Number(0.5, 0.25, 0.75), Number(0.0001, style="p")],
                                                 ["<y>", Number(None), Number(0.2, style="p")]])  # fmt: skip
    assert "| x_1 | 0.500 [0.250, 0.750] | <0.001 |" in table.markdown()
    assert "| a | b\\|c | p |" in table.markdown()
    assert table.csv().splitlines() == ["a,b|c,b|c (low),b|c (high),p", "x_1,0.5,0.25,0.75,0.0001", "<y>,,,,0.2"]
    assert r"P(a $>$ b)" in Table("t", "T", ["P(a > b)"], []).latex()
    assert r"x\_1 & 0.500 {\scriptsize [0.250, 0.750]} & $<$0.001 \\" in table.latex()
    assert "&lt;y&gt;" in page("title", [Section("tables", tables=[table])], [])


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\n\n", "\u2028"])
def test_names_of_groups_bring_no_markdown(tmp_path, end):
    plain, evil = "mine", f"mine{end}![x](http://e/) [y](http://e/) `<img src=e>`{end}# z"
    texts = {}
    for place, name in (("plain", plain), ("evil", evil)):
        make_run(tmp_path / place, "kd", 0, answers(0.5, 0), groups=("a", name))
        write(study([tmp_path / place], Options(resamples=10)), tmp_path / f"of_{place}")
        texts[place] = (tmp_path / f"of_{place}" / "comparison.md").read_text()
        comment = (tmp_path / f"of_{place}" / "iqm-greedy.tex").read_text().splitlines()[1]
        assert comment.startswith(r"\begin{tabular}")
    assert len(texts["evil"].splitlines()) == len(texts["plain"].splitlines())
    html = {place: markdown.markdown(text, extensions=["tables"]) for place, text in texts.items()}
    assert not re.search("<img|<a ", html["evil"])
    for tag in ("<h1", "<h2", "<tr", "<td", "<code"):
        assert html["evil"].count(tag) == html["plain"].count(tag)
    assert "![x](http://e/) [y](http://e/) `&lt;img src=e&gt;`" in html["evil"]


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_line(tmp_path, capsys):
    for algo, seed in product(("kd", "dgpo"), (0, 1)):
        right = {"greedy": answers(0.5, seed)["greedy"]}
        make_run(tmp_path / "runs" / f"{algo}{seed}", algo, seed, right, settings={"num_demonstrations": 64})
    out = tmp_path / "out"
    names = "absent,algo.num_demonstrations"
    runs = str(tmp_path / "runs")
    command.main([runs, "--out", str(out), "--against", "dgpo", "--x", names, "--resamples", "10"])
    assert (out / "setting-greedy.csv").exists()
    (out / "mine.csv").write_text("kept")
    assert [row["first"] for row in rows(out, "significance-greedy")] == ["dgpo"]
    command.main([runs, "--out", str(out), "--resamples", "10"])
    assert (out / "results-greedy.csv").exists()
    assert not (out / "setting-greedy.csv").exists()  # of the comparison before
    assert not (out / "figures" / "setting-greedy.png").exists()
    assert (out / "mine.csv").exists()
    with pytest.raises(SystemExit):
        command.main([str(tmp_path / "runs"), "--out", str(tmp_path / "runs" / "kd0")])
    assert "is a run directory; choose another folder" in capsys.readouterr().err
    for given, expected in (
        (["--against", "dgp0"], "Did you mean 'dgpo'?"),
        (["--x", "algo.num_demonstration"], "Did you mean 'algo.num_demonstrations'?"),
        (["--resamples", "0"], "resamples must be an integer of at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            command.main([str(tmp_path / "runs"), "--out", str(out), *given])
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("best", ["dgpo", "ppo"])
def test_forced_runs_with_other_modes_are_compared_in_the_common_one(tmp_path, best):
    for algo, modes in (("dgpo", ("greedy", "T=1")), ("ppo", ("T=1",))):
        right = {mode: answers(0.9 if algo == best else 0.2, 0)["T=1"] for mode in modes}
        make_run(tmp_path / "runs" / algo, algo, 0, right)
    out = tmp_path / "out"
    command.main([str(tmp_path / "runs"), "--out", str(out), "--force", "--resamples", "10"])
    assert f"{QUESTIONS} test questions; 2 runs of 2 methods" in (out / "comparison.md").read_text()
    assert rows(out, "results-T=1")[0]["method"] == best


def test_a_comparison_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    make_run(tmp_path / "runs" / "kd", "kd", 0, answers(0.5, 0))
    given = [tmp_path / "runs"], tmp_path / "out", Options(resamples=10), Console(file=io.StringIO())
    compare(*given)
    earlier = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("algorithms.analysis.comparison.study.page", fail)
    with pytest.raises(OSError, match="no space"):
        compare(*given)
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == earlier


def test_a_stage_that_was_skipped_or_had_too_few_demonstrations_is_told(tmp_path):
    """Seed 1 of `dgpo` had no cold start: averaged in silence, it would count as what another ablation is."""
    for seed, number in enumerate((400, 0, 250)):
        run = make_run(tmp_path / str(seed), "dgpo", seed, answers(0.5, seed))
        summary = json.loads((run / "summary.json").read_text())
        summary["stages"] = [{"name": "kd", "steps": number // 10}, {"name": "dgpo", "steps": 60}]
        summary["demonstrations"] = {"kd": {"wanted": 400, "found": number, "asked": 1600}}
        (run / "summary.json").write_text(json.dumps(summary))
    told = [finding.text for finding in study([tmp_path], Options(resamples=10)).findings]
    assert f"dgpo ({tmp_path / '1'}) skipped kd: it is another method." in told
    for seed, number in ((1, 0), (2, 250)):
        assert f"dgpo ({tmp_path / str(seed)}) had {number} of 400 demonstrations for kd." in told
    assert not any(str(tmp_path / "0") in text for text in told)


def test_how_a_run_was_carried_out_makes_no_other_method_and_no_other_decoding(tmp_path):
    for seed in range(2):
        own = {"rollout": {"temperature": 1.0, "decode_during_search": 16 * seed}}
        own["model"] = {"policy": "tiny-student", "teacher": "tiny-teacher", "settings": {"num_envs": 4 + seed}}
        run = make_run(tmp_path / str(seed), "kd", seed, answers(0.5, seed), config=own)
        summary = json.loads((run / "summary.json").read_text())
        summary["settings_without_effect"] = sorted(settings_without_effect())
        (run / "summary.json").write_text(json.dumps(summary))
    (method,) = study([tmp_path], Options(resamples=10)).methods
    assert (method.label, method.seeds) == ("kd", [0, 1])
