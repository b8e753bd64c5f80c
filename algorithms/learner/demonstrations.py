"""The teacher's correct trajectories: collected once, kept on disk, reused by every run that would collect the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.errors import ConfigurationError
from algorithms.learner import seeding
from algorithms.learner.rollout import RolloutEngine
from algorithms.learner.trajectories import read_trajectories, write_trajectories
from algorithms.learner.types import Trajectory

_FORMAT = 1


def cache_key(settings: dict[str, Any], teacher_folder: str, dataset: QuestionSet) -> str:
    """A digest of everything that decides which trajectories are collected.

    Args:
        settings: Of environment, retriever, reward, rollout and seed, as plain values.
        teacher_folder: Its weight files are read; a hub id counts by its name.
        dataset: Its questions are read.
    """
    digest = hashlib.sha256(json.dumps({**settings, "format": _FORMAT}, sort_keys=True, default=str).encode())
    folder = Path(teacher_folder)
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        digest.update(file.read_bytes())
    digest.update(teacher_folder.encode() if not folder.is_dir() else b"")
    for question in dataset:
        digest.update(repr((question.id, question.text, question.golden_answers)).encode("utf-8", "backslashreplace"))
    for passage in dataset.corpus or ():
        digest.update(passage.contents.encode("utf-8", "backslashreplace"))
    return digest.hexdigest()[:32]


def collect(engine: RolloutEngine, count: int, *, seed: int) -> Iterator[Trajectory]:
    """Let the teacher answer training questions until enough trajectories are right.

    A trajectory counts if its answer matches exactly and no turn was malformed. Every question is asked once; the first
    `count` right ones in the order of asking are yielded.

    Args:
        engine: Plays the teacher in the training environments.
        count: Trajectories wanted.
        seed: Of the order of questions and of the teacher's draws.

    Raises:
        ConfigurationError: The teacher is right too seldom.
    """
    order = seeding.rng(seed, "demonstrations").permutation(len(engine.envs.dataset))
    num_found = num_asked = 0
    while num_found < count:
        questions = order[num_asked : num_asked + engine.envs.num_envs]
        if not len(questions):
            raise ConfigurationError(
                f"The teacher was right on {num_found} of {num_asked} training questions, and {count} demonstrations "
                "are wanted. Ask for fewer (num_demonstrations), give more training questions, or choose a teacher "
                "that knows the task."
            )
        trajectories, _ = engine.rollout(questions, seed=(seed, num_asked), source="teacher")
        num_asked += len(questions)
        for trajectory in filter(is_demonstration, trajectories):
            if num_found < count:
                num_found += 1
                yield trajectory


def is_demonstration(trajectory: Trajectory) -> bool:
    """Whether a trajectory is worth imitating: the right answer, and no malformed turn on the way."""
    return (
        trajectory.correct
        and trajectory.terminated
        and all(turn.info["action"] != "malformed" for turn in trajectory.turns)
    )


def cached(path: Path, make: Callable[[], list[Trajectory]], tokenizer: Any) -> list[Trajectory]:
    """The trajectories of a file, made and written first if it is not there."""
    if not path.exists():
        write_trajectories(path, make(), tokenizer)
    return read_trajectories(path)
