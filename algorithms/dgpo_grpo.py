"""Distillation-guided policy optimization with groups in place of a critic.

Paper: the ablation "w/ GRPO" of Kotoge et al., arXiv:2508.20324. It collapses there after some 265 steps.
Sampled: by the policy, afresh in every step, several times for each question, after a cold start by `kd`.
Needed: the teacher's log-probabilities of the policy's own tokens.
Credit: as in `grpo`, from exact match.
Loss: as in `grpo`, but the KL estimate pulls towards the teacher, and only where the answer is wrong.

Differs from the paper: the paper does not say how it puts the teacher's penalty into GRPO. Here the penalty stands in
the loss, in the place of GRPO's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from algorithms.grpo import GRPO, GRPOConfig
from algorithms.learner.algorithm import ALGORITHMS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class DGPOGRPOConfig(GRPOConfig):
    """Settings of `DGPOGRPO`."""

    anchor: str = "teacher"
    warm_start: Any = field(default_factory=lambda: {"name": "kd"})


@ALGORITHMS.register("dgpo_grpo", DGPOGRPOConfig)
class DGPOGRPO(GRPO):
    """GRPO whose KL estimate pulls wrong trajectories, and only these, towards the teacher."""

    config: DGPOGRPOConfig

    def pays(self, correct: Tensor) -> Tensor:
        """Select wrong trajectories and their tokens, [n] bool."""
        return ~correct
