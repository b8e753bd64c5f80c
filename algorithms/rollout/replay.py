"""The policy's latest trajectories, kept to be trained on again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from algorithms.learner.types import Trajectory
from algorithms.rollout.trajectory_files import pack, unpack


class Replay:
    """A bounded queue of trajectories: when it is full, a new one displaces the oldest.

    Args:
        capacity: Most trajectories to keep; 0 keeps none.
    """

    def __init__(self, capacity: int) -> None:
        self._trajectories: deque[Trajectory] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self._trajectories)

    @property
    def is_full(self) -> bool:
        """Whether the next trajectory displaces the oldest."""
        return len(self) == self._trajectories.maxlen

    def add(self, trajectories: Iterable[Trajectory]) -> None:
        """Append trajectories, oldest first."""
        self._trajectories.extend(trajectories)

    def sample(self, count: int, rng: np.random.Generator) -> list[Trajectory]:
        """Draw trajectories uniformly without repetition; return all of them if there are fewer."""
        picked = rng.choice(len(self), size=min(count, len(self)), replace=False)
        return [self._trajectories[index] for index in picked.tolist()]

    def state_dict(self) -> bytes:
        """All trajectories, without their text."""
        return pack(self._trajectories)

    def load_state_dict(self, state: bytes) -> None:
        """Restore what `state_dict` returned."""
        self._trajectories.clear()
        self.add(unpack(state))
