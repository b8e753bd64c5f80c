"""Group relative policy optimization: the siblings of a trajectory are its baseline, so there is no critic.

Paper: Shao et al., "DeepSeekMath", arXiv:2402.03300, section 4.1; for search agents Jin et al., "Search-R1",
    arXiv:2503.09516.
Sampled: by the policy, afresh in every step, `rollouts_per_prompt` times for each question.
Needed: the log-probabilities of the frozen initial policy, unless kl_coef is 0.
Credit: every token of a trajectory gets the trajectory's reward minus the group's mean, divided by the group's standard
    deviation.
Loss: clipped surrogate plus kl_coef times the KL estimate minus entropy bonus.

Differs from the paper: the loss is the token mean of the minibatch, as in DAPO (loss_reduction=seq-mean is the
paper's, constant that of Dr. GRPO). The entropy bonus is that of the code of Search-R1. A group of one is refused,
where that code takes the bare reward. The estimate k3 is not clamped. In a loss, k3 has the gradient of
KL(initial || policy), although its value estimates KL(policy || initial).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentic_rag_env.settings import at_least, check_settings, one_of
from algorithms.learner import ops
from algorithms.learner.algorithm import ALGORITHMS, Algorithm, PolicyGradientConfig
from algorithms.learner.config import ANCHORS
from algorithms.learner.types import Batch, Tokens

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class GRPOConfig(PolicyGradientConfig):
    """Settings of `GRPO`.

    Attributes:
        rollouts_per_prompt: Size of a group, at least 2; must divide `batch_size`.
        scale_rewards: What a reward's distance to its group's mean is divided by: the standard deviation of the
            "group", of the "batch", or "none".
        kl_estimator: The estimate in the loss: "k1", "k2" or "k3"; see `ops.kl_estimate` for their gradients.
    """

    rollouts_per_prompt: int = 6
    scale_rewards: str = "group"
    kl_estimator: str = "k3"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, at_least(2), "rollouts_per_prompt")
        for name, choices in (("scale_rewards", ops.REWARD_SCALES), ("kl_estimator", ops.KL_ESTIMATORS)):
            check_settings(self, one_of(choices), name)


@ALGORITHMS.register("grpo", GRPOConfig)
class GRPO(Algorithm):
    """Clipped policy gradient on exact match compared within groups."""

    config: GRPOConfig

    def __init__(self, config: GRPOConfig) -> None:
        self._anchor = f"{ANCHORS[config.anchor]}_logprobs"
        read = {self._anchor: config.kl_coef > 0, "entropy": config.entropy_coef > 0}
        self.needs = frozenset(name for name, is_read in read.items() if is_read)
        self.rollouts_per_prompt = config.rollouts_per_prompt
        super().__init__(config)

    def num_steps(self, num_demonstrations: int) -> int:
        """Return the setting `steps`; stored demonstrations don't matter."""
        return self.config.steps

    def estimate_advantages(self, batch: Batch) -> tuple[Tensor, None]:
        """The trajectory's advantage at each of its model-written tokens, [B, T]; no returns."""
        advantages = ops.group_advantages(batch.rewards, batch.group_ids, self.config.scale_rewards)
        return advantages[:, None] * batch.response_mask, None

    def pays(self, correct: Tensor) -> Tensor:
        """Select tokens or trajectories whose KL estimate counts, [n] bool, by whether they are right; here all."""
        return correct.new_ones(correct.shape)

    def anchored(self, batch: Batch) -> Tensor:
        """Select the trajectories whose estimate counts, [B] bool; nobody asks for that of the others."""
        return self.pays(batch.correct)

    def token_loss(self, tokens: Tokens) -> Tensor:
        """Clipped surrogate plus KL estimate minus entropy bonus, [n]."""
        config = self.config
        loss = ops.clipped_surrogate(tokens.logprobs, tokens.old_logprobs, tokens.advantages, *config.clip_ranges)
        if config.kl_coef > 0:
            loss = loss + config.kl_coef * self._anchor_kl(tokens, tokens.logprobs, self.pays(tokens.correct))
        return loss - config.entropy_coef * tokens.entropy if config.entropy_coef > 0 else loss

    def step_metrics(self, batch: Batch) -> dict[str, float]:
        """Figures of the groups and of the penalty.

        `equal_reward_fraction`: share of the groups whose rewards are all equal, so that nothing is learned from them.
        `penalty_mean` and `penalty_variance`: mean and variance of what each trajectory would pay if its KL were summed
        up, as in `ppo`; absent without a penalty.
        """
        groups, index = batch.group_ids.unique(return_inverse=True)
        best, worst = (
            batch.rewards.new_zeros(len(groups)).scatter_reduce(0, index, batch.rewards, reduce, include_self=False)
            for reduce in ("amax", "amin")
        )
        figures = {"equal_reward_fraction": float((best == worst).float().mean())}
        if self.config.kl_coef == 0:
            return figures
        pays = batch.response_mask & self.pays(batch.correct)[:, None]
        penalty = self.config.kl_coef * self._anchor_kl(batch, batch.old_logprobs, pays).sum(dim=1)
        return figures | ops.penalty_figures(penalty)

    def _anchor_kl(self, scored: Batch | Tokens, logprobs: Tensor, pays: Tensor) -> Tensor:
        """The KL estimate of tokens with these log-probabilities, in nats, 0 where it does not count."""
        config = self.config
        # Where nobody has asked, an estimate could overflow, and then even its masked gradient would be NaN.
        anchor = getattr(scored, self._anchor).where(pays, logprobs.detach())
        estimate = ops.kl_estimate(logprobs, anchor, config.kl_estimator, config.kl_clip)
        return estimate.masked_fill(~pays, 0.0)
