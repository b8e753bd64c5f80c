"""Knowledge distillation: imitate the teacher's tokens and, at each of them, its whole distribution.

Paper: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531. The form is that of
    the cold start of DGPO, arXiv:2508.20324, eq. 1.
Sampled: by the teacher, once, as in `sft`.
Needed: the logits of student and teacher over their shared vocabulary, unless kl_coef is 0.
Credit: every token that the teacher wrote, equally.
Loss: -log q(y_t) + kl_coef tau^2 KL(softmax(z / tau) || softmax(s / tau)), with teacher logits z and student logits s.

Differs from the paper: the cross-entropy is with the teacher's sampled tokens, because there are no other labels. Its
weight is 1 and that of the divergence `kl_coef`; other code has 1 - r and r, so that kl_coef = r / (1 - r).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agentic_rag_env.settings import above, at_least, check_settings
from algorithms.learner import ops
from algorithms.learner.algorithm import ALGORITHMS
from algorithms.learner.types import Tokens
from algorithms.sft import SFT, SFTConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class KDConfig(SFTConfig):
    """Settings of `KD`.

    Attributes:
        kl_coef: Weight of the divergence beside the cross-entropy; 0 is SFT.
        temperature: Softens both distributions, in the divergence only.
    """

    kl_coef: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, at_least(0), "kl_coef")
        check_settings(self, above(0), "temperature")


@ALGORITHMS.register("kd", KDConfig)
class KD(SFT):
    """SFT plus the divergence from the teacher's distribution."""

    config: KDConfig

    def __init__(self, config: KDConfig) -> None:
        self.needs = frozenset({"logits", "teacher_logits"} if config.kl_coef > 0 else ())
        super().__init__(config)

    def token_loss(self, tokens: Tokens) -> Tensor:
        """Cross-entropy plus weighted divergence, [n] nats."""
        cross_entropy = super().token_loss(tokens)
        if self.config.kl_coef == 0:
            return cross_entropy
        tau = self.config.temperature
        student, teacher = tokens.logits, tokens.teacher_logits
        if tau != 1:
            student, teacher = student / tau, teacher / tau
        divergence = ops.forward_kl(student, teacher)
        return cross_entropy + self.config.kl_coef * tau**2 * divergence
