"""Supervised fine-tuning on the teacher's own trajectories, which is sequence-level distillation.

Paper: Kim and Rush, "Sequence-Level Knowledge Distillation", arXiv:1606.07947 (SeqKD).
Sampled: by the teacher, once, before training. Only trajectories with the right answer are kept, unless configured
    otherwise.
Needed: nothing but these trajectories.
Credit: every token that the teacher wrote, equally; prompt and passages are context only.
Loss: cross-entropy, -log q(y_t).

Differs from the paper: the teacher's trajectories are samples instead of modes found by beam search, and they are
whole episodes with searches in them, filtered by exact match.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.settings import COUNT, Allowed, check_settings
from algorithms.learner.algorithm import ALGORITHMS, Algorithm, DemonstrationConfig, OptimizerConfig
from algorithms.learner.types import Tokens

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(kw_only=True)
class SFTConfig(DemonstrationConfig):
    """Settings of `SFT`; the defaults are those measured on the bundled tiny world.

    Attributes:
        epochs: Passes over the demonstrations.
        num_validation: Number of demonstrations held out. The loss on them is measured before training and after every
            pass.
    """

    batch_size: int = 16
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=3e-3, schedule="cosine", betas=(0.9, 0.999))
    )
    epochs: int = 12
    num_validation: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, COUNT, "epochs")
        limit = self.num_demonstrations
        allowed = f"at least 0 and below num_demonstrations ({limit})"
        check_settings(self, Allowed(allowed, lambda value: 0 <= value < limit), "num_validation")
        if self.num_epochs != 1:
            raise ConfigurationError(
                f"num_epochs must be 1 where batches are drawn from stored trajectories, got {self.num_epochs}; "
                "set epochs, the number of passes over all of them."
            )


@ALGORITHMS.register("sft", SFTConfig)
class SFT(Algorithm):
    """Cross-entropy on trajectories of the teacher."""

    trains_on = frozenset({"teacher"})
    config: SFTConfig

    def __init__(self, config: SFTConfig) -> None:
        self.num_validation = config.num_validation
        super().__init__(config)

    def num_steps(self, num_demonstrations: int) -> int:
        """Steps of `epochs` passes over the stored trajectories; the last batch of a pass may be smaller."""
        return self.config.epochs * math.ceil(num_demonstrations / self.config.batch_size)

    def token_loss(self, tokens: Tokens) -> Tensor:
        """Cross-entropy of the teacher's token, [n] nats."""
        return -tokens.logprobs
