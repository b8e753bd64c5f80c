"""Figures of one update: summed up chunk by chunk on the device, and read once at its end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from algorithms.learner import ranks


class Figures:
    """Means of figures over one update. Everything stays on the device until the end.

    Args:
        fresh: See `Learner.update`.

    Attributes:
        first_minibatch: Whether the policy has not changed yet in this update.
    """

    def __init__(self, fresh: bool) -> None:
        self.fresh = fresh
        self.first_minibatch = True
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._largest: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Count each entry of `values`, of this process's share of the tokens, as one."""
        self._sums[name] = self._sums.get(name, 0) + values.detach().sum()
        self._counts[name] = self._counts.get(name, 0) + values.numel()

    def add_with_largest(self, name: str, values: Tensor) -> None:
        """Like `add` under the name with `_mean`; `_max` is the largest entry of all."""
        self.add(f"{name}_mean", values)
        largest = values.detach().max()
        self._largest[f"{name}_max"] = torch.maximum(self._largest.get(f"{name}_max", largest), largest)

    def add_whole(self, name: str, value: Tensor) -> None:
        """Count a figure of the whole minibatch, which every process knows, once."""
        if ranks.rank() == 0:
            self.add(name, value)

    def means(self) -> dict[str, float]:
        """Means and largest entries of what all processes have counted."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        totals = _read(self._sums)
        for own in ranks.gathered({name: (total, self._counts[name]) for name, total in totals.items()}):
            for name, (total, count) in own.items():
                sums[name] = sums.get(name, 0.0) + total
                counts[name] = counts.get(name, 0) + count
        largest: dict[str, float] = {}
        for found in ranks.gathered(_read(self._largest)):
            largest |= {name: max(value, largest.get(name, value)) for name, value in found.items()}
        return {name: total / counts[name] for name, total in sums.items()} | largest


def _read(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """Read all at once, because each read waits for the device."""
    values = torch.stack([figure.double() for figure in figures.values()]).tolist() if figures else []
    return dict(zip(figures, values, strict=True))
