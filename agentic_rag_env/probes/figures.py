"""Defines the figures of a probe: a number, how many items it rests on, its bootstrap interval, which way is good."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, TypedDict

import numpy as np

RESAMPLES = 2000

#: Which values of a figure are good: high ones, low ones, or neither.
Best: TypeAlias = Literal["high", "low"] | None


class Figure(TypedDict):
    """A mean over items, one value for each.

    `value` is the mean, `n` the number of items, `interval` the mean's 95 % bootstrap percentile interval over items.
    `best` says which way is good. `share` says that the value of each item lies in [0, 1], so that the distance from
    the best value means the same everywhere.
    """

    value: float
    n: int
    interval: tuple[float, float]
    best: Best
    share: bool


Figures: TypeAlias = dict[str, Figure]


def share(values: Any, best: Best = None, *, weights: Any = None, seed: int = 0) -> Figure:
    """The mean of one value in [0, 1] per item, such as a score or a yes-or-no value; see `figure`."""
    return Figure(**{**figure(values, best, weights=weights, seed=seed), "share": True})


def figure(values: Any, best: Best = None, *, weights: Any = None, seed: int = 0) -> Figure:
    """The mean of one value per item, `sum(values) / sum(weights)`. A value is any number, such as seconds.

    Args:
        values: [n], at least one; bools count as 0 and 1.
        best: Which way is good; None: neither.
        weights: [n], above 0; None: 1 for each. With weights, the mean is over smaller units, such as the turns of an
            episode, while whole items are resampled.
        seed: Seed of the resampling.
    """
    values, weights = _arrays(values, weights)
    value = float(values.sum() / weights.sum())
    bounds = _bounds(resampled_means(values, weights, seed))
    return Figure(value=value, n=len(values), interval=bounds, best=best, share=False)


def interval(values: Any, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap percentile interval of a mean; a point where all values are equal.

    Args:
        values: [n].
        seed: Seed of the resampling.
    """
    return _bounds(resampled_means(values, seed=seed))


def macro_interval(groups: Sequence[Any], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap percentile interval of the unweighted mean of the means of groups, resampled group by group.

    Args:
        groups: Values [n_i] of each group.
        seed: Seed of the resampling.
    """
    return _bounds(np.mean([resampled_means(values, seed=seed + place) for place, values in enumerate(groups)], axis=0))


def resampled_means(values: Any, weights: Any = None, seed: int = 0) -> np.ndarray:
    """Means of bootstrap samples of the items.

    The numbers of times that each distinct value is drawn are multinomial. So the cost of a sample grows with the
    number of distinct values, not with the number of items.

    Args:
        values: [n].
        weights: [n], see `figure`.
        seed: Seed of the resampling.

    Returns:
        [RESAMPLES] float64.
    """
    values, weights = _arrays(values, weights)
    distinct, counts = np.unique(np.stack((values, weights), axis=1), axis=0, return_counts=True)
    if len(distinct) == 1:
        return np.full(RESAMPLES, distinct[0, 0] / distinct[0, 1])
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=RESAMPLES)
    return draws @ distinct[:, 0] / (draws @ distinct[:, 1])


def _arrays(values: Any, weights: Any) -> tuple[np.ndarray, np.ndarray]:
    values = np.asarray(values, dtype=float)
    return values, np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)


def _bounds(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
