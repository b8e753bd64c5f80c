"""What a policy is worth: exact match and its companions on questions it was not trained on, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from transformers import PreTrainedModel

from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.vector import AgenticRAGVectorEnv
from algorithms.learner.metrics import progress
from algorithms.learner.parts import Networks
from algorithms.learner.schemas import ScoringConfig
from algorithms.learner.trajectories import write_trajectories
from algorithms.learner.types import Trajectory

RESAMPLES = 2000


@dataclass
class Evaluated:
    """A model on the questions of an evaluation.

    Attributes:
        name: What it is called in tables and files.
        teacher_in_memory: Whether a teacher network existed at the time, beside or as the model measured.
        trajectories: By temperature.
        figures: `measure` by temperature.
    """

    name: str
    teacher_in_memory: bool
    trajectories: dict[float, list[Trajectory]] = field(default_factory=dict)
    figures: dict[float, dict[str, Any]] = field(default_factory=dict)

    def by_mode(self) -> dict[str, dict[str, Any]]:
        """The figures by name of the mode of decoding, as `summary.json` holds them."""
        return {mode_name(temperature): figures for temperature, figures in self.figures.items()}


def evaluate_model(
    name: str,
    model: PreTrainedModel,
    networks: Networks,
    envs: AgenticRAGVectorEnv,
    config: ScoringConfig,
    folder: Path,
    split: str = "test",
) -> Evaluated:
    """Play the first questions of a dataset in every mode of decoding, and keep all transcripts.

    Args:
        name: Of the model.
        model: Who plays.
        networks: Makes the rollout engine.
        envs: Where.
        config: How many questions, and the modes.
        folder: Where the transcripts go, to `<split>-<name>-<mode>.jsonl.gz`.
        split: What part of the dataset the questions are.
    """
    count = min(config.num_questions or len(envs.dataset), len(envs.dataset))
    result = Evaluated(name, networks.teacher_in_memory())
    for temperature in config.temperatures:
        mode = mode_name(temperature)
        engine = networks.engine(model, envs, temperature=temperature)
        with progress(f"evaluating {name}, {mode}", count) as show:
            trajectories, _ = engine.rollout(range(count), seed=(config.seed, 1), progress=show)
        result.trajectories[temperature] = trajectories
        result.figures[temperature] = measure(trajectories, envs.dataset, config.seed)
        write_trajectories(folder / f"{split}-{name}-{mode}.jsonl.gz", trajectories, networks.tokenizer)
    return result


def mode_name(temperature: float) -> str:
    """What a mode of decoding is called: `greedy`, or `T=` and the temperature."""
    return "greedy" if temperature == 0 else f"T={temperature:g}"


def measure(trajectories: Sequence[Trajectory], dataset: QuestionSet, seed: int = 0) -> dict[str, Any]:
    """Figures of an evaluation.

    Args:
        trajectories: Of the first questions of the dataset, in its order.
        dataset: Groups the figures by the "dataset" of a question's metadata.
        seed: Of the bootstrap.

    Returns:
        `all` and one entry per group, each with n, exact_match, exact_match_interval (95 %, bootstrap over questions),
        f1, num_searches, malformed_fraction (of turns), answered_fraction and tokens, all means over episodes, and
        retriever_errors, the number of episodes that a failed search ended.
    """
    groups: dict[str, list[Trajectory]] = {"all": list(trajectories)}
    for trajectory, question in zip(trajectories, dataset, strict=False):
        groups.setdefault(str(question.metadata.get("dataset", dataset.name)), []).append(trajectory)
    if len(groups) == 2:
        del groups[next(name for name in groups if name != "all")]
    return {name: _figures(members, seed) for name, members in groups.items()}


def _figures(trajectories: Sequence[Trajectory], seed: int) -> dict[str, Any]:
    correct = np.array([trajectory.correct for trajectory in trajectories], dtype=float)
    return {
        "n": len(trajectories),
        **episode_means(trajectories),
        "exact_match_interval": interval(correct, seed),
        "retriever_errors": sum(trajectory.turns[-1].info["error"] is not None for trajectory in trajectories),
    }


def episode_means(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Means over episodes, of `malformed_fraction` over turns; in training and in evaluation the same."""
    last = [trajectory.turns[-1].info for trajectory in trajectories]
    actions = [turn.info["action"] for trajectory in trajectories for turn in trajectory.turns]
    return {
        "exact_match": float(np.mean([trajectory.correct for trajectory in trajectories])),
        "f1": float(np.mean([info["f1"] for info in last])),
        "num_searches": float(np.mean([info["num_searches"] for info in last])),
        "malformed_fraction": actions.count("malformed") / len(actions),
        "answered_fraction": float(np.mean([trajectory.terminated for trajectory in trajectories])),
        "tokens": float(np.mean([trajectory.num_action_tokens for trajectory in trajectories])),
    }


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap percentile interval of a mean; a point where all values are equal.

    Args:
        values: [n].
        seed: Of the resampling.
    """
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def gain(after: Sequence[Trajectory], before: Sequence[Trajectory], seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Gain in exact match on the same questions, and its 95 % interval over questions (paired bootstrap).

    Args:
        after: Trajectories of the better model, or so one hopes.
        before: Of the other one, on the same questions in the same order.
        seed: Of the resampling.
    """
    difference = np.array([float(a.correct) - float(b.correct) for a, b in zip(after, before, strict=True)])
    return float(difference.mean()), interval(difference, seed)
