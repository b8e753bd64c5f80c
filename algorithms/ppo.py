"""Proximal policy optimization from the outcome of the episode, with a critic and a leash to the initial policy.

Paper: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv:1707.06347; for search agents Jin et al.,
    "Search-R1", arXiv:2503.09516.
Sampled: by the policy, afresh in every step.
Needed: a critic, and, unless kl_coef is 0, the log-probabilities of the frozen initial policy.
Credit: generalized advantage estimation over the model-written tokens, of the reward (exact match) at the last one
    minus kl_coef times the KL estimate at each; the advantages are standardized over the batch.
Loss: clipped surrogate minus entropy bonus; clipped squared error for the critic.

Differs from the paper: time skips the environment's tokens in the advantages, in their standardization and in the
critic's loss, where the code of Search-R1 lets it run through retrieved passages.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from algorithms.learner import ops
from algorithms.learner.algorithm import ALGORITHMS, Algorithm, AlgorithmConfig, OptimizerConfig, check_settings
from algorithms.learner.types import Batch, Tokens


@dataclass(kw_only=True)
class PPOConfig(AlgorithmConfig):
    """Settings of `PPO`; the defaults are those measured on the bundled tiny world.

    Attributes:
        steps: Training steps, a fresh rollout each.
        kl_coef: Weight of the KL penalty in the reward.
        kl_estimator: Of the KL penalty, from the sampled token: "k1" (signed), "k2" or "k3", see `ops.kl_estimate`; or
            "exact": the sum over the vocabulary, at the price of one more pass of the policy.
        clip_range: Bound of the policy ratio's distance to 1.
        value_clip_range: Bound of a value's distance to the value before the update.
        entropy_coef: Weight of the entropy bonus.
        discount: Per model-written token.
        gae_lambda: 1: return minus value; lower: credit stays local, at the price of the critic's bias.
        critic_optimizer: Of the critic.
        critic_warmup_steps: Steps at the start in which only the critic learns.
    """

    batch_size: int = 96
    num_minibatches: int = 3
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            learning_rate=1e-3, betas=(0.9, 0.99), warmup_fraction=0.05, schedule="cosine"
        )
    )
    steps: int = 150
    kl_coef: float = 0.001
    kl_estimator: str = "k1"
    clip_range: float = 0.2
    value_clip_range: float = 0.5
    entropy_coef: float = 0.001
    discount: float = 1.0
    gae_lambda: float = 1.0
    critic_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=1.5e-3, betas=(0.9, 0.99), warmup_fraction=0.05)
    )
    critic_warmup_steps: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, "above 0", lambda value: value > 0, "steps", "clip_range", "value_clip_range")
        check_settings(self, "at least 0", lambda value: value >= 0, "kl_coef", "entropy_coef", "critic_warmup_steps")
        check_settings(self, "in [0, 1]", lambda value: 0 <= value <= 1, "discount", "gae_lambda")
        estimators = (*ops.KL_ESTIMATORS, "exact")
        check_settings(self, f"one of {', '.join(estimators)}", estimators.__contains__, "kl_estimator")


@ALGORITHMS.register("ppo", PPOConfig)
class PPO(Algorithm):
    """Clipped policy gradient on exact match, with a KL penalty in the reward.

    Attributes:
        anchor: Whom the penalty pulls towards: "ref", the initial policy, or "teacher".
    """

    anchor = "ref"
    config: PPOConfig

    def __init__(self, config: PPOConfig) -> None:
        self._exact = config.kl_estimator == "exact"
        penalty = f"{self.anchor}_kl" if self._exact else f"{self.anchor}_logprobs"
        read = {"values": True, "entropy": config.entropy_coef > 0, penalty: config.kl_coef > 0}
        self.needs = frozenset(name for name, is_read in read.items() if is_read)
        super().__init__(config)

    def num_steps(self, num_demonstrations: int) -> int:
        """`steps`, whatever is stored."""
        return self.config.steps

    def penalty_weights(self, batch: Batch) -> Tensor:
        """What share of the KL penalty each trajectory pays, [B] float32; here all of it."""
        return torch.ones_like(batch.rewards)

    def shape_rewards(self, batch: Batch) -> Tensor:
        """The reward at the last model-written token minus `kl_coef` times the KL estimate at each, [B, T]."""
        token_rewards = super().shape_rewards(batch)
        if self.config.kl_coef == 0:
            return token_rewards
        weights = self.penalty_weights(batch)
        return token_rewards - self.config.kl_coef * weights[:, None] * self._anchor_kl(batch, weights > 0)

    def estimate_advantages(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Standardized advantages, and returns as they are, both [B, T]."""
        advantages, returns = ops.gae(
            batch.token_rewards, batch.values, batch.response_mask, self.config.discount, self.config.gae_lambda
        )
        return ops.standardize(advantages, batch.response_mask), returns

    def token_loss(self, tokens: Tokens) -> Tensor:
        """Clipped surrogate minus entropy bonus, [n]."""
        surrogate = ops.clipped_surrogate(
            tokens.logprobs, tokens.old_logprobs, tokens.advantages, self.config.clip_range
        )
        return surrogate - self.config.entropy_coef * tokens.entropy if self.config.entropy_coef > 0 else surrogate

    def value_loss(self, tokens: Tokens) -> Tensor:
        """Half the squared error, with the value clipped around its old self, [n]."""
        return ops.clipped_value_loss(tokens.values, tokens.old_values, tokens.returns, self.config.value_clip_range)

    def step_metrics(self, batch: Batch) -> dict[str, float]:
        """`anchor_kl`: mean KL estimate per token over the trajectories that pay for it; absent where none does."""
        if self.config.kl_coef == 0:
            return {}
        pays = self.penalty_weights(batch) > 0
        num_tokens = int(batch.response_mask[pays].sum())
        return {"anchor_kl": float(self._anchor_kl(batch, pays).sum()) / num_tokens} if num_tokens else {}

    def _anchor_kl(self, batch: Batch, pays: Tensor) -> Tensor:
        """The KL estimate at each model-written token of the trajectories that pay, [B, T] nats, 0 elsewhere."""
        if self._exact:
            estimate = getattr(batch, f"{self.anchor}_kl")
        else:
            anchor_logprobs = getattr(batch, f"{self.anchor}_logprobs")
            estimate = ops.kl_estimate(batch.old_logprobs, anchor_logprobs, self.config.kl_estimator)
        return estimate.masked_fill(~(batch.response_mask & pays[:, None]), 0.0)
