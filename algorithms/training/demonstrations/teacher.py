"""Demonstrations of the teacher model, sampled at the temperature of the run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from agentic_rag_env.errors import ConfigurationError
from algorithms.learner.config import DemonstrationsConfig
from algorithms.rollout.player import Player
from algorithms.training.demonstrations.source import DEMONSTRATION_SOURCES, Played, Source


@DEMONSTRATION_SOURCES.register("teacher", DemonstrationsConfig)
class Teacher(Source):
    """The run's teacher. It is loaded when it first plays."""

    by_model = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.networks.place_of_teacher is None:
            raise ConfigurationError(
                "Demonstrations come from the teacher (demonstrations.source=teacher), and model.teacher is null; name "
                "a model, or choose demonstrations.source=file, expert or endpoint."
            )

    @cached_property
    def _player(self) -> Player:
        return self.networks.player(self.networks.teacher(), self.envs)

    def play(self, items: Sequence[int], seed: tuple[int, ...]) -> Played:
        """See `Source`."""
        played, stats = self._player.rollout(items, seed=seed, source="teacher")
        return played, [None] * len(played), stats
