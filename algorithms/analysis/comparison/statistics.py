"""Estimates with honest intervals, paired tests, and aggregates over seeds, on plain arrays.

Chance enters every figure twice: by the seeds of training and by the questions of the test. All methods answer
the same questions, so the two are crossed: the variance of a mean over both is at most the sum of the variance between
seeds over their number and the variance between questions over theirs. (The sum counts the noise of single answers
twice, so the interval is rather too wide.) Each of the two enters with Student's quantile for its own degrees of
freedom, so that two seeds are not trusted as much as hundreds of questions: the half-width of an interval is the root
of the sum of quantile squared times variance. A bootstrap over three seeds would be too narrow by a third.

Runs of two methods with the same seed share what the seed decides: demonstrations, cold start, order of the data.
Methods that have the same seeds are therefore compared seed by seed, which leaves out what the seeds have in common.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, signal, stats

LEVEL = 0.95
#: Chance to find a difference that exists.
POWER = 0.8
_TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
#: A smaller variance comes from rounding; a single answer among a million questions gives a larger one.
_ROUNDING = 1e-20
#: Over these quantiles a chi-squared variable is averaged.
_SHARES = (np.arange(50) + 0.5) / 50
#: P-values below this one's exponential are 0.
_LEAST_LOG_P = -200.0


class Estimate(NamedTuple):
    """A figure and its 95 % interval; without an interval, both bounds are None."""

    value: float
    low: float | None = None
    high: float | None = None


class Paired(NamedTuple):
    """Comparison of two methods on the same questions.

    Attributes:
        difference: First minus second, with the interval over seeds and questions.
        p_questions: P-value of the hypothesis that these trained policies are equally good, over questions.
        p_methods: P-value of the same for the methods, over seeds and questions; None if one has one seed. At
            least `p_questions`: a claim that fails for these policies is not made for their methods.
    """

    difference: Estimate
    p_questions: float
    p_methods: float | None


def crossed(
    by_seed: np.ndarray, question_variance: float, num_questions: int, alike: Sequence[np.ndarray] = ()
) -> Estimate:
    """Return the mean of a share over seeds and questions, with its interval.

    Args:
        by_seed: Mean over the questions for each seed, [seeds], in [0, 1].
        question_variance: Variance of the mean that comes from the choice of the questions.
        num_questions: How many questions there were.
        alike: As in `crossed_mean`.

    Returns:
        The t interval of the module's docstring, cut at 0 and 1. With one seed, it covers the questions alone. If
        nothing varies, or all answers are alike, it covers that of Clopper and Pearson for that many questions.
    """
    value, low, high = crossed_mean(by_seed, question_variance, num_questions, alike)
    assert low is not None
    assert high is not None
    if low == high or value in (0, 1):
        bounds = stats.binomtest(round(value * num_questions), num_questions).proportion_ci(LEVEL)
        low, high = min(low, float(bounds.low)), max(high, float(bounds.high))
    return Estimate(value, max(0.0, low), min(1.0, high))


def crossed_mean(
    by_seed: np.ndarray, item_variance: float, num_items: int, alike: Sequence[np.ndarray] = ()
) -> Estimate:
    """Return the mean of any figure, with its uncut interval; the interval is a point if nothing varies.

    Args:
        by_seed: Mean over the items for each seed, [seeds].
        item_variance: Variance of the mean that comes from the choice of the items.
        num_items: How many items there were.
        alike: Samples like `by_seed`, itself among them, that share one variance between seeds, which is pooled over
            them; empty: it is that of `by_seed`.
    """
    value = float(by_seed.mean())
    of_seeds = _pooled(alike or [by_seed], len(by_seed))
    half = _half_width([_Part(item_variance, max(1, num_items - 1)), *of_seeds])
    return Estimate(value, value - half, value + half)


def variance_of_interval(width: float) -> float:
    """Variance of a mean with this 95 % interval, for a normal distribution."""
    return (width / (2 * float(stats.norm.ppf((1 + LEVEL) / 2)))) ** 2


def paired(first: np.ndarray, second: np.ndarray, by_seed: bool = False) -> Paired:
    """Compare two methods on the same questions.

    Args:
        first: Right or wrong, [seeds, questions] bool.
        second: Right or wrong on the same questions, with any number of seeds.
        by_seed: The rows of the two belong to the same seeds, in the same order. Else their seeds are independent.
    """
    difference = first.mean(axis=0) - second.mean(axis=0)
    count, value = difference.size, float(difference.mean())
    between_questions = float(difference.var(ddof=1)) / count if count > 1 else 0.0
    of_seeds = _between_seeds(*(each.mean(axis=1) for each in _samples(first, second, by_seed)))
    parts = [_Part(between_questions, max(1, count - 1)), *of_seeds]
    half = _half_width(parts)
    center = value
    if not half:  # all these questions are alike, yet another one may differ: Clopper and Pearson
        half = 1 - _TAILS[0] ** (1 / count)
        center = (1 - half) * value
    scaled = len(second) * first.sum(axis=0, dtype=int) - len(first) * second.sum(axis=0, dtype=int)
    enough = min(len(first), len(second)) > 1
    p_questions = sign_flip_p_value(scaled)
    return Paired(
        Estimate(value, max(-1.0, center - half), min(1.0, center + half)),
        p_questions,
        max(p_questions, _t_p_value(value, parts)) if enough else None,
    )


def sign_flip_p_value(differences: np.ndarray) -> float:
    """Exact two-sided p-value of the paired permutation test, which flips the signs of the differences.

    For single runs, whose differences are -1, 0 and 1, it is McNemar's exact test.

    Args:
        differences: Integers, [questions].
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    chances = np.ones(1)  # distribution of the sum of the positive differences
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        heads = np.zeros(size * count + 1)
        heads[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = signal.convolve(chances, heads)  # uses the Fourier transform if there are many questions
    middle = (len(chances) - 1) / 2
    observed = abs(int(differences[differences > 0].sum()) - middle)
    return float(np.clip(chances[np.abs(np.arange(len(chances)) - middle) >= observed].sum(), 0, 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: the chance of any false alarm among all p-values stays below the level."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def rank_agreement(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Kendall's tau-b and Spearman's rho of two scores of the same methods; NaN if one is constant."""
    return float(stats.kendalltau(ours, theirs).statistic), float(stats.spearmanr(ours, theirs).statistic)


# --- power -----------------------------------------------------------------------------------------------------------


class Power:
    """Power of `paired` for two methods, from the variances among their runs.

    The variance of a difference has two parts: that of the questions over their number, which no further seed reduces;
    and that of the seeds, with the noise of single answers, over their number. The test counts that noise twice.

    Args:
        first: Right or wrong, [seeds, questions] bool; at least two of each.
        second: Right or wrong on the same questions, with at least two seeds.
        by_seed: As in `paired`.
    """

    def __init__(self, first: np.ndarray, second: np.ndarray, by_seed: bool = False) -> None:
        self.num_seeds = min(len(first), len(second))
        self._samples = _samples(first, second, by_seed)
        self._num_questions = first.shape[1]
        answers = [float(each.var(axis=0, ddof=1).mean()) / self._num_questions for each in self._samples]
        of_means = float((first.mean(axis=0) - second.mean(axis=0)).var(ddof=1)) / self._num_questions
        shown = sum(noise / len(each) for noise, each in zip(answers, self._samples, strict=True))
        self._of_answers, self._of_questions = sum(answers), max(0.0, of_means - shown)

    def detectable(self, num_seeds: int | None = None) -> float:
        """The difference that so many seeds of each method (default: the present ones) find with chance `POWER`.

        It is 0 where nothing varies, and above 1 where the seeds are too few to find any difference.
        """
        seeds = num_seeds or self.num_seeds
        (of_seeds,) = _between_seeds(*(each.mean(axis=1) for each in self._samples), num_seeds=seeds)
        if (spread := float(np.sqrt(self._of_questions + of_seeds.variance))) ** 2 <= _ROUNDING:
            return 0.0
        of_questions = _Part(self._of_questions + self._of_answers / seeds, self._num_questions - 1)
        # The seeds' variance that an experiment shows is chi-squared, and its intervals are as wide as that says.
        shown = of_seeds.variance * stats.chi2.ppf(_SHARES, of_seeds.freedom) / of_seeds.freedom
        halves = np.array([_half_width([of_questions, _Part(one, of_seeds.freedom)]) for one in shown])

        def excess(difference: float) -> float:
            return float(stats.norm.cdf((difference - halves) / spread).mean()) - POWER

        return float(optimize.brentq(excess, 0.0, halves.max() + 5 * spread))

    def seeds_for(self, difference: float, most: int = 1000) -> int | None:
        """The fewest seeds of each method that find a difference on these questions; None if `most` seeds do not."""
        if self.detectable(most) > difference:
            return None
        return 2 + bisect_left(range(2, most), True, key=lambda seeds: self.detectable(seeds) <= difference)


# --- aggregates over seeds and groups of questions (Agarwal et al., arXiv:2108.13264) ---------------------------------
# The tests compare with their library rliable. It is not used here: it draws from NumPy's global generator
# whatever seed it is given; it takes resamples and thresholds one by one, which for eleven methods, two modes and
# 1000 resamples takes 147 s instead of 0.4 s here; and its dependencies cannot be imported beside pandas 3.


def interquartile_mean(scores: np.ndarray, resamples: int) -> Estimate:
    """Mean of the middle half of all scores of a method, with its stratified bootstrap interval.

    Args:
        scores: [seeds, groups of questions].
        resamples: Number of resamples of the seeds, separate for each group. With one seed there is no interval.
    """
    value = float(stats.trim_mean(scores, 0.25, axis=None))
    drawn = _resampled(scores, resamples)
    return _with_bounds(value, stats.trim_mean(drawn.reshape(resamples, -1), 0.25, axis=1), len(scores))


def probability_of_improvement(first: np.ndarray, second: np.ndarray, resamples: int) -> Estimate:
    """Chance that a run of the first method beats one of the second, as mean over groups; ties count half.

    Args:
        first: [seeds, groups of questions].
        second: Scores of the second method, in the same groups; the number of seeds may differ.
        resamples: Number of resamples of the seeds, separate for each method and group. With one seed of
            either method, there is no interval.
    """
    value = float(_chance_above(first[None], second[None])[0])
    drawn = _chance_above(_resampled(first, resamples), _resampled(second, resamples, stream=1))
    return _with_bounds(value, drawn, min(len(first), len(second)))


def performance_profile(scores: np.ndarray, thresholds: np.ndarray, resamples: int) -> np.ndarray:
    """Share of a method's runs and groups of questions that score above each threshold.

    Args:
        scores: [seeds, groups of questions].
        thresholds: [n].
        resamples: Number of resamples of the seeds, for each group on its own.

    Returns:
        [3, n]: the share and its bounds; the bounds are NaN with one seed.
    """
    shares = (scores[..., None] > thresholds).mean(axis=(0, 1))
    if len(scores) == 1:
        return np.vstack([shares, np.full((2, len(thresholds)), np.nan)])
    drawn = np.stack([(drawn[..., None] > thresholds).mean(axis=(0, 1)) for drawn in _resampled(scores, resamples)])
    return np.vstack([shares, np.quantile(drawn, _TAILS, axis=0)])


def _resampled(scores: np.ndarray, resamples: int, stream: int = 0) -> np.ndarray:
    """Draw the seeds' scores again, separately for each group of questions, [resamples, seeds, groups]."""
    drawn = np.random.default_rng((0, stream)).integers(len(scores), size=(resamples, *scores.shape))
    return scores[drawn, np.arange(scores.shape[1])]


def _chance_above(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    above = first[:, :, None] > second[:, None]
    return (above + 0.5 * (first[:, :, None] == second[:, None])).mean(axis=(1, 2, 3))


def _with_bounds(value: float, drawn: np.ndarray, num_seeds: int) -> Estimate:
    return Estimate(value, *map(float, np.quantile(drawn, _TAILS))) if num_seeds > 1 else Estimate(value)


def _samples(first: np.ndarray, second: np.ndarray, by_seed: bool) -> list[np.ndarray]:
    """The independent samples of seeds, each [seeds, questions]: the differences of the pairs, or both methods."""
    return [first.astype(float) - second] if by_seed else [first, second]


# --- Student's t -----------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A part of the variance of a figure, and its degrees of freedom."""

    variance: float
    freedom: float


def _between_seeds(*by_seed: np.ndarray, num_seeds: int | None = None) -> list[_Part]:
    """The variance of a sum of means over independent samples of seeds; empty if none has more than one seed.

    Args:
        by_seed: For each sample the figure of each seed.
        num_seeds: The variance of means over so many seeds of each sample; None: over those that there are.
    """
    parts = []
    for sample in by_seed:
        count = num_seeds or len(sample)
        if len(sample) > 1:
            parts.append(_Part(_variance(sample) / count, count - 1))
    if not parts:
        return []
    total = sum(part.variance for part in parts)
    spread = sum(part.variance**2 / part.freedom for part in parts)
    return [_Part(total, total**2 / spread if spread else parts[0].freedom)]  # after Satterthwaite


def _pooled(samples: Sequence[np.ndarray], num_seeds: int) -> list[_Part]:
    """The variance of a mean over so many seeds, if it is the same in all samples; empty if none has two seeds."""
    several = [sample for sample in samples if len(sample) > 1]
    if not several:
        return []
    freedom = sum(len(sample) - 1 for sample in several)
    squares = sum(_variance(sample) * (len(sample) - 1) for sample in several)
    return [_Part(squares / freedom / num_seeds, freedom)]


def _variance(sample: np.ndarray) -> float:
    """The variance of what at least two seeds were drawn from; 0 if they are alike but for rounding."""
    return 0.0 if np.ptp(sample) < 1e-12 else float(sample.var(ddof=1))


def _half_width(parts: Sequence[_Part], level: float = LEVEL) -> float:
    """Half of the interval that holds this share of the cases; 0 if nothing varies."""
    return _of_quantiles(parts, (1 - level) / 2)


def _of_quantiles(parts: Sequence[_Part], tail: float) -> float:
    """Root of the sum of the variances, each times the square of the quantile with this chance above it."""
    if sum(part.variance for part in parts) <= _ROUNDING:
        return 0.0
    squares = [part.variance * stats.t.isf(tail, part.freedom) ** 2 for part in parts if part.variance]
    return float(np.sqrt(sum(squares)))


def _t_p_value(value: float, parts: Sequence[_Part]) -> float:
    """The chance of the widest interval around the value that does not hold 0, taken from 1."""
    if not _half_width(parts):
        return 1.0 if abs(value) < 1e-12 else 0.0

    def excess(log_p: float) -> float:
        return _of_quantiles(parts, np.exp(log_p) / 2) - abs(value)

    if excess(_LEAST_LOG_P) <= 0:
        return 0.0
    return float(np.exp(optimize.brentq(excess, _LEAST_LOG_P, 0.0))) if value else 1.0
