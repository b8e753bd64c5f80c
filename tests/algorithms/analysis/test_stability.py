"""What a comparison says of the steadiness of training, and of the differences that it can see."""

from __future__ import annotations

import numpy as np
import pytest
from made_runs import make_run
from scipy import stats

from algorithms.analysis.comparison import pairwise, published, stability
from algorithms.analysis.comparison.methods import make_methods
from algorithms.analysis.comparison.statistics import Power, paired
from algorithms.analysis.comparison.study import Options, study
from algorithms.analysis.runs import find_runs

RIGHT = {"greedy": np.array([True, False] * 10)}


def checked(scores: list[float | None], stage: str = "dgpo") -> list[dict]:
    """Lines of metrics with a check on the dev split every 10 steps; None: no check in that line."""
    rows = [{"step": 10 * at, "stage": stage, "dev/exact_match": score} for at, score in enumerate(scores, 1)]
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def methods_of(folder, scores: dict[int, list[float | None]], before: list[dict] = ()):
    for seed, given in scores.items():
        make_run(folder / str(seed), "dgpo", seed, RIGHT, metrics=[*before, *checked(given)])
    return make_methods(find_runs([folder]))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.2, 0.4, 0.6], (0.6, 0.6, 0.4, None)),
        ([0.2, 0.6, 0.3, 0.6], (0.6, 0.6, (0.4 + 0.45 + 0.45) / 3, 30)),  # half of the best is a collapse
        ([0.2, 0.6, 0.31, 0.0, 0.0], (0.6, 0.0, (0.4 + 0.455 + 0.155 + 0.0) / 4, 40)),
        ([0.02, 0.0, 0.05], (0.05, 0.05, (0.01 + 0.025) / 2, None)),  # too shallow
        ([0.3], (0.3, 0.3, 0.3, None)),
        ([0.2, None, 0.6], (0.6, 0.6, 0.4, None)),
    ],
)
def test_stability_of_one_run_by_hand(tmp_path, scores, expected):
    (method,) = methods_of(tmp_path, {0: scores}, before=checked([0.9, 0.05], "kd"))  # of it only the last counts
    best, last, area, collapse = stability.of_run(method.runs[0])
    assert (best, last, collapse) == (expected[0], expected[1], expected[3])
    assert area == pytest.approx(expected[2], abs=1e-12)


def test_a_run_that_collapses_at_once_fell_from_the_stage_before(tmp_path):
    (method,) = methods_of(tmp_path, {0: [0.0, 0.0, 0.0]}, before=checked([0.3, 0.56], "kd"))
    assert stability.of_run(method.runs[0]) == (0.0, 0.0, 0.0, 10)


def test_the_table_has_means_over_seeds_and_counts_collapses(tmp_path):
    methods = methods_of(tmp_path, {0: [0.2, 0.6, 0.1], 1: [0.2, 0.4, 0.4], 2: [0.2, 0.5, 0.5, 0.0]})
    (row,) = stability.table(methods).records()
    assert row["method"] == "dgpo"
    assert (row["collapsed"], row["first collapse"]) == ("2 of 3", "30")
    mean, low, high = row["last"]
    half = stats.t.ppf(0.975, 2) * np.std([0.1, 0.4, 0.0], ddof=1) / 3**0.5
    assert (mean, low, high) == (pytest.approx(1 / 6), 0.0, pytest.approx(1 / 6 + half))  # cut at 0


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.9, 1.0, 0.95], [0.95, 0.95 - 2.4841377 * 0.05, 1.0]),  # t(0.975, 2) / sqrt(3), times the spread of 0.05
        ([0.0, 0.02, 0.01], [0.01, 0.0, 0.01 + 2.4841377 * 0.01]),
        ([0.0, 0.0, 0.0], 0.0),
        ([0.3], 0.3),
    ],
)
def test_shares_stay_shares_and_seeds_that_agree_prove_nothing(tmp_path, scores, expected):
    (row,) = stability.table(methods_of(tmp_path, {seed: [score] for seed, score in enumerate(scores)})).records()
    assert row["last"] == pytest.approx(expected)


def test_runs_without_checks_have_no_table(tmp_path):
    assert stability.table(methods_of(tmp_path, {0: [None, None]})) is None


# --- power -----------------------------------------------------------------------------------------------------------


def drawn(chances: np.ndarray, seeds: int, spread: float, rng: np.random.Generator) -> np.ndarray:
    """Answers of so many seeds, each better or worse than the others on all questions."""
    shift = spread * rng.standard_normal((seeds, 1))
    return rng.random((seeds, len(chances))) < np.clip(chances + shift, 0, 1)


def test_power_is_the_chance_to_find_a_difference_that_is_there():
    """Many experiments of the size in question, of which about 80 % find what `detectable` promises."""
    rng = np.random.default_rng(0)
    chances = rng.uniform(0.3, 0.6, 400)
    pilot = Power(drawn(chances, 200, 0.03, rng), drawn(chances, 200, 0.03, rng))
    difference = pilot.detectable(8)
    assert pilot.seeds_for(difference) == 8
    assert pilot.seeds_for(difference + 1e-9) == 8
    assert pilot.seeds_for(difference - 1e-9) == 9
    found = 0
    for _ in range(400):
        first, second = drawn(chances + difference, 8, 0.03, rng), drawn(chances, 8, 0.03, rng)
        found += paired(first, second).p_methods < 0.05
    assert 0.73 < found / 400 < 0.87


