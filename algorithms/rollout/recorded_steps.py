"""Decode steps that a GPU records once and replays: Python and its launches take longer than the GPU's own work.

A recording holds addresses and shapes. So its inputs and the cache must stay where they are, and the shapes must be
few: a step is computed for a round number of rows and columns, of which the last ones are not wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from algorithms.learner.transfers import pinned
from algorithms.rollout.kv_cache import EpisodeCache

#: Computes a step: inputs [3, n] and the number of columns, to what was drawn, [2, n].
Compute = Callable[[Tensor, int], Tensor]


class Recorder(Protocol):
    """Records computations on tensors that stay where they are."""

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record a computation without inputs, and return what replays it. A result is valid until the next one."""
        ...


def unrecorded(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A `Recorder` that computes anew each time: the same steps, at the same shapes, without recordings."""
    return compute


class RecordedSteps:
    """The decode steps of one cache, at no more than twelve shapes: three numbers of rows by four of columns.

    Rows beside those that run are computed, too. Each of them gets one token more at the end of its row, which its next
    real token overwrites.

    Args:
        cache: The cache. Recordings are thrown away when it grows.
        max_length: Most tokens of a row.
        recorder: Makes what records a step when its shape is first met, anew when the recordings are thrown away.
        device: Where the inputs go.
    """

    def __init__(
        self, cache: EpisodeCache, max_length: int, recorder: Callable[[], Recorder], device: torch.device
    ) -> None:
        self._cache, self._recorder, self._record = cache, recorder, recorder()
        self._widths = _halves(cache.num_rows, 3)
        self._lengths = _halves(max_length, 4)
        # Last token, length, bits of the uniform; and the place in the step before that drew the last token, or -1.
        self._inputs = torch.zeros(4, cache.num_rows, dtype=torch.long, device=device)
        # A recorder may compute a step twice, so what it reads and what it writes lie apart.
        self._drawn = torch.zeros(2, cache.num_rows, dtype=torch.long, device=device)
        self._last_ids = torch.zeros_like(self._drawn[0])
        self._steps: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self._stored = cache.stored

    def draw(
        self, compute: Compute, running: np.ndarray, lengths: np.ndarray, places_before: np.ndarray | None = None
    ) -> Tensor:
        """Begin to compute a step.

        Args:
            compute: Computes it. It must be the same function in every call.
            running: [3, n] int64, for the rows in the first n places: last token, length, and bits of the uniform.
            lengths: [R] int64, the lengths of the rows in all places; those in the first n places are not read.
            places_before: [n] int64, the places of these rows in the step before, which drew their last tokens; None:
                `running` holds the last tokens.

        Returns:
            [2, n], valid until the next step.
        """
        number = running.shape[1]
        width = next(width for width in self._widths if width >= number)
        inputs = np.zeros((4, len(lengths)), dtype=np.int64)
        inputs[1], inputs[3] = lengths, -1
        inputs[:3, :number] = running
        if places_before is not None:
            inputs[3, :number] = places_before
        longest = int(inputs[1, :width].max()) + 1
        length = next(length for length in self._lengths if length >= longest)
        self._inputs.copy_(pinned(torch.from_numpy(inputs), self._inputs.device), non_blocking=True)
        self._last_ids.copy_(self._drawn[0])
        self._cache.reserve(length)
        if self._stored is not self._cache.stored:
            self._stored = self._cache.stored
            self._steps.clear()
            # The memory of recordings can't be recorded into again once all of them are gone.
            self._record = self._recorder()
        if (width, length) not in self._steps:
            self._steps[width, length] = self._record(lambda: self._step(compute, width, length))
        return self._steps[width, length]()[:, :number]

    def _step(self, compute: Compute, width: int, length: int) -> Tensor:
        inputs = self._inputs[:, :width]
        given, lengths, uniforms, places_before = inputs
        last = torch.where(places_before < 0, given, self._last_ids[places_before.clamp(min=0)])
        self._drawn[:, :width] = compute(torch.stack((last, lengths, uniforms)), length)
        return self._drawn


def _halves(most: int, number: int) -> list[int]:
    """Up to this number of sizes: the largest, half of it, and so on, in ascending order."""
    return sorted({-(-most // 2**halving) for halving in range(number)})
