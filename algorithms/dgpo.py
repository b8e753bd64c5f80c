"""Distillation-guided policy optimization: the teacher corrects wrong trajectories and leaves right ones alone.

Paper: Kotoge et al., "Can Compact Language Models Search Like Agents? Distillation-Guided Policy Optimization for
    Preserving Agentic RAG Capabilities", arXiv:2508.20324.
Sampled: by the policy, afresh in every step, after a cold start by `kd`.
Needed: a critic, and the teacher's log-probabilities of the policy's own tokens.
Credit: as in `ppo`, from r_t = c 1[t = last] - (1 - c) kl_coef (log q(y_t) - log p(y_t)). c is 1 if the answer matches
    exactly, and 0 if it does not or if there is none. q is the policy that sampled, p the teacher.
Loss: as in `ppo`.

Differs from the paper: the environment decides which trajectories are wrong, not the size of the reward. A reward other
than exact match replaces the first c only. The KL estimate is k1 of KL(policy || teacher), as in the authors' code: it
has a sign, and is clamped only if kl_clip is set. Time skips the environment's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from algorithms.learner.algorithm import ALGORITHMS
from algorithms.learner.types import Batch
from algorithms.ppo import PPO, PPOConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class DGPOConfig(PPOConfig):
    """Settings of `DGPO`.

    Attributes:
        anchor: Whom the KL penalty pulls towards. "teacher" is DGPO; "reference" keeps the same loss without a teacher.
        selective: Penalize wrong trajectories only; False: all of them (the paper's ablation "uniform KL").
        length_neutral: Divide the penalty of a trajectory by its number of model-written tokens, and multiply it by
            the mean of this number over the penalized ones. At equal KL per token, short and long then cost the same.
    """

    anchor: str = "teacher"
    selective: bool = True
    length_neutral: bool = False
    warm_start: Any = field(default_factory=lambda: {"name": "kd"})


@ALGORITHMS.register("dgpo", DGPOConfig)
class DGPO(PPO):
    """PPO whose KL penalty pulls wrong trajectories, and only these, towards the teacher."""

    config: DGPOConfig

    def penalty_weights(self, batch: Batch) -> Tensor:
        """Weights [B]: 1 for wrong trajectories (all, if not `selective`), else 0; scaled if `length_neutral`."""
        weights = (~batch.correct).to(batch.rewards.dtype) if self.config.selective else super().penalty_weights(batch)
        if not self.config.length_neutral:
            return weights
        lengths = batch.response_mask.sum(dim=1)
        mean_length = (weights * lengths).sum() / weights.sum().clamp(min=1)
        return weights * mean_length / lengths.clamp(min=1)

    def step_metrics(self, batch: Batch) -> dict[str, float]:
        """Figures of PPO, and `wrong_fraction`: the share of wrong trajectories."""
        return {**super().step_metrics(batch), "wrong_fraction": 1.0 - float(batch.correct.float().mean())}
