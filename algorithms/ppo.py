"""Proximal policy optimization from the outcome of the episode, with a critic and a leash to the initial policy.

Paper: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv:1707.06347; for search agents Jin et al.,
    "Search-R1", arXiv:2503.09516.
Sampled: by the policy, afresh in every step.
Needed: a critic, and the log-probabilities of the frozen initial policy.
Credit: generalized advantage estimation over the model-written tokens, of exact match at the last one minus kl_coef
    times the KL estimate at each; the advantages are standardized over the batch.
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
from algorithms.learner.ops import KL_ESTIMATORS
from algorithms.learner.types import Batch, Tokens


@dataclass(kw_only=True)
class PPOConfig(AlgorithmConfig):
    """Settings of `PPO`; the defaults are those measured on the bundled tiny world.

    Attributes:
        steps: Training steps, a fresh rollout each.
        kl_coef: Weight of the KL penalty in the reward.
        kl_estimator: "k1" (signed), "k2" or "k3", see `ops.kl_estimate`.
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
        check_settings(self, f"one of {', '.join(KL_ESTIMATORS)}", KL_ESTIMATORS.__contains__, "kl_estimator")


@ALGORITHMS.register("ppo", PPOConfig)
class PPO(Algorithm):
    """Clipped policy gradient on exact match, with a KL penalty in the reward."""

    needs = frozenset({"values", "ref_logprobs", "entropy"})
    config: PPOConfig

    def num_steps(self, num_demonstrations: int) -> int:
        """`steps`, whatever is stored."""
        return self.config.steps

    def anchor(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the KL penalty pulls towards, and who pays it.

        Returns:
            Log-probabilities [B, T] in nats, and [B] bool, True for the trajectories that are penalized.
        """
        return batch.ref_logprobs, torch.ones_like(batch.correct)

    def shape_rewards(self, batch: Batch) -> Tensor:
        """Exact match at the last model-written token minus `kl_coef` times the KL estimate at each, [B, T]."""
        token_rewards = super().shape_rewards(batch)
        if self.config.kl_coef == 0:
            return token_rewards
        return token_rewards - self.config.kl_coef * self._kl_penalty(batch)

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
        return surrogate - self.config.entropy_coef * tokens.entropy

    def value_loss(self, tokens: Tokens) -> Tensor:
        """Half the squared error, with the value clipped around its old self, [n]."""
        return ops.clipped_value_loss(tokens.values, tokens.old_values, tokens.returns, self.config.value_clip_range)

    def step_metrics(self, batch: Batch) -> dict[str, float]:
        """`anchor_kl`: mean KL estimate per token over the trajectories that pay it; absent where none does."""
        _, pays = self.anchor(batch)
        num_tokens = int(batch.response_mask[pays].sum())
        return {"anchor_kl": float(self._kl_penalty(batch).sum()) / num_tokens} if num_tokens else {}

    def _kl_penalty(self, batch: Batch) -> Tensor:
        anchor_logprobs, pays = self.anchor(batch)
        estimate = ops.kl_estimate(batch.old_logprobs, anchor_logprobs, self.config.kl_estimator)
        return estimate.masked_fill(~(batch.response_mask & pays[:, None]), 0.0)
