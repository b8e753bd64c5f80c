"""Temporally adaptive interpolated distillation: the target moves from the student's own distribution to the teacher's.

Paper: Shing et al., "TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language
    Models", arXiv:2501.16937, eqs. 3-6 and algorithm 1.
Sampled: by the teacher, once, as in `sft`.
Needed: the logits of student and teacher over their shared vocabulary.
Credit: every token that the teacher wrote, equally.
Loss: KL(p_t || q), where p_t = softmax((1 - t) s + t z) lies between student logits s, held constant in it, and teacher
    logits z. After every step t grows with the relative fall of the loss. It never falls below a line from t_start to
    t_end. As in the authors' code, the line is read at the number of steps done before this one: of 100 steps from
    t = 0.4, the losses are taken at 0.400, 0.400, 0.406, 0.412 and so on.

Differs from the paper: the loss includes the entropy of p_t, which the authors' code leaves out. t moves once a step,
in training only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentic_rag_env.settings import FRACTION, Allowed, check_settings
from algorithms.learner import ops
from algorithms.learner.algorithm import ALGORITHMS
from algorithms.learner.types import Batch, Tokens
from algorithms.sft import SFT, SFTConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class TAIDConfig(SFTConfig):
    """Settings of `TAID`.

    Attributes:
        t_start, t_end: Ends of the line that t never falls below; t_end is also its bound.
        step_size: How far t may run ahead of the line in one step, as a fraction of 1 - t. With 0, t follows the line
            exactly.
        momentum: Momentum of the running mean of the loss's relative fall.
    """

    t_start: float = 0.4
    t_end: float = 1.0
    step_size: float = 5e-4
    momentum: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, FRACTION, "t_start", "t_end", "step_size")
        check_settings(self, Allowed(f"at most t_end ({self.t_end})", lambda value: value <= self.t_end), "t_start")
        check_settings(self, Allowed("in [0, 1)", lambda value: 0 <= value < 1), "momentum")
        check_settings(self, Allowed("1, as t moves once a step", lambda value: value == 1), "num_minibatches")


@ALGORITHMS.register("taid", TAIDConfig)
class TAID(SFT):
    """Distillation towards a target on its way from the student to the teacher."""

    needs = frozenset({"logits", "teacher_logits"})
    config: TAIDConfig

    def __init__(self, config: TAIDConfig) -> None:
        super().__init__(config)
        self.t = config.t_start
        self._fall = 0.0
        self._last_loss: float | None = None

    def token_loss(self, tokens: Tokens) -> Tensor:
        """Divergence from the moving target, [n] nats."""
        return ops.taid_kl(tokens.logits, tokens.teacher_logits, self.t)

    def step_metrics(self, batch: Batch) -> dict[str, float]:
        """Figure `taid_t`: the target's place between student (0) and teacher (1)."""
        return {"taid_t": self.t}

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Move t as lines 7 to 10 of algorithm 1 do."""
        config, loss = self.config, metrics["loss"]
        if self._last_loss:  # None before the first step; 0 at t = 0, and from 0 there is no relative fall
            fall = (self._last_loss - loss) / (self._last_loss + 1e-15)
            self._fall = config.momentum * self._fall + (1 - config.momentum) * fall
            # The sigmoid as a tangent, which can't overflow: after a loss near 0 the fall is almost minus infinity.
            self.t += config.step_size * (1 - self.t) * (1 + math.tanh(self._fall / 2)) / 2
        self._last_loss = loss
        line = config.t_start + (config.t_end - config.t_start) * metrics["progress"]
        self.t = min(config.t_end, max(line, self.t))

    def state_dict(self) -> dict[str, Any]:
        """The target's place and what moves it."""
        return {"t": self.t, "fall": self._fall, "last_loss": self._last_loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.t, self._fall, self._last_loss = state["t"], state["fall"], state["last_loss"]
