"""Evaluation: exact match and other scores, with intervals, on questions that the policy was not trained on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.files import file_name, write_whole
from agentic_rag_env.probes import Figures, Material, interval, macro_interval, run_probes
from agentic_rag_env.rewards import sub_exact_match
from agentic_rag_env.types import Question
from algorithms.learner import ranks
from algorithms.learner.types import Trajectory
from algorithms.rollout.generator import Generator
from algorithms.rollout.player import Player, Progress
from algorithms.rollout.trajectory_files import write_trajectories
from algorithms.training.build import Networks, RunEnvs
from algorithms.training.episode_figures import episode_means
from algorithms.training.evaluation_cache import Kept
from algorithms.training.loggers.base import without_surrogates
from algorithms.training.run_logger import progress
from algorithms.training.settings import RunConfig, ScoringConfig

#: Scores of an episode. Their means, with intervals, are figures of an evaluation.
SCORES = ("exact_match", "f1", "sub_exact_match")


@dataclass
class Evaluated:
    """What a model did on the questions of an evaluation.

    Attributes:
        name: Name of the model in tables and files.
        teacher_in_memory: Whether a teacher network existed at the time, as the model measured or beside it.
        trajectories: Trajectories by temperature.
        figures: Results of `measure` by temperature.
        arc: Figures of the probes by their names.
        probes_s: Seconds that the probes took.
        group_names: Names of the groups of questions.
        kept: Whether everything was kept from an earlier run, so that nothing was played.
    """

    name: str
    teacher_in_memory: bool = False
    kept: bool = False
    trajectories: dict[float, list[Trajectory]] = field(default_factory=dict)
    figures: dict[float, dict[str, Any]] = field(default_factory=dict)
    arc: dict[str, Figures] = field(default_factory=dict)
    probes_s: float = 0.0
    group_names: list[str] = field(default_factory=list)

    @property
    def num_questions(self) -> int:
        """Number of questions played in every mode: the first ones of the dataset."""
        return len(next(iter(self.trajectories.values())))

    def by_mode(self) -> dict[str, dict[str, Any]]:
        """The figures by the name of the mode of decoding; `summary.json` holds them in this form."""
        return {mode_name(temperature): figures for temperature, figures in self.figures.items()}


def evaluate_model(
    name: str,
    load: Callable[[], PreTrainedModel],
    networks: Networks,
    envs: RunEnvs,
    config: ScoringConfig,
    folder: Path,
    split: str = "test",
    probes: Sequence[Any] = (),
    kept_in: Path | None = None,
) -> Evaluated:
    """Evaluate a language model and probe it.

    Args:
        name: Name of the model.
        load: Returns the model; not called if everything is kept.
        networks: Makes the rollout engine.
        envs: The environments in which the model plays.
        config: The number of questions, and the modes.
        folder: The run directory.
        split: The part of the dataset that the questions are from.
        probes: Names, or mappings with `name` and settings.
        kept_in: Folder that keeps what this model plays under these conditions; None keeps nothing.
    """
    if config.corpus != "own" and config.corpus not in probes:
        probes = [*probes, config.corpus]
    model, kept = cache(load), Kept(kept_in, networks.tokenizer)

    @cache
    def player(temperature: float) -> Player:
        return networks.player(model(), envs, temperature)

    def play(temperature: float, count: int, show: Progress) -> list[Trajectory]:
        return kept.episodes(
            mode_name(temperature),
            lambda: player(temperature).rollout(range(count), seed=(config.seed, 1), progress=show)[0],
        )

    result = evaluate_player(name, play, envs.dataset, networks.tokenizer, config, folder, split)
    if probes:
        started = time.perf_counter()
        # The lowest temperature is 0, greedy, if there is such a mode.
        lowest = min(result.trajectories)

        def ask() -> tuple[dict[str, Figures], bool]:
            return probe(networks.generator(model(), envs), envs, result.trajectories[lowest], probes, config.seed)

        result.arc = kept.arc(ask)
        result.probes_s = time.perf_counter() - started
    result.teacher_in_memory, result.kept = networks.teacher_in_memory(), kept.found_all
    return result


def evaluate_player(
    name: str,
    play: Callable[[float, int, Progress], list[Trajectory]],
    dataset: QuestionSet,
    tokenizer: PreTrainedTokenizerBase,
    config: ScoringConfig,
    folder: Path,
    split: str = "test",
) -> Evaluated:
    """Let any player play the first questions of a dataset in every mode of decoding, and write all results.

    Args:
        name: Name of the player.
        play: Plays a number of first questions at a temperature, and calls its third argument on the way.
        dataset: The questions.
        tokenizer: Tokenizer of the trajectories.
        config: The number of questions, and the modes.
        folder: The run directory. Transcripts go to `trajectories/<split>-<name>-<mode>.jsonl.gz` in it, predictions
            to `predictions/<split>-<name>-<mode>.jsonl`.
        split: The part of the dataset that the questions are from.
    """
    count = min(config.num_questions or len(dataset), len(dataset))
    result = Evaluated(name, group_names=list(dict.fromkeys(_group(question, dataset) for question in dataset[:count])))
    for temperature in config.temperatures:
        mode = mode_name(temperature)
        with progress(f"evaluating {name}, {mode}", count) as show:
            trajectories = play(temperature, count, show)
        result.trajectories[temperature] = trajectories
        result.figures[temperature] = measure(trajectories, dataset, config.seed)
        file = f"{file_name(split)}-{file_name(name)}-{mode}.jsonl"
        if ranks.is_first():
            write_trajectories(folder / "trajectories" / f"{file}.gz", trajectories, tokenizer, dataset)
            write_predictions(folder / "predictions" / file, trajectories, dataset)
    return result


def probe(
    generator: Generator,
    envs: RunEnvs,
    trajectories: Sequence[Trajectory],
    probes: Sequence[Any],
    seed: int = 0,
) -> tuple[dict[str, Figures], bool]:
    """Measure the figures of the ARC probes. The first process runs the probes, and all of them write.

    Args:
        generator: The model that played the trajectories.
        envs: The environments in which it played.
        trajectories: Its episodes on the first questions of the environments' dataset, in the order of these.
        probes: Names, or mappings with `name` and settings.
        seed: Seed of what the probes draw, and of the bootstrap.

    Returns:
        The figures by probe, and whether they would be the same another time: no search has failed.
    """
    material = Material(
        questions=envs.dataset[: len(trajectories)],
        generate=generator,
        episodes=[[turn.info for turn in trajectory.turns] for trajectory in trajectories],
        retriever=envs.retriever,
        corpus=envs.dataset.corpus,
        seed=seed,
        **({} if envs.rules is None else {"prompt": envs.rules.prompt, "top_k": envs.top_k, "envs": envs}),
    )
    return ranks.led(lambda: (run_probes(material, probes), not material.any_search_failed), generator.answer)


def arc_metrics(arc: Mapping[str, Figures], prefix: str = "arc") -> dict[str, float]:
    """Values of probes by their names in the log: `arc/<probe>/<metric>`."""
    return {f"{prefix}/{name}/{metric}": figure["value"] for name, of in arc.items() for metric, figure in of.items()}


def write_predictions(path: Path, trajectories: Sequence[Trajectory], dataset: QuestionSet) -> None:
    """Write a JSON line per question: id, dataset, golden answers, prediction, ending, scores."""
    lines = []
    for trajectory, question in zip(trajectories, dataset, strict=False):
        info = trajectory.turns[-1].info
        row = {
            "question_id": question.id,
            "dataset": _group(question, dataset),
            "golden_answers": list(question.golden_answers),
            "prediction": info["answer"],
            "ending": trajectory.ending,
            "correct": trajectory.correct,
            "f1": info["f1"],
            "sub_exact_match": sub_exact_match(info["answer"], question.golden_answers),
            "num_searches": info["num_searches"],
        }
        lines.append(without_surrogates(json.dumps(row, ensure_ascii=False)) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(lines).encode())


def questions_at_end(config: RunConfig, num_stages: int, num_test: int) -> int:
    """How many questions the final evaluation asks of all models and in all modes, if no answers are kept already.

    Args:
        config: The run's settings.
        num_stages: Number of stages, each of which leaves a policy; the raw one and the teacher are asked, too.
        num_test: Questions of the test split.
    """
    scoring = config.evaluation
    models = 1 + num_stages + (config.model.teacher is not None)
    return min(num_test, scoring.num_questions or num_test) * len(scoring.temperatures) * models


def mode_name(temperature: float) -> str:
    """Name of a mode of decoding: `greedy`, or `T=` and the temperature."""
    return "greedy" if temperature == 0 else f"T={temperature:g}"


def measure(trajectories: Sequence[Trajectory], dataset: QuestionSet, seed: int = 0) -> dict[str, Any]:
    """Compute the figures of an evaluation.

    Args:
        trajectories: Trajectories of the first questions of the dataset, in its order.
        dataset: Groups the figures by the "dataset" of a question's metadata.
        seed: Seed of the bootstrap.

    Returns:
        `all` and one entry per group. Each has n, exact_match, f1 and sub_exact_match, and the 95 % bootstrap interval
        of each score over questions (`<score>_interval`). It also has the rest of `episode_means`, and
        retriever_errors, the number of episodes that a failed search ended. `all` has `macro_<score>` and
        `macro_<score>_interval` too: the unweighted mean over the groups.
    """
    groups: dict[str, list[int]] = {}
    for number, question in enumerate(dataset[: len(trajectories)]):
        groups.setdefault(_group(question, dataset), []).append(number)
    scores = _scores(trajectories, dataset)
    by_group = {name: {score: values[numbers] for score, values in scores.items()} for name, numbers in groups.items()}
    figures = {"all": _figures(trajectories, scores, seed) | _macro(list(by_group.values()), seed)}
    if len(groups) > 1:
        for name, numbers in groups.items():
            figures[name] = _figures([trajectories[number] for number in numbers], by_group[name], seed)
    return figures


def _group(question: Question, dataset: QuestionSet) -> str:
    return str(question.metadata.get("dataset", dataset.name))


def _scores(trajectories: Sequence[Trajectory], dataset: QuestionSet) -> dict[str, np.ndarray]:
    """Compute each of `SCORES` for every episode, [n]."""
    rows = []
    for trajectory, question in zip(trajectories, dataset, strict=False):
        info = trajectory.turns[-1].info
        rows.append((trajectory.correct, info["f1"], sub_exact_match(info["answer"], question.golden_answers)))
    return dict(zip(SCORES, np.array(rows, dtype=float).T, strict=True))


def _figures(trajectories: Sequence[Trajectory], scores: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
    return {
        "n": len(trajectories),
        **episode_means(trajectories),
        **{name: float(values.mean()) for name, values in scores.items()},
        **{f"{name}_interval": interval(values, seed) for name, values in scores.items()},
        "retriever_errors": sum(trajectory.error is not None for trajectory in trajectories),
    }


def _macro(groups: Sequence[Mapping[str, np.ndarray]], seed: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name in SCORES:
        values = [group[name] for group in groups]
        figures[f"macro_{name}"] = float(np.mean([of_group.mean() for of_group in values]))
        figures[f"macro_{name}_interval"] = macro_interval(values, seed)
    return figures


def gain(after: Sequence[Trajectory], before: Sequence[Trajectory], seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Compute the gain in exact match on the same questions, and its 95 % interval over questions (paired bootstrap).

    Args:
        after: Trajectories of the model that was trained.
        before: Trajectories of the model it started from, on the same questions in the same order.
        seed: Seed of the resampling.
    """
    difference = np.array([float(a.correct) - float(b.correct) for a, b in zip(after, before, strict=True)])
    return float(difference.mean()), interval(difference, seed)
