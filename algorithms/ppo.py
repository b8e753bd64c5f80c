"""Proximal policy optimization from the outcome of the episode, with a critic and a leash to the initial policy.

Paper: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv:1707.06347; for search agents Jin et al.,
    "Search-R1", arXiv:2503.09516.
Sampled: by the policy, afresh in every step.
Needed: a critic, and, unless kl_coef is 0, the log-probabilities of the frozen initial policy.
Credit: generalized advantage estimation over the model-written tokens. The last one earns the reward (exact match), and
    each pays kl_coef times the KL estimate. The advantages are standardized over the batch. In its own advantage each
    token pays k1, whatever the estimate: sampled gradients know nothing of how an estimate's value depends on the
    policy, and the mean of k1 times the score is the gradient of the KL, which those of the others are not.
Loss: clipped surrogate minus entropy bonus; clipped squared error for the critic.

Differs from the paper: time skips the environment's tokens in the advantages, in their standardization and in the
critic's loss. In the code of Search-R1 it runs through retrieved passages. The critic's head starts at zero
(`learner.networks.Critic`), and weight decay is on matrices only (`learner.config.OptimizerConfig`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentic_rag_env.settings import FRACTION, check_settings, one_of
from algorithms.learner import ops
from algorithms.learner.algorithm import ALGORITHMS, Algorithm, CriticConfig, PolicyGradientConfig
from algorithms.learner.config import ANCHORS
from algorithms.learner.types import Batch, Tokens

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class PPOConfig(PolicyGradientConfig, CriticConfig):
    """Settings of `PPO`.

    Attributes:
        kl_estimator: How the KL penalty is estimated: "k1" (signed), "k2" or "k3" from the sampled token, see
            `ops.kl_estimate`; or "exact", the sum over the vocabulary, which costs one more pass of the policy. A token
            pays k1 for itself, and the estimate of those that follow.
        discount: Weight of the next model-written token's value.
        gae_lambda: 1: return minus value; lower: credit stays local, at the price of the critic's bias.
    """

    discount: float = 1.0
    gae_lambda: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, FRACTION, "discount", "gae_lambda")
        estimators = (*ops.KL_ESTIMATORS, "exact")
        check_settings(self, one_of(estimators), "kl_estimator")


@ALGORITHMS.register("ppo", PPOConfig)
class PPO(Algorithm):
    """Clipped policy gradient on exact match, with a KL penalty in the reward."""

    config: PPOConfig

    def __init__(self, config: PPOConfig) -> None:
        pays, anchor = config.kl_coef > 0, ANCHORS[config.anchor]
        self._logprobs, self._kl = f"{anchor}_logprobs", f"{anchor}_kl"
        read = {"values": True, "entropy": config.entropy_coef > 0, self._logprobs: pays}
        read[self._kl] = pays and config.kl_estimator == "exact"
        self.needs = frozenset(name for name, is_read in read.items() if is_read)
        super().__init__(config)

    def num_steps(self, num_demonstrations: int) -> int:
        """Return the setting `steps`; stored demonstrations don't matter."""
        return self.config.steps

    def penalty_weights(self, batch: Batch) -> Tensor:
        """Share of the KL penalty that each trajectory pays, [B] float32; here 1. It may depend on samples only."""
        return batch.rewards.new_ones(batch.rewards.shape)

    def anchored(self, batch: Batch) -> Tensor:
        """Select the trajectories that pay, [B] bool; nobody asks what the others would pay."""
        return self.penalty_weights(batch) > 0

    def shape_rewards(self, batch: Batch) -> Tensor:
        """The reward at the last model-written token minus `kl_coef` times the KL estimate at each, [B, T]."""
        token_rewards = super().shape_rewards(batch)
        if self.config.kl_coef == 0:
            return token_rewards
        return token_rewards - self._penalty(batch, self.config.kl_estimator)

    def estimate_advantages(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Standardized advantages, and returns as they are, both [B, T]."""
        advantages, returns = ops.gae(
            batch.token_rewards, batch.values, batch.response_mask, self.config.discount, self.config.gae_lambda
        )
        if self.config.kl_coef > 0 and self.config.kl_estimator != "k1":
            advantages += self._penalty(batch, self.config.kl_estimator) - self._penalty(batch, "k1")
        return ops.standardize(advantages, batch.response_mask), returns

    def token_loss(self, tokens: Tokens) -> Tensor:
        """Clipped surrogate minus entropy bonus, [n]."""
        config = self.config
        loss = ops.clipped_surrogate(tokens.logprobs, tokens.old_logprobs, tokens.advantages, *config.clip_ranges)
        return loss - config.entropy_coef * tokens.entropy if config.entropy_coef > 0 else loss

    def value_loss(self, tokens: Tokens) -> Tensor:
        """Half the squared error, with the value clipped around its old self, [n]."""
        return ops.clipped_value_loss(tokens.values, tokens.old_values, tokens.returns, self.config.value_clip_range)

    def step_metrics(self, batch: Batch) -> dict[str, float]:
        """Figures of the KL penalty; none without a penalty.

        `penalty_mean` and `penalty_variance`: mean and variance of what each trajectory pays in all. The variance
        compares with that of the reward. `anchor_kl`: mean KL estimate per token over the trajectories that pay; absent
        where none does.
        """
        if self.config.kl_coef == 0:
            return {}
        weights = self.penalty_weights(batch)
        divergence = self._anchor_kl(batch, weights > 0, self.config.kl_estimator).sum(dim=1)
        figures = ops.penalty_figures(self.config.kl_coef * weights * divergence)
        num_tokens = int(batch.response_mask[weights > 0].sum())
        return figures | ({"anchor_kl": float(divergence.sum()) / num_tokens} if num_tokens else {})

    def _penalty(self, batch: Batch, estimator: str) -> Tensor:
        """What each model-written token pays by an estimate, [B, T]."""
        weights = self.penalty_weights(batch)
        return self.config.kl_coef * weights[:, None] * self._anchor_kl(batch, weights > 0, estimator)

    def _anchor_kl(self, batch: Batch, pays: Tensor, estimator: str) -> Tensor:
        """The KL estimate at each model-written token of the trajectories that pay, [B, T] nats, 0 elsewhere."""
        clip = self.config.kl_clip
        if estimator == "exact":
            divergence: Tensor = getattr(batch, self._kl)
            estimate = divergence if clip is None else divergence.clamp(max=clip)
        else:
            estimate = ops.kl_estimate(batch.old_logprobs, getattr(batch, self._logprobs), estimator, clip)
        return estimate.masked_fill(~(batch.response_mask & pays[:, None]), 0.0)
