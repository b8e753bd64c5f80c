"""AdamW with its schedule, its gradient clipping, and the refusal to step on a gradient that is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from algorithms.learner import ranks, sharding
from algorithms.learner.algorithm import OptimizerConfig


class Optimizer:
    """Applies the accumulated gradients of one network.

    Args:
        name: Name of the network, for error messages.
        parameters: Those that require a gradient are trained. Vectors (biases, norms) get no weight decay.
        config: Settings.
        total_steps: Training steps of the whole run.
        first_step: The first of them in which this network is trained, and in which its schedule begins.
    """

    def __init__(
        self,
        name: str,
        parameters: Iterable[nn.Parameter],
        config: OptimizerConfig,
        total_steps: int,
        first_step: int = 0,
    ) -> None:
        self.name, self.config, self.total_steps, self.first_step = name, config, total_steps, first_step
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        first, second = config.betas
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=config.learning_rate, betas=(first, second), fused=True
        )

    def learning_rate(self, step: int) -> float:
        """Learning rate of a training step, counted from 0: linear warm-up, then constant or a cosine down to zero.

        The steps before the first one have 0.
        """
        step, total_steps = step - self.first_step, self.total_steps - self.first_step
        if step < 0:
            return 0.0
        warmup_steps = round(self.config.warmup_fraction * total_steps)
        if step < warmup_steps:
            return self.config.learning_rate * (step + 1) / warmup_steps
        if self.config.schedule == "constant":
            return self.config.learning_rate
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return self.config.learning_rate * (1 + math.cos(math.pi * progress)) / 2

    def zero_grad(self) -> None:
        """Forget the accumulated gradients."""
        self.adamw.zero_grad()

    def apply(self, loss: Tensor, step: int) -> Tensor:
        """Sum the gradients over the processes, clip them and step.

        Args:
            loss: [], the loss that the gradients belong to.
            step: The training step, counted from 0.

        Returns:
            [], the norm of the gradient before clipping.

        Raises:
            FloatingPointError: Loss or gradient is not finite; these parameters have not been changed.
        """
        # Those of sharded weights were summed in the backward pass.
        ranks.sum_gradients([each for each in self.parameters if not isinstance(each, DTensor)])
        norm = sharding.whole(nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm))
        if not torch.isfinite(loss + norm):
            raise FloatingPointError(
                f"Training step {step + 1}: the loss of the {self.name} is {float(loss)} and the norm of its gradient"
                f" {float(norm)}. This minibatch did not change the {self.name}. Begin again, from the last checkpoint"
                f" if you like (model.policy=<run dir>/checkpoints/<step>), with a lower learning rate (now"
                f" {self.learning_rate(step):.3g}), a longer warm-up, or learner.precision=float32."
            )
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate(step)
        self.adamw.step()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The running averages, whole, in the first process. All processes call this at once."""
        return sharding.whole_state(self.adamw.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        trained = [parameter for group in self.adamw.param_groups for parameter in group["params"]]
        averages = {  # copies, because a value that is kept would keep the whole file that it was mapped from
            number: {
                name: sharding.like(value, trained[number]) if value.dim() else value.clone()
                for name, value in each.items()
            }
            for number, each in state["state"].items()
        }
        self.adamw.load_state_dict({**state, "state": averages})
