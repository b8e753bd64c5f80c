"""What a run has cost so far: seconds, tokens, episodes and steps, by name."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager


def spend(costs: MutableMapping[str, float], **more: float) -> None:
    """Add to the costs."""
    for name, cost in more.items():
        costs[name] = costs.get(name, 0.0) + cost


@contextmanager
def timed(costs: MutableMapping[str, float], name: str) -> Iterator[dict[str, float]]:
    """Add the seconds that a block takes to the costs.

    Args:
        costs: Where to add them.
        name: Name of the cost; it ends in `_s`.

    Yields:
        An empty dict. After the block it holds the seconds under the name of the log, `time/<name>`.
    """
    started, logged = time.perf_counter(), dict[str, float]()
    yield logged
    logged[f"time/{name}"] = seconds = time.perf_counter() - started
    spend(costs, **{name: seconds})


def cost_metrics(costs: Mapping[str, float]) -> dict[str, float]:
    """Costs since the start of a run by their names in the log: `cost/<name>`, or `time/<name>` for seconds."""
    return {f"cost/{name}": cost for name, cost in costs.items() if not name.endswith("_s")}


#: What each phase of a training step works through: the tokens that count for its speed.
_WORK = {"rollout": "sampled_tokens", "score": "trained_tokens", "update": "trained_tokens"}


def speeds(costs: Mapping[str, float], before: Mapping[str, float] | None = None) -> dict[str, float]:
    """Compute tokens per second of wall time in each phase that took place, as `<phase>_tokens_per_s`.

    A rollout counts the tokens that the policy wrote; scoring and the update count all tokens of the batches.

    Args:
        costs: Costs so far.
        before: Costs at the beginning of what is measured; None: everything so far.
    """

    def spent(name: str) -> float:
        return costs.get(name, 0.0) - (before or {}).get(name, 0.0)

    return {
        f"{phase}_tokens_per_s": spent(tokens) / spent(f"{phase}_s")
        for phase, tokens in _WORK.items()
        if spent(tokens) > 0 and spent(f"{phase}_s") > 0
    }
