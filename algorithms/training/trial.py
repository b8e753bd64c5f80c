"""Tries a run out on this machine: a few real steps of every stage, from which its plan takes the times."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from agentic_rag_env.terminal import print_line
from algorithms.learner import seeding
from algorithms.training.host_memory import peak_memory
from algorithms.training.run_files import read_metrics
from algorithms.training.settings import RunConfig
from algorithms.training.threads import threads
from algorithms.training.trainer import Trainer

#: Steps of each stage; the first one warms up, and counts only if it is the only one.
STEPS = 3
_PHASES = ("rollout", "score", "update")


@dataclass(frozen=True, slots=True)
class Trial:
    """What a trial took.

    Attributes:
        stages: First to last: seconds of a step by phase, and its `tokens`; None for one with nothing to train on.
        demonstration_s: Seconds for a demonstration; 0 if there are none.
        reading_s: Seconds in which a teacher reads a demonstration once for all; 0 if it reads them in every step.
        question_s: Seconds for a question of the dev split.
        num_test: Questions of the test split.
        peak: Most memory that the process ever held [bytes].
    """

    stages: list[dict[str, float] | None]
    demonstration_s: float
    reading_s: float
    question_s: float
    num_test: int
    peak: int


def try_out(config: RunConfig, folder: Path) -> Trial:
    """Carry out a few steps of every stage, and measure them.

    A policy after a few steps writes otherwise than later: one that has not learned to answer writes longer.

    Args:
        config: The run's settings, for this process alone; `.gguf` files of models are converted anew.
        folder: Where the trial writes; removed afterwards.

    Raises:
        AgenticRAGError: What the run itself would end with.
    """
    print_line(f"Trying out {STEPS} steps of every stage.")
    seeding.seed_everything(config.seed)
    shutil.rmtree(folder, ignore_errors=True)  # a trial that was killed would be gone on with
    try:
        with threads(config.threads):
            trainer = Trainer(_shortened(config, folder), folder / "run", most_steps=STEPS)
            trainer.train()
        return _measured(trainer, read_metrics(folder / "run"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _shortened(config: RunConfig, folder: Path) -> RunConfig:
    return dataclasses.replace(
        config,
        algo=_with_few_demonstrations(config.algo, _most_held_out(config.algo)),
        evaluation=dataclasses.replace(config.evaluation, every=STEPS),
        probe_every=0,
        logger=["jsonl"],
        cache_dir=str(folder / "cache"),  # where nobody has collected demonstrations yet
    )


def _most_held_out(algo: Mapping[str, Any]) -> int:
    before = algo.get("warm_start")
    return max(algo.get("num_validation", 0), _most_held_out(before) if isinstance(before, Mapping) else 0)


def _with_few_demonstrations(algo: Mapping[str, Any], held_out: int) -> dict[str, Any]:
    """The settings of a chain of stages, each with demonstrations for a few steps and those that nobody trains on."""
    short = dict(algo)
    if "num_demonstrations" in short:
        few = STEPS * short["batch_size"] + held_out
        chosen = dict(short["demonstrations"])
        short["num_demonstrations"] = min(chosen["num"] or short["num_demonstrations"], few)
        short["demonstrations"] = chosen | {"num": None}
    if isinstance(short.get("warm_start"), Mapping):
        short["warm_start"] = _with_few_demonstrations(short["warm_start"], held_out)
    return short


def _measured(trainer: Trainer, rows: Sequence[Mapping[str, Any]]) -> Trial:
    starts, costs, environments = trainer.position.stage_starts, trainer.position.costs, trainer.environments
    stages = [_stage(rows[:stop], stop - start) for start, stop in pairwise(starts)]
    found = sum(len(each.trajectories) for each in trainer.sources.demonstrations.values())
    read = sum(len(trainer.sources.to_train_on(each)) for each in trainer.stages if "teacher_logits" in each.needs)
    in_steps = sum(row.get("time/score_s", 0.0) for row in rows)
    questions = min(trainer.config.evaluation.num_dev_questions, len(environments.dataset("dev")))
    checks = sum(stop - start == STEPS for start, stop in pairwise(starts))
    return Trial(
        stages=stages,
        demonstration_s=trainer.sources.demonstrations_s / max(found, 1),
        reading_s=max(costs.get("score_s", 0.0) - in_steps, 0.0) / max(read, 1),
        question_s=costs.get("dev_s", 0.0) / max(checks * questions, 1),
        num_test=len(environments.dataset("test")),
        peak=peak_memory(),
    )


def _stage(rows: Sequence[Mapping[str, Any]], count: int) -> dict[str, float] | None:
    """The mean of the last steps, all but the first of them."""
    if count == 0:
        return None
    timed = rows[-count:][1:] or rows[-1:]
    phases = {name: float(np.mean([row.get(f"time/{name}_s", 0.0) for row in timed])) for name in _PHASES}
    before = rows[-count - 1]["cost/trained_tokens"] if len(rows) > count else 0.0
    return phases | {"tokens": (rows[-1]["cost/trained_tokens"] - before) / count}
