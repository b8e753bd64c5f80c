"""What an algorithm may decide: the hooks, their defaults, and the registry of the zoo.

A file in `algorithms/` that subclasses `Algorithm` and carries the decorator `@ALGORITHMS.register(name, Config)` is
all it takes; the training step calls the hooks in the order of their definition here and never asks for a name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import Registry
from algorithms.learner.types import Batch, Tokens

ALGORITHMS = Registry("algo")

#: What `Algorithm.needs` may name. "values" brings a critic, the log-probabilities a frozen network each.
NEEDS = frozenset({"values", "ref_logprobs", "teacher_logprobs", "entropy", "logits", "teacher_logits"})

LOSS_REDUCTIONS = ("token-mean", "seq-mean")


def check_settings(config: Any, allowed: str, test: Callable[[Any], bool], *names: str) -> None:
    """Refuse settings outside their range; for the `__post_init__` of a config.

    Args:
        config: The dataclass of settings.
        allowed: The range in words, as it follows "must be".
        test: Whether one value is in that range.
        *names: Fields to look at.

    Raises:
        ConfigurationError: A value fails the test; the message says the field, the range and the value.
    """
    for name in names:
        if not test(value := getattr(config, name)):
            raise ConfigurationError(f"{name} must be {allowed}, got {value!r}.")


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
        learning_rate: Peak learning rate.
        betas: Decay of the running mean and of the running square.
        weight_decay: Decoupled; on matrices only.
        warmup_fraction: Share of the steps with a linear warm-up, in [0, 1]; the first step is not at zero.
        schedule: "constant" after the warm-up, or "cosine" down to zero.
        max_grad_norm: Bound of the gradient's norm.
    """

    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_fraction: float = 0.0
    schedule: str = "constant"
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self, "above 0", lambda value: value > 0, "learning_rate", "max_grad_norm")
        check_settings(self, "at least 0", lambda value: value >= 0, "weight_decay")
        check_settings(self, "in [0, 1]", lambda value: 0 <= value <= 1, "warmup_fraction")
        check_settings(self, "'constant' or 'cosine'", lambda value: value in ("constant", "cosine"), "schedule")
        check_settings(self, "two numbers in [0, 1)", lambda value: len(value) == 2 and min(value) >= 0, "betas")
        check_settings(self, "two numbers in [0, 1)", lambda value: max(value) < 1, "betas")


@dataclass(kw_only=True)
class AlgorithmConfig:
    """What the settings of every algorithm have; an algorithm's own config adds to it.

    Attributes:
        batch_size: Trajectories per step.
        num_minibatches: Optimizer steps per pass over the batch.
        num_epochs: Passes over one batch; 1 for a batch drawn from stored trajectories.
        loss_reduction: "token-mean" over all model-written tokens of a minibatch, or "seq-mean": the mean over
            trajectories of each one's token mean.
        optimizer: Of the policy.
        warm_start: Settings (with `name`) of the algorithm whose result this one starts from; None: the raw model.
    """

    batch_size: int = 64
    num_minibatches: int = 1
    num_epochs: int = 1
    loss_reduction: str = "token-mean"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    warm_start: Any = None

    def __post_init__(self) -> None:
        check_settings(self, "at least 1", lambda value: value >= 1, "batch_size", "num_minibatches", "num_epochs")
        limit = self.batch_size
        check_settings(self, f"at most batch_size ({limit})", lambda value: value <= limit, "num_minibatches")
        check_settings(self, f"one of {', '.join(LOSS_REDUCTIONS)}", LOSS_REDUCTIONS.__contains__, "loss_reduction")


class Algorithm:
    """Base of the zoo. Only `num_steps` and `token_loss` must be written.

    Class attributes:
        needs: What the hooks read beyond the samples themselves, from `NEEDS`.
        trains_on: "policy": fresh rollouts of the policy; "teacher": stored correct trajectories of the teacher.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    trains_on: ClassVar[Literal["policy", "teacher"]] = "policy"

    def __init__(self, config: AlgorithmConfig) -> None:
        unknown = self.needs - NEEDS
        assert not unknown, f"{type(self).__name__}.needs names {sorted(unknown)}; allowed: {sorted(NEEDS)}"
        self.config = config

    def num_steps(self, num_demonstrations: int) -> int:
        """Training steps of a whole run.

        Args:
            num_demonstrations: Stored teacher trajectories; 0 where the algorithm does not train on them.
        """
        raise NotImplementedError

    def shape_rewards(self, batch: Batch) -> Tensor:
        """Rewards per token: by default the episode's return on its last model-written token.

        Returns:
            [B, T] float32, 0 where the model did not write.
        """
        token_rewards = torch.zeros_like(batch.old_logprobs)
        columns = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
        last = torch.where(batch.response_mask, columns, -1).amax(dim=1)
        rows = torch.nonzero(last >= 0).squeeze(1)
        token_rewards[rows, last[rows]] = batch.rewards[rows]
        return token_rewards

    def estimate_advantages(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Advantages and returns, both [B, T] float32; None (the default) where the loss reads neither."""
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
        """Figures worth logging beside the learner's own, from a scored and shaped batch; names without prefix."""
        return {}

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Called once after every training step; the place where a schedule moves."""

    def state_dict(self) -> dict[str, Any]:
        """What `after_step` changes; JSON-serializable."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo of `state_dict`."""
