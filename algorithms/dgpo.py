"""Distillation-guided policy optimization: the teacher corrects wrong trajectories and leaves right ones alone.

Paper: Kotoge et al., "Can Compact Language Models Search Like Agents? Distillation-Guided Policy Optimization for
    Preserving Agentic RAG Capabilities", arXiv:2508.20324.
Sampled: by the policy, afresh in every step, after a cold start by `kd`.
Needed: a critic, and the teacher's log-probabilities of the policy's own tokens.
Credit: as in `ppo`, from r_t = c 1[t = last] - (1 - c) kl_coef (log q(y_t) - log p(y_t)), where c is 1 if the answer
    matches exactly and 0 otherwise, no answer included; q is the policy that sampled, p the teacher.
Loss: as in `ppo`.

Differs from the paper: wrong is what the environment calls wrong, not what has a small reward, and another reward than
exact match takes the place of the first c only; the KL estimate is the k1 of the authors' code, of
KL(policy || teacher), which has a sign and is not clamped unless kl_clip is set; time skips the environment's tokens.
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
        anchor: The teacher; "reference" leaves the form and takes the teacher away.
        selective: Penalize wrong trajectories only; False: all of them (the paper's ablation "uniform KL").
        length_neutral: Divide the penalty of a trajectory by its number of model-written tokens and multiply it by
            their mean over the penalized ones, so that at equal KL per token a short one costs as much as a long one.
    """

    anchor: str = "teacher"
    selective: bool = True
    length_neutral: bool = False
    warm_start: Any = field(default_factory=lambda: {"name": "kd"})


@ALGORITHMS.register("dgpo", DGPOConfig)
class DGPO(PPO):
    """PPO whose KL penalty pulls towards the teacher, and only what went wrong."""

    config: DGPOConfig

    def penalty_weights(self, batch: Batch) -> Tensor:
        """1 for wrong trajectories, or for all if not `selective`, and 0 for the others; by length if so set; [B]."""
        weights = (~batch.correct).to(batch.rewards.dtype) if self.config.selective else super().penalty_weights(batch)
        if not self.config.length_neutral:
            return weights
        lengths = batch.response_mask.sum(dim=1)
        mean_length = (weights * lengths).sum() / weights.sum().clamp(min=1)
        return weights * mean_length / lengths.clamp(min=1)

    def step_metrics(self, batch: Batch) -> dict[str, float]:
        """PPO's, and `wrong_fraction`: the share of wrong trajectories."""
        return {**super().step_metrics(batch), "wrong_fraction": 1.0 - float(batch.correct.float().mean())}
