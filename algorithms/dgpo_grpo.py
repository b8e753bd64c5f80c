"""Distillation-guided policy optimization with groups in place of a critic.

Paper: the ablation "w/ GRPO" of Kotoge et al., arXiv:2508.20324, which collapses there after some 265 steps.
Sampled: by the policy, afresh in every step, several times for each question, after a cold start by `kd`.
Needed: the teacher's log-probabilities of the policy's own tokens.
Credit: as in `grpo`, of exact match.
Loss: as in `grpo`, with the KL estimate pulling towards the teacher, and only where the answer is wrong.

Differs from the paper: how it puts the teacher's penalty into GRPO is not public; here it stands where GRPO has its
own, in the loss.
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
    """GRPO whose KL estimate pulls towards the teacher, and only what went wrong."""

    config: DGPOGRPOConfig

    def pays(self, correct: Tensor) -> Tensor:
        """Wrong trajectories and their tokens, [n] bool."""
        return ~correct
