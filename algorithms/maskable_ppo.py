"""A small search controller without language: PPO with invalid-action masking, from the library sb3-contrib.

Paper: Huang and Ontañón, "A Closer Look at Invalid Action Masking in Policy Gradient Algorithms", arXiv:2006.14171.
Sampled: by the controller, on the discrete view of the environment (`agentic_rag_env.wrappers.DiscreteActions`).
Needed: no language model, no teacher, no demonstrations; `pip install "agentic-rag-env[sb3]"`.
Credit: generalized advantage estimation over turns; an action is a whole turn.
Loss: PPO's clipped surrogate, the critic's squared error and an entropy bonus.

Differs from the paper: actions are spans of text, so one network scores every candidate alike, and the policy is the
softmax over all their scores. The controller is the floor that a language model has to beat. It reads spans and word
features that the view has picked out, and writes by templates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from agentic_rag_env.errors import ConfigurationError, required_library
from agentic_rag_env.files import written_whole
from agentic_rag_env.settings import COUNT, FRACTION, above, at_least, check_settings
from agentic_rag_env.types import Ending
from algorithms.learner.algorithm import ALGORITHMS
from algorithms.sb3.learner import OutsideLearner, Report

if TYPE_CHECKING:
    from agentic_rag_env.types import StepInfo
    from agentic_rag_env.wrappers import DiscreteActions
    from algorithms.training.settings import RunConfig


@dataclass(kw_only=True)
class MaskablePPOConfig:
    """Settings of `MaskablePPO`; the defaults were chosen on development questions of the bundled tiny world.

    Attributes:
        total_env_steps: Turns of the whole training, rounded up to whole updates.
        turns_per_update: Turns between two updates in each of the run's `num_envs` environments.
        batch_size: Turns per optimizer step.
        num_epochs: Passes over the turns of an update.
        learning_rate: Learning rate of Adam at the beginning; it falls linearly to 0.
        clip_range: Bound of the probability ratio's distance to 1.
        discount, gae_lambda: Discount and lambda of the advantages.
        entropy_coef: Weight of the entropy bonus at the beginning; it falls linearly to 0.
        value_coef: Weight of the critic's loss.
        max_grad_norm: Bound of the gradient's norm.
        hidden_size: Width of the network.
        max_candidates: Spans to choose from, see `DiscreteActions`.
    """

    total_env_steps: int = 150_000
    turns_per_update: int = 12
    batch_size: int = 256
    num_epochs: int = 4
    learning_rate: float = 2e-3
    clip_range: float = 0.2
    discount: float = 1.0
    gae_lambda: float = 0.95
    entropy_coef: float = 0.01
    value_coef: float = 0.5
    max_grad_norm: float = 0.5
    hidden_size: int = 96
    max_candidates: int = 12

    def __post_init__(self) -> None:
        counts = ("total_env_steps", "turns_per_update", "num_epochs", "hidden_size", "max_candidates")
        check_settings(self, COUNT, *counts)
        check_settings(self, at_least(2), "batch_size")
        check_settings(self, above(0), "learning_rate", "clip_range", "max_grad_norm")
        check_settings(self, at_least(0), "entropy_coef", "value_coef")
        check_settings(self, FRACTION, "discount", "gae_lambda")


@ALGORITHMS.register("maskable_ppo", MaskablePPOConfig)
class MaskablePPO(OutsideLearner):
    """Trains `sb3_contrib.MaskablePPO` with a policy that scores candidates."""

    name = "maskable_ppo"

    def __init__(self, config: MaskablePPOConfig) -> None:
        self.config = config
        self.max_candidates = config.max_candidates
        self.model: Any = None

    def num_updates(self, config: RunConfig) -> int:
        """Number of updates that it takes to play `total_env_steps`."""
        return -(-self.config.total_env_steps // (config.num_envs * self.config.turns_per_update))

    def train(self, make_view: Callable[[], DiscreteActions], config: RunConfig, report: Report) -> None:
        """See `OutsideLearner.train`."""
        with required_library('algo=maskable_ppo needs the library sb3-contrib: pip install "agentic-rag-env[sb3]".'):
            from sb3_contrib import MaskablePPO as Library
            from stable_baselines3.common.logger import Logger
            from stable_baselines3.common.vec_env import DummyVecEnv
        num_turns, size = config.num_envs * self.config.turns_per_update, self.config.batch_size
        if num_turns % size == 1:
            raise ConfigurationError(
                f"{num_turns} turns per update (num_envs times turns_per_update) in batches of {size} leave a batch of "
                "one, whose advantages have no spread; choose another algo.batch_size."
            )
        envs = DummyVecEnv([make_view] * config.num_envs)
        self.model = self._make_model(Library, envs, config.seed)
        self.model.set_logger(Logger(None, []))
        total = self.num_updates(config)
        for update in range(total):
            left = 1 - update / total
            self.model.ent_coef = self.config.entropy_coef * left
            self.model.lr_schedule = lambda _, rate=self.config.learning_rate * left: rate
            report(self._update(config))
        envs.close()

    def log_probs(self, observation: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """See `OutsideLearner.log_probs`."""
        import torch

        with torch.no_grad():
            batch = torch.as_tensor(observation)[None]
            logits = self.model.policy.get_distribution(batch, mask[None]).distribution.logits[0].numpy()
        return np.where(mask, logits, -np.inf)

    def save(self, folder: Path) -> None:
        """Write `model.zip`, which `sb3_contrib.MaskablePPO.load` reads."""
        with written_whole(folder / "model.zip") as partial:
            self.model.save(partial)

    def _make_model(self, library: Any, envs: Any, seed: int) -> Any:
        from algorithms.sb3.candidate_policy import policy_class, policy_settings

        config = self.config
        return library(
            policy_class(),
            envs,
            n_steps=config.turns_per_update,
            batch_size=config.batch_size,
            n_epochs=config.num_epochs,
            learning_rate=config.learning_rate,
            clip_range=config.clip_range,
            gamma=config.discount,
            gae_lambda=config.gae_lambda,
            vf_coef=config.value_coef,
            max_grad_norm=config.max_grad_norm,
            policy_kwargs=policy_settings(envs.envs[0], config.hidden_size),
            seed=seed,
            device="cpu",
        )

    def _update(self, config: RunConfig) -> dict[str, float]:
        """Play some turns in every environment, learn from them, and return figures of both."""
        from algorithms.sb3.run import episode_metrics

        last: list[StepInfo] = []
        rewards: list[float] = []
        played_until = time.perf_counter()

        def watch(at: dict[str, Any], _: dict[str, Any]) -> bool:
            nonlocal played_until
            for row in np.flatnonzero(at["dones"]):
                # The library would add the value of what comes next, but an episode without an answer earns nothing.
                at["infos"][row]["TimeLimit.truncated"] = False
                last.append(at["infos"][row])
                rewards.append(float(at["rewards"][row]))
                if Ending.of(at["infos"][row]) is Ending.SEARCH_FAILED:  # nothing is learned from it: no advantage
                    at["rewards"][row] = float(at["values"][row])
            played_until = time.perf_counter()
            return True

        started, num_turns = time.perf_counter(), config.num_envs * self.config.turns_per_update
        self.model.learn(num_turns, watch, log_interval=None, reset_num_timesteps=False)
        figures = self.model.logger.name_to_value
        learned = {name: float(figures[name]) for name in ("train/loss", "train/value_loss", "train/approx_kl")}
        return {
            **episode_metrics(last, rewards, config),
            **learned,
            "rollout/episodes": float(len(last)),
            "rollout/env_steps": float(num_turns),
            "train/entropy": -float(figures["train/entropy_loss"]),
            "time/rollout_s": played_until - started,
            "time/update_s": time.perf_counter() - played_until,
        }
