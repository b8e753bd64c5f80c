"""Demonstrations are collected once, kept on disk, and reused by every run that would collect the same ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from algorithms.learner import ranks, seeding
from algorithms.learner.config import FILTERS
from algorithms.learner.types import Trajectory
from algorithms.rollout.trajectory_files import read_trajectories, write_trajectories
from algorithms.training.demonstrations.source import Source
from algorithms.training.file_locks import exclusively
from algorithms.training.kept_files import read_kept, seal
from algorithms.training.run_logger import progress

SEARCH_FAILED = "search_failed"


@dataclass
class Demonstrations:
    """What a source has played.

    Attributes:
        trajectories: Trajectories to train on, in the order of asking; possibly fewer than wanted, or none.
        num_wanted: Trajectories asked for.
        num_asked: Training questions that the source was asked.
        num_sampled_tokens: Tokens that it wrote on all these questions.
        dropped: How many trajectories were dropped, by reason; also items that were never played.
        costs: What the source spent elsewhere, by name.
    """

    trajectories: list[Trajectory]
    num_wanted: int
    num_asked: int
    num_sampled_tokens: int
    dropped: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)

    def counts(self) -> dict[str, Any]:
        """The numbers for the summary."""
        counts = {"wanted": self.num_wanted, "found": len(self.trajectories), "asked": self.num_asked}
        more = {"dropped": self.dropped, "costs": self.costs}
        return counts | {name: dict(sorted(numbers.items())) for name, numbers in more.items() if numbers}


def collect(
    source: Source,
    count: int,
    *,
    max_questions: int,
    filters: Sequence[str] = FILTERS,
    seed: int,
    parts: Path | None = None,
) -> Demonstrations:
    """Let a source play training questions, until enough trajectories are worth imitating.

    Args:
        source: Plays in the training environments, each of its items at most once.
        count: Trajectories wanted.
        max_questions: Most items to play. If these do not bring enough, there are fewer trajectories.
        filters: See `reason_to_drop`.
        seed: Seed of the order of questions and of a model's draws.
        parts: Folder that keeps the results of each rollout meanwhile, for a process that takes over after a crash.
    """
    order = seeding.rng(seed, "demonstrations").permutation(source.num_items)[:max_questions].tolist()
    result = Demonstrations([], count, 0, 0)
    size, dropped = source.envs.num_envs, Counter[str]()
    with progress("collecting demonstrations", count) as show:
        for start in range(0, len(order), size):
            ask = partial(_ask, source, order[start : start + size], (seed, start), filters)
            tokenizer = source.networks.tokenizer
            part = cached(parts / f"{start:08d}.jsonl.gz", ask, tokenizer) if parts else ask()
            result.num_asked += part.num_asked
            result.num_sampled_tokens += part.num_sampled_tokens
            result.trajectories += part.trajectories
            dropped.update(part.dropped)
            for name, spent in part.costs.items():
                result.costs[name] = result.costs.get(name, 0) + spent
            show(min(len(result.trajectories), count), count)
            if len(result.trajectories) >= count:
                break
    del result.trajectories[count:]
    counts, costs = ranks.decided(lambda: (source.counts, result.costs))
    result.dropped = dict(dropped) | {name: value for name, value in counts.items() if value}
    result.costs = {name: value for name, value in costs.items() if value}
    return result


def _ask(source: Source, items: list[int], seed: tuple[int, int], filters: Sequence[str]) -> Demonstrations:
    """Play some items once."""
    before = dict(source.costs)
    played, reasons, stats = source.play(items, seed)
    costs = {name: spent - before.get(name, 0) for name, spent in source.costs.items()}
    found, dropped = [], Counter[str]()
    for trajectory, given in zip(played, reasons, strict=True):
        reason = reason_to_drop(trajectory, filters, source.rollout.max_new_tokens, given)
        if reason is None:
            found.append(trajectory)
        else:
            dropped[reason] += 1
    return Demonstrations(found, len(items), len(played), stats.sampled_tokens, dict(dropped), costs)


def reason_to_drop(
    trajectory: Trajectory, filters: Sequence[str], max_new_tokens: int, given: str | None = None
) -> str | None:
    """Say why a trajectory is not worth imitating; None if it is.

    Args:
        trajectory: A trajectory of any source.
        filters: "correct": the answer matches exactly; "well_formed": no malformed turn; "length": no action of more
            than `max_new_tokens`. Without an answer it is dropped in any case.
        max_new_tokens: Most tokens of an action.
        given: Why its source would drop it. A failed search comes first, because the source had no say in it.
    """
    if trajectory.error is not None:
        return SEARCH_FAILED
    if given is not None:
        return given
    if "well_formed" in filters and any(turn.info["action"] == "malformed" for turn in trajectory.turns):
        return "malformed"
    if not trajectory.terminated:
        return "unfinished"
    if "length" in filters and any(len(turn.action_ids) > max_new_tokens for turn in trajectory.turns):
        return "too_long"
    return "wrong" if "correct" in filters and not trajectory.correct else None


def cached(
    path: Path, make: Callable[[], Demonstrations], tokenizer: Any, if_searches_failed: Path | None = None
) -> Demonstrations:
    """Read demonstrations from a file. If it is missing, collect and write them first; only one run at a time does so.

    A file that is damaged, shortened or belongs to something else is made again, with a message.

    Args:
        path: Path that ends in `.jsonl.gz`; the counts stand in the file's seal.
        make: Collects the demonstrations.
        tokenizer: Decodes the text in the file.
        if_searches_failed: The path in its place if a search has failed in any episode, because it may not fail another
            time; None: they are not kept then.
    """
    found = ranks.decided(lambda: read_kept(path, read_trajectories, warn=False))
    if found is None:
        lock = path.with_name(path.name.removesuffix(".jsonl.gz") + ".lock")
        waiting = "waiting for another run, which collects the same demonstrations"
        with exclusively(lock, waiting) if ranks.is_first() else nullcontext():
            found = ranks.decided(lambda: read_kept(path, read_trajectories))
            if found is None:
                made = make()
                kept_in = if_searches_failed if SEARCH_FAILED in made.dropped else path
                if ranks.is_first() and kept_in is not None:
                    write_trajectories(kept_in, made.trajectories, tokenizer)
                    seal(kept_in, {name: value for name, value in vars(made).items() if name != "trajectories"})
                return made
    trajectories, numbers = found
    return Demonstrations(trajectories, **numbers)
