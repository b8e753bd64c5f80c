"""Runs a learner of another library: trains, checks, measures and writes it down like a run of the zoo."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from agentic_rag_env.files import write_whole
from agentic_rag_env.types import Ending, StepInfo
from agentic_rag_env.wrappers import DiscreteActions
from algorithms.learner import seeding
from algorithms.learner.networks import load_tokenizer
from algorithms.learner.types import Trajectory
from algorithms.rollout import player
from algorithms.sb3.episodes import RecordedView, Sample, play, single
from algorithms.sb3.learner import OutsideLearner
from algorithms.training import evaluation
from algorithms.training.build import Environments
from algorithms.training.checkpoint import checkpoint_name
from algorithms.training.costs import cost_metrics, spend, timed
from algorithms.training.episode_figures import rollout_metrics
from algorithms.training.model_names import resolve_model
from algorithms.training.run_logger import RunLogger
from algorithms.training.settings import RunConfig
from algorithms.training.summary import publish, summarize
from algorithms.training.trajectory_samples import NUM_SAVED, is_due, write_check, write_sample


class OutsideRun:
    """One run of an outside learner: its parts, then `train`, then `finish`."""

    def __init__(self, learner: OutsideLearner, config: RunConfig, run_dir: Path) -> None:
        self.learner, self.config, self.run_dir = learner, config, run_dir
        self.tokenizer = load_tokenizer(resolve_model(config.model.policy, config.cache_dir))
        self.environments = Environments(config, self.tokenizer)
        self.costs: dict[str, float] = {}
        self.words: dict[str, tuple[str, ...]] = {}
        first = self.view("train")
        self.words = {"question_words": first.question_words, "query_words": first.query_words}
        self.dev, self.test = self.view("dev"), self.view("test")
        self.step, self.num_updates = 0, learner.num_updates(config)
        self.sample = Sample(NUM_SAVED, self.tokenizer, lambda: self._is_checked(self.step + 1))

    def view(self, split: str) -> DiscreteActions:
        """Make an environment of a split; all environments use the words of the training split."""
        return DiscreteActions(single(self.environments.envs(split)), self.learner.max_candidates, **self.words)

    def training_view(self) -> DiscreteActions:
        """Make an environment of the training split and keep some of its episodes."""
        return RecordedView(
            single(self.environments.envs("train")),
            self.learner.max_candidates,
            **self.words,
            player=self.learner,
            sample=self.sample,
        )

    def train(self) -> None:
        """Train the learner and save it."""
        with RunLogger(
            self.run_dir,
            self.num_updates,
            loggers=self.config.logger,
            settings=asdict(self.config),
            command=shlex.join(sys.argv),
        ) as self.logger:
            self.logger.message(
                f"training: {self.learner.name} ({self.num_updates} updates), no language model; written to "
                f"{self.run_dir}"
            )
            self.learner.train(self.training_view, self.config, self.report)
        self._save()

    def report(self, metrics: Mapping[str, float]) -> None:
        """Record an update, and check on the dev split from time to time."""
        self.step += 1
        times = {name.removeprefix("time/"): spent for name, spent in metrics.items() if name.startswith("time/")}
        spend(self.costs, **times, **{name: metrics[f"rollout/{name}"] for name in ("episodes", "env_steps")})
        if self._is_checked(self.step):
            self._save_sample()
            metrics = {**metrics, **self._check_on_dev()}
        self.logger.write(self.step, {**metrics, **cost_metrics(self.costs)}, self.learner.name)

    def finish(self) -> dict[str, Any]:
        """Measure, print and write; return the summary."""
        name, dataset = self.learner.name, self.test.env.dataset
        with timed(self.costs, "evaluation_s"):
            result = evaluation.evaluate_player(
                name, self._play_test_questions, dataset, self.tokenizer, self.config.evaluation, self.run_dir
            )
        stage = {"name": name, "steps": self.step, "checkpoint": checkpoint_name(self.step)}
        summary = summarize(self.config, [stage], [result], self.costs, torch.device("cpu"), self.environments)
        publish(self.run_dir, self.config, summary, [result], self.tokenizer)
        return summary

    def _is_checked(self, step: int) -> bool:
        return is_due(self.config.evaluation.every, step, self.num_updates)

    def _save_sample(self) -> None:
        """Save some of the episodes from which the present update has learned."""
        with timed(self.costs, "samples_s"):
            if trajectories := self.sample.take():
                dataset = self.environments.dataset("train")
                write_sample(self.run_dir, self.step, trajectories, dataset, self.tokenizer)

    def _check_on_dev(self) -> dict[str, float]:
        dataset = self.dev.env.dataset
        count = min(self.config.evaluation.num_dev_questions, len(dataset))
        with timed(self.costs, "dev_s") as clock:
            played = [self._play(self.dev, index, 0.0) for index in range(count)]
            metrics = write_check(self.run_dir, self.step, played, dataset, self.tokenizer, self.logger)
        return metrics | clock

    def _play_test_questions(self, temperature: float, count: int, show: player.Progress) -> list[Trajectory]:
        played: list[Trajectory] = []
        for index in range(count):
            played.append(self._play(self.test, index, temperature))
            show(index + 1, count)
        check_failures([each.turns[-1].info for each in played], self.config)
        return played

    def _play(self, view: DiscreteActions, index: int, temperature: float) -> Trajectory:
        draw = seeding.rng(self.config.evaluation.seed, self.learner.name, index)
        return play(view, index, self.learner, temperature, draw, self.tokenizer)

    def _save(self) -> None:
        folder = self.run_dir / checkpoint_name(self.step)
        with timed(self.costs, "checkpoint_s"):
            folder.mkdir(parents=True, exist_ok=True)
            self.learner.save(folder)
            settings = {"max_candidates": self.learner.max_candidates, **self.words}
            write_whole(folder / "view.json", json.dumps(settings).encode())


def episode_metrics(last: Sequence[StepInfo], rewards: Sequence[float], config: RunConfig) -> dict[str, float]:
    """Compute `rollout_metrics` over the episodes of an update; nothing if no episode has ended.

    Args:
        last: Info of each episode's last step; may be empty.
        rewards: Reward of each episode.
        config: The run's.

    Raises:
        RetrieverError: Too many episodes ended in a failed search.
    """
    check_failures(last, config)
    return rollout_metrics(last, rewards) if last else {}


def check_failures(last: Sequence[StepInfo], config: RunConfig) -> None:
    """See `player.check_failures`.

    Args:
        last: Info of each episode's last step.
        config: The run's.
    """
    if errors := [str(info["error"]) for info in last if Ending.of(info) is Ending.SEARCH_FAILED]:
        player.check_failures(len(errors), len(last), config.max_retriever_error_fraction, errors[-1])
