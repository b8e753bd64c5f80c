"""What an algorithm may decide: the hooks, their defaults, and the registry of the zoo.

A new algorithm is one file in `algorithms/`. It subclasses `Algorithm` under the decorator
`@ALGORITHMS.register(name, Config)`. The training step calls the hooks in the order of their definition here and never
asks for a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import Registry, did_you_mean
from agentic_rag_env.settings import Allowed, check_value
from algorithms.learner.config import (
    AlgorithmConfig,
    CriticConfig,
    DemonstrationConfig,
    OptimizerConfig,
    PolicyGradientConfig,
)
from algorithms.learner.types import Batch, Tokens

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ALGORITHMS",
    "NEEDS",
    "SOURCES",
    "Algorithm",
    "AlgorithmConfig",
    "CriticConfig",
    "DemonstrationConfig",
    "OptimizerConfig",
    "PolicyGradientConfig",
    "Progress",
    "Role",
]

ALGORITHMS = Registry("algo")


class Role(StrEnum):
    """A network beside the policy."""

    CRITIC = "critic"
    REFERENCE = "reference"
    TEACHER = "teacher"


#: What `Algorithm.needs` may name, and the network that it brings: the critic; the reference, which is the policy as it
#: was when the stage began, frozen; or the teacher.
NEEDS: dict[str, Role | None] = {
    "values": Role.CRITIC,
    "ref_logprobs": Role.REFERENCE,
    "ref_kl": Role.REFERENCE,
    "teacher_logprobs": Role.TEACHER,
    "teacher_kl": Role.TEACHER,
    "teacher_logits": Role.TEACHER,
    "logits": None,
    "entropy": None,
}

#: What `Algorithm.trains_on` may name, and `Algorithm.source` answer.
SOURCES = frozenset({"policy", "teacher", "replay"})


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training stands when a step begins.

    Attributes:
        step: Steps done.
        total_steps: Steps of the whole training.
        replay_size: Trajectories that can be replayed.
        replay_is_full: Whether each further trajectory displaces the oldest.
    """

    step: int
    total_steps: int
    replay_size: int = 0
    replay_is_full: bool = False

    @property
    def fraction(self) -> float:
        """Share of the training that is done, in [0, 1)."""
        return self.step / self.total_steps


