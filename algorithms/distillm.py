"""DistiLLM: skew divergences, and a share of the student's own trajectories that grows with the held-out loss.

Paper: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", arXiv:2402.03898, eqs. 4-5 and
    algorithm 1.
Sampled: each batch by the teacher, as in `sft`, or with a growing probability by the policy. The policy's trajectories
    are fresh, or drawn from its last `replay_capacity` ones. A warm start by `sft` goes before, as in `gkd`.
Needed: the logits of student and teacher over their shared vocabulary; held-out demonstrations.
Credit: every token that the sampling model wrote, equally.
Loss: KL(p || alpha p + (1 - alpha) q), or KL(q || (1 - alpha) p + alpha q), with teacher p and student q.

Differs from the paper: there is no language-modelling loss, because there is no pre-training text here. The share of
the policy's trajectories rises when the loss on held-out demonstrations does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from agentic_rag_env.settings import COUNT, Allowed, above, at_least, check_settings, one_of
from algorithms.learner import ops
from algorithms.learner.algorithm import ALGORITHMS, Progress
from algorithms.learner.types import Batch, Tokens
from algorithms.sft import SFT, SFTConfig

if TYPE_CHECKING:
    from torch import Tensor

_DIVERGENCES = {"skew_forward": ops.skew_forward_kl, "skew_reverse": ops.skew_reverse_kl}


@dataclass(kw_only=True)
class DistiLLMConfig(SFTConfig):
    """Settings of `DistiLLM`.

    Attributes:
        divergence: "skew_forward" or "skew_reverse".
        skew_alpha: Share of the first distribution in the mixture that it is compared with.
        replay_capacity: Trajectories of the policy kept for replay.
        fresh_schedule: Probability of sampling afresh, where phi is the share of the policy's batches and x the share
            of the training done: "decreasing" phi (1 - x), "increasing" phi x, "constant" phi / 2. While the replay is
            not full, it is phi.
        tolerance: Rise of the validation loss that raises phi.
        share_increment: What is added to phi each time.
        sampling_temperature: Temperature of the policy's trajectories; the loss is at the run's temperature.
    """

    num_validation: int = 32
    divergence: str = "skew_forward"
    skew_alpha: float = 0.1
    replay_capacity: int = 1000
    fresh_schedule: str = "decreasing"
    tolerance: float = 0.1
    share_increment: float = 0.1
    sampling_temperature: float = 1.0
    warm_start: Any = field(default_factory=lambda: {"name": "sft"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, one_of(_DIVERGENCES), "divergence")
        check_settings(self, Allowed("in [0, 1)", lambda value: 0 <= value < 1), "skew_alpha")
        check_settings(self, COUNT, "num_validation")
        allowed = f"at least num_minibatches ({self.num_minibatches})"
        check_settings(self, Allowed(allowed, lambda value: value >= self.num_minibatches), "replay_capacity")
        schedules = ("decreasing", "increasing", "constant")
        check_settings(self, one_of(schedules), "fresh_schedule")
        check_settings(self, at_least(0), "tolerance")
        check_settings(self, Allowed("in (0, 1]", lambda value: 0 < value <= 1), "share_increment")
        check_settings(self, above(0), "sampling_temperature")


@ALGORITHMS.register("distillm", DistiLLMConfig)
class DistiLLM(SFT):
    """Distillation by skew divergences with an adaptive share of the policy's trajectories."""

    needs = frozenset({"logits", "teacher_logits"})
    trains_on = frozenset({"teacher", "policy", "replay"})
    config: DistiLLMConfig

    def __init__(self, config: DistiLLMConfig) -> None:
        super().__init__(config)
        self.replay_capacity = config.replay_capacity
        self.sampling_temperature = config.sampling_temperature
        self.policy_share = 0.0
        self._last_loss: float | None = None

    def source(self, progress: Progress, rng: np.random.Generator) -> str:
        """Draw by algorithm 1 whether the policy samples afresh, a replay is used, or the teacher's trajectories."""
        draw, share = rng.random(), self.policy_share
        schedule = {"decreasing": 1 - progress.fraction, "increasing": progress.fraction, "constant": 0.5}
        if draw < share * schedule[self.config.fresh_schedule] or (draw < share and not progress.replay_is_full):
            return "policy"
        return "replay" if draw < share else "teacher"

    def token_loss(self, tokens: Tokens) -> Tensor:
        """Skew divergence, [n] nats."""
        return _DIVERGENCES[self.config.divergence](tokens.logits, tokens.teacher_logits, self.config.skew_alpha)

    def step_metrics(self, batch: Batch) -> dict[str, float]:
        """Figure `policy_share`: the probability that a batch is the policy's."""
        return {"policy_share": self.policy_share}

    def after_validation(self, loss: float) -> None:
        """Raise the share of the policy's trajectories if the loss has risen."""
        if self._last_loss is None:
            self._last_loss = loss
        elif loss >= self._last_loss + self.config.tolerance:
            self.policy_share = min(1.0, self.policy_share + self.config.share_increment)
            self._last_loss = loss

    def state_dict(self) -> dict[str, Any]:
        """The share, and the loss at which it was last raised."""
        return {"policy_share": self.policy_share, "last_loss": self._last_loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.policy_share, self._last_loss = state["policy_share"], state["last_loss"]
