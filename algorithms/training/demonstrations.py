"""The teacher's trajectories to imitate: collected once, kept on disk, reused by every run that would collect them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from algorithms.learner import seeding
from algorithms.learner.types import Trajectory
from algorithms.rollout.player import Player
from algorithms.rollout.trajectory_files import read_trajectories, write_trajectories
from algorithms.training.file_locks import exclusively
from algorithms.training.kept_files import read_kept, seal
from algorithms.training.run_logger import progress


@dataclass
class Demonstrations:
    """What came of asking the teacher.

    Attributes:
        trajectories: Those to train on, in the order of asking; possibly fewer than wanted, or none.
        num_wanted: Trajectories asked for.
        num_asked: Training questions that the teacher was asked.
        num_sampled_tokens: Tokens that it wrote on all of them.
    """

    trajectories: list[Trajectory]
    num_wanted: int
    num_asked: int
    num_sampled_tokens: int

    def counts(self) -> dict[str, int]:
        """The numbers for the summary."""
        return {"wanted": self.num_wanted, "found": len(self.trajectories), "asked": self.num_asked}


def collect(
    player: Player,
    num_questions: int,
    count: int,
    *,
    max_questions: int,
    correct_only: bool = True,
    seed: int,
    parts: Path | None = None,
) -> Demonstrations:
    """Let the teacher answer training questions, each at most once, until enough trajectories are worth imitating.

    Args:
        player: Plays the teacher in the training environments.
        num_questions: Questions of these environments.
        count: Trajectories wanted.
        max_questions: Most questions to ask; where they do not bring enough, there are fewer trajectories.
        correct_only: See `is_demonstration`.
        seed: Of the order of questions and of the teacher's draws.
        parts: Folder where what comes of each rollout is kept meanwhile, for a process that takes over after a crash.
    """
    order = seeding.rng(seed, "demonstrations").permutation(num_questions)[:max_questions].tolist()
    result = Demonstrations([], count, 0, 0)
    size = player.envs.num_envs
    with progress("collecting demonstrations", count) as show:
        for start in range(0, len(order), size):
            ask = partial(_ask, player, order[start : start + size], (seed, start), correct_only)
            part = cached(parts / f"{start:08d}.jsonl.gz", ask, player.engine.tokenizer) if parts else ask()
            result.num_asked += part.num_asked
            result.num_sampled_tokens += part.num_sampled_tokens
            result.trajectories += part.trajectories
            show(min(len(result.trajectories), count), count)
            if len(result.trajectories) >= count:
                break
    del result.trajectories[count:]
    return result


def _ask(player: Player, questions: list[int], seed: tuple[int, int], correct_only: bool) -> Demonstrations:
    """What comes of asking the teacher some questions once."""
    played, stats = player.rollout(questions, seed=seed, source="teacher")
    found = [each for each in played if is_demonstration(each, correct_only)]
    return Demonstrations(found, len(questions), len(played), stats.sampled_tokens)


def is_demonstration(trajectory: Trajectory, correct_only: bool = True) -> bool:
    """Whether a trajectory is worth imitating: answered, and no malformed turn on the way.

    Args:
        trajectory: The teacher's.
        correct_only: The answer must also match exactly.
    """
    return (
        trajectory.terminated
        and (trajectory.correct or not correct_only)
        and all(turn.info["action"] != "malformed" for turn in trajectory.turns)
    )


def cached(path: Path, make: Callable[[], Demonstrations], tokenizer: Any) -> Demonstrations:
    """What a file holds, made and written first if it is not there; by one run, where several want it at once.

    A file that is damaged, was shortened or belongs to something else is made again, with a word.

    Args:
        path: Ends in `.jsonl.gz`; the counts stand in its seal.
        make: Collects.
        tokenizer: For the text in the file.
    """
    found = read_kept(path, read_trajectories, warn=False)
    if found is None:
        lock = path.with_name(path.name.removesuffix(".jsonl.gz") + ".lock")
        with exclusively(lock, "waiting for another run, which collects the same demonstrations"):
            found = read_kept(path, read_trajectories)
            if found is None:
                made = make()
                write_trajectories(path, made.trajectories, tokenizer)
                seal(path, {name: value for name, value in vars(made).items() if name != "trajectories"})
                return made
    trajectories, numbers = found
    return Demonstrations(trajectories, **numbers)