class Algorithm:
    """Base of the zoo. Only `num_steps` and `token_loss` must be written.

    Attributes that a subclass sets; where they depend on settings, its constructor sets them:
        needs: What the hooks read beyond the samples themselves, from `NEEDS`.
        trains_on: Where its trajectories come from. "policy": fresh rollouts of the policy; "teacher": stored
            trajectories of the teacher; "replay": earlier rollouts of the policy.
        rollouts_per_prompt: Trajectories of each question in a batch of fresh rollouts; must divide `batch_size`.
        sampling_temperature: Temperature of fresh rollouts; None: the run's, which is also that of the losses.
        replay_capacity: Number of newest trajectories kept for replay.
        num_validation: Demonstrations held out for `after_validation`.

    Attributes:
        name: What the algorithm is called in the tables and files of a run.
    """

    name: str = ""

    needs: frozenset[str] = frozenset()
    trains_on: frozenset[str] = frozenset({"policy"})
    rollouts_per_prompt: int = 1
    sampling_temperature: float | None = None
    replay_capacity: int = 0
    num_validation: int = 0

    def __init__(self, config: AlgorithmConfig) -> None:
        for name, allowed in (("needs", NEEDS), ("trains_on", SOURCES)):
            unknown = getattr(self, name) - frozenset(allowed)
            if unknown:
                raise ConfigurationError(
                    f"{type(self).__name__}.{name} declares {', '.join(map(repr, sorted(unknown)))}."
                    f"{did_you_mean(min(unknown), allowed)}"
                )
        self.config = config
        self._refuse_what_is_lacking()

    @property
    def roles(self) -> frozenset[Role]:
        """The networks beside the policy that the needs bring."""
        return frozenset(role for need in self.needs if (role := NEEDS[need]) is not None)

    def _refuse_what_is_lacking(self) -> None:
        """Refuse at the start an algorithm that would fail after the first rollouts."""
        name, kind = type(self).__name__, type(self)
        hooks = {"num_steps": True, "token_loss": True, "value_loss": Role.CRITIC in self.roles}
        hooks["source"] = len(self.trains_on) != 1
        reasons = {"value_loss": ", since it needs values", "source": ", since trains_on has several entries"}
        for hook, is_needed in hooks.items():
            if is_needed and getattr(kind, hook) is getattr(Algorithm, hook):
                why = reasons.get(hook, "")
                raise ConfigurationError(f"{name} must define {hook}{why}; see Algorithm.{hook} in {__name__}.")
        bases = {DemonstrationConfig: "teacher" in self.trains_on, CriticConfig: Role.CRITIC in self.roles}
        for base, is_needed in bases.items():
            if is_needed and not isinstance(self.config, base):
                reason = "needs values" if base is CriticConfig else "trains on the teacher's trajectories"
                raise ConfigurationError(
                    f"{name} {reason}, so its settings, {type(self.config).__name__}, must extend {base.__name__} of "
                    f"{__name__}."
                )
        if "policy" in self.trains_on:
            size = self.config.batch_size
            divisor = Allowed(f"a divisor of batch_size ({size})", lambda value: value >= 1 and size % value == 0)
            check_value(f"{name}.rollouts_per_prompt", self.rollouts_per_prompt, divisor)

    def num_steps(self, num_demonstrations: int) -> int:
        """Training steps of a whole run.

        Args:
            num_demonstrations: Stored teacher trajectories; 0 where the algorithm does not train on them.
        """
        raise NotImplementedError

    def source(self, progress: Progress, rng: np.random.Generator) -> str:
        """Choose where the batch of the next step comes from. Write this hook if `trains_on` has more than one entry.

        Args:
            progress: Where training stands.
            rng: Generator for draws; seeded by the step, so that a resumed run decides alike.

        Returns:
            An entry of `trains_on`; "replay" only while there is something to replay.
        """
        (only,) = self.trains_on
        return only

    def anchored(self, batch: Batch) -> Tensor:
        """Select the trajectories whose figures of reference and teacher the hooks read, [B] bool; by default all.

        Called before these figures (`batch.ref_...` and `batch.teacher_...`) are computed, so it decides by what was
        sampled. The figures of the other trajectories stay 0, and their forward passes are saved.
        """
        return batch.correct.new_ones(len(batch))

    def shape_rewards(self, batch: Batch) -> Tensor:
        """Rewards per token: by default the episode's return on its last model-written token.

        Returns:
            [B, T] float32, 0 where the model did not write.
        """
        is_last = batch.response_mask & (batch.response_mask.flip(1).cumsum(dim=1).flip(1) == 1)
        return batch.rewards[:, None].to(batch.old_logprobs.dtype) * is_last

    def estimate_advantages(self, batch: Batch) -> tuple[Tensor, Tensor | None] | None:
        """Advantages and returns, both [B, T] float32; None (the default) where the loss reads neither.

        Returns are the critic's target; None where there is no critic.
        """
        return None

    def token_loss(self, tokens: Tokens) -> Tensor:
        """Loss of the policy.

        Returns:
            [n] float32; the learner weighs and sums it.
        """
        raise NotImplementedError

    def value_loss(self, tokens: Tokens) -> Tensor:
        """Loss of the critic, [n] float32; called only where "values" is needed."""
        raise NotImplementedError

    def step_metrics(self, batch: Batch) -> dict[str, float]:
        """Figures to log beside the learner's own, from a scored and shaped batch; names without prefix."""
        return {}

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Change state after a training step, such as the position of a schedule. Called once after every step.

        Args:
            metrics: The step's figures, without prefix, and `progress`: the share of all steps that were done when
                this one began, in [0, 1).
        """

    def after_validation(self, loss: float) -> None:
        """Take the loss on held-out demonstrations, if there are any: before the first step and after each pass."""

    def state_dict(self) -> dict[str, Any]:
        """What `after_step` and `after_validation` change; JSON-serializable."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def trains_language_model(name: str) -> bool:
    """Whether an algorithm is one of ours; others are learners of other libraries, such as `maskable_ppo`.

    Raises:
        UnknownNameError: There is no such algorithm.
    """
    factory = ALGORITHMS.get(name).factory
    return isinstance(factory, type) and issubclass(factory, Algorithm)
