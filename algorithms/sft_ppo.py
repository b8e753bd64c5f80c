"""Supervised fine-tuning, then reinforcement learning: PPO whose start, critic and leash are the fine-tuned policy.

Paper: the baseline "SFT->PPO" of Kotoge et al., arXiv:2508.20324.
Sampled, needed, credit, loss: those of `sft`, then those of `ppo`.

Differs from the paper: unknown, because the paper's settings are not public.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from algorithms.learner.algorithm import ALGORITHMS
from algorithms.ppo import PPO, PPOConfig


@dataclass(kw_only=True)
class SFTPPOConfig(PPOConfig):
    """Settings of `SFTPPO`."""

    warm_start: Any = field(default_factory=lambda: {"name": "sft"})


@ALGORITHMS.register("sft_ppo", SFTPPOConfig)
class SFTPPO(PPO):
    """PPO after a start by SFT."""

    config: SFTPPOConfig
