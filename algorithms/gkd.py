"""Generalized knowledge distillation: the teacher judges what the student itself writes.

Paper: Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    arXiv:2306.13649, eq. 1 and algorithm 1.
Sampled: each batch by the policy, afresh, with probability `on_policy_fraction`, else by the teacher, as in `sft`.
    After a warm start by `sft`: the divergence is bounded, so it hardly teaches tokens to which the raw student gives
    almost no probability.
Needed: the logits of student and teacher over their shared vocabulary.
Credit: every token that the sampling model wrote, equally. No gradient flows through the sampling.
Loss: generalized Jensen-Shannon divergence, jsd_beta KL(p || m) + (1 - jsd_beta) KL(q || m), m = jsd_beta p +
    (1 - jsd_beta) q, with teacher p and student q.

Differs from the paper: the loss is averaged over tokens instead of over sequences (loss_reduction=seq-mean is the
paper's). At jsd_beta 0 and 1, where the formula vanishes, the loss is KL(p || q) and KL(q || p).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from agentic_rag_env.settings import FRACTION, Allowed, above, check_settings
from algorithms.learner import ops
from algorithms.learner.algorithm import ALGORITHMS, Progress
from algorithms.learner.types import Tokens
from algorithms.sft import SFT, SFTConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class GKDConfig(SFTConfig):
    """Settings of `GKD`.

    Attributes:
        jsd_beta: Weight of the teacher in the divergence; 0: forward KL, 1: reverse KL.
        on_policy_fraction: Probability that a batch is written by the policy; at 1 no demonstrations are collected, and
            `num_demonstrations` still says how long `epochs` are.
        sampling_temperature: Temperature of the policy's trajectories; the loss is at the run's temperature.
    """

    jsd_beta: float = 0.5
    on_policy_fraction: float = 0.5
    sampling_temperature: float = 1.0
    warm_start: Any = field(default_factory=lambda: {"name": "sft"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, FRACTION, "jsd_beta", "on_policy_fraction")
        check_settings(self, above(0), "sampling_temperature")
        if self.on_policy_fraction == 1:
            allowed = "0, as on_policy_fraction=1 collects no demonstrations to hold out"
            check_settings(self, Allowed(allowed, lambda value: value == 0), "num_validation")


@ALGORITHMS.register("gkd", GKDConfig)
class GKD(SFT):
    """Distillation on a mixture of the teacher's and the policy's trajectories."""

    needs = frozenset({"logits", "teacher_logits"})
    config: GKDConfig

    def __init__(self, config: GKDConfig) -> None:
        shares = {"policy": config.on_policy_fraction, "teacher": 1 - config.on_policy_fraction}
        self.trains_on = frozenset(name for name, share in shares.items() if share > 0)
        self.sampling_temperature = config.sampling_temperature
        super().__init__(config)

    def num_steps(self, num_demonstrations: int) -> int:
        """As many steps as SFT takes, those on fresh rollouts included."""
        return super().num_steps(num_demonstrations if "teacher" in self.trains_on else self.config.num_demonstrations)

    def source(self, progress: Progress, rng: np.random.Generator) -> str:
        """Choose the policy with probability `on_policy_fraction`, else the teacher."""
        return "policy" if rng.random() < self.config.on_policy_fraction else "teacher"

    def token_loss(self, tokens: Tokens) -> Tensor:
        """Generalized Jensen-Shannon divergence, [n] nats."""
        return ops.jsd(tokens.logits, tokens.teacher_logits, self.config.jsd_beta)