def test_power_of_methods_that_are_compared_seed_by_seed():
    """What the seeds have in common, such as a good cold start, hides nothing."""
    rng = np.random.default_rng(0)
    chances = rng.uniform(0.3, 0.6, 400)

    def experiment(seeds: int, difference: float) -> tuple[np.ndarray, np.ndarray]:
        shift = 0.08 * rng.standard_normal((seeds, 1))
        return tuple(rng.random((seeds, 400)) < np.clip(chances + shift + add, 0, 1) for add in (difference, 0.0))

    pilot = experiment(200, 0.0)
    difference = Power(*pilot, by_seed=True).detectable(8)
    assert difference < 0.5 * Power(*pilot).detectable(8)
    found = 0
    for _ in range(400):
        first, second = experiment(8, difference)
        found += paired(first, second, by_seed=True).p_methods < 0.05
    assert 0.73 < found / 400 < 0.87


@pytest.mark.parametrize("by_seed", [True, False])
@pytest.mark.parametrize("seeds", [3, 4, 8])
def test_power_is_that_of_the_test_that_is_made_where_answers_are_most_of_the_noise(seeds, by_seed):
    """The test counts their noise twice, and its few seeds show a variance that is now too small, now too large."""
    rng = np.random.default_rng(seeds)
    chances = rng.uniform(0.3, 0.6, 600)

    def experiment(seeds: int, difference: float) -> tuple[np.ndarray, np.ndarray]:
        return drawn(chances + difference, seeds, 0.01, rng), drawn(chances, seeds, 0.01, rng)

    difference = Power(*experiment(200, 0.0), by_seed=by_seed).detectable(seeds)
    found = [paired(*experiment(seeds, difference), by_seed=by_seed).p_methods < 0.05 for _ in range(300)]
    assert 0.68 < np.mean(found) < 0.9


def test_questions_that_differ_always_alike_are_no_matter_of_seeds():
    first = np.repeat([[True, False] * 20], 3, axis=0)
    power = Power(first, ~first)
    # differences of 1 and -1: variance 40 / 39 over 40 questions, whatever the number of seeds
    assert power.detectable(1000) == pytest.approx((2.0227 + 0.8416) * (1 / 39) ** 0.5, rel=1e-3)
    assert power.seeds_for(0.023) is None


def test_compare_says_what_it_can_see(tmp_path):
    rng = np.random.default_rng(1)
    chances = rng.uniform(0.3, 0.6, 300)
    for algo in ("kd", "dgpo"):
        for seed, right in enumerate(drawn(chances, 4, 0.02, rng)):
            make_run(tmp_path / algo / str(seed), algo, seed, {"greedy": right})
    found = study([tmp_path], Options(resamples=10))
    (text,) = [finding.text for finding in found.findings if "tell apart" in finding.text]
    first, second = (np.array([run.outcomes["greedy"][f"q{n}"] for run in m.runs for n in range(300)]).reshape(4, 300)
                     for m in found.methods)  # fmt: skip
    power = Power(first, second, by_seed=True)
    assert f"differences of {power.detectable():.3f}, greedy (median over 1 pairs" in text
    assert pytest.approx(0.023) == published.GUIDANCE
    assert "the paper's 0.023 of the teacher's guidance would take more questions" in text
    assert power.seeds_for(0.023) is None
    single = [method for method in found.methods if method.base == "kd"]
    assert pairwise.told_power(single, "greedy") is None


def told_of(folder, **right: np.ndarray) -> str | None:
    """What is said of methods with these answers, [seeds, questions] bool."""
    for algo, of_seeds in right.items():
        for seed, answers in enumerate(of_seeds):
            make_run(folder / algo / str(seed), algo, seed, {"greedy": answers}, groups=["all"])
    return pairwise.told_power(make_methods(find_runs([folder])), "greedy")


def test_nothing_is_said_of_pairs_that_tell_nothing(tmp_path):
    same = np.repeat([[True, False] * 10], 3, axis=0)
    assert told_of(tmp_path / "no variance", kd=same, dgpo=same) is None
    one = np.array([[True], [False]])
    assert told_of(tmp_path / "one question", kd=one, dgpo=~one) is None
    rng = np.random.default_rng(0)
    chances = rng.uniform(0.3, 0.6, 300)
    drawn_ones = {algo: drawn(chances, 3, 0.02, rng) for algo in ("kd", "dgpo")}
    same = np.repeat([[True, False] * 150], 3, axis=0)
    told = told_of(tmp_path / "one of them", **drawn_ones, sft=same, gkd=same)
    assert "(median over 5 pairs;" in told  # of six, one without variance
    assert "0.000" not in told


def test_two_seeds_promise_nothing(tmp_path):
    # By hand: differences of seeds of 0.5 and -0.1, one degree of freedom; no difference of shares is so large.
    two = np.array([[True] * 6 + [False] * 4, [True] * 4 + [False] * 6])
    other = np.array([[True] + [False] * 9, [True] * 5 + [False] * 5])
    told = told_of(tmp_path, kd=two, dgpo=other)
    assert told.startswith(
        "these runs can't tell any difference apart, greedy, not even one of 1 (median over 1 pairs;"
    )
    assert told.endswith("two seeds can't tell how many seeds the paper's 0.023 of the teacher's guidance would take.")
