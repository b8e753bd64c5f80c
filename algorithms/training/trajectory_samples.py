"""A few trajectories on disk: those of training steps with figures of every token, and those of dev checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agentic_rag_env.datasets.base import QuestionSet
from algorithms.learner import ranks
from algorithms.learner.training_step import Learner
from algorithms.learner.types import Batch, Trajectory
from algorithms.rollout.trajectory_files import transcript, write_trajectories
from algorithms.training.episode_figures import dev_metrics
from algorithms.training.run_logger import RunLogger

NUM_SAVED = 8
_NUM_CHECKED = 16


def is_due(every: int, step: int, total_steps: int) -> bool:
    """Whether a task is due after a step. It is due every `every` steps of a stage and at its end; with 0, never."""
    return bool(every) and (step % every == 0 or step == total_steps)


def write_sample(
    run_dir: Path,
    step: int,
    trajectories: Sequence[Trajectory],
    dataset: QuestionSet,
    tokenizer: Any,
    figures: Sequence[Mapping[str, np.ndarray]] = (),
) -> None:
    """Write the first trajectories that a step has trained on, to `trajectories/train-<step>.jsonl.gz` of the run.

    Args:
        run_dir: The run directory.
        step: Step of the whole run.
        trajectories: Trajectories of the step.
        dataset: The dataset with their questions.
        tokenizer: Decodes the text beside the ids.
        figures: Figures of the first trajectories, see `token_figures`.
    """
    if not ranks.is_first():
        return
    saved = trajectories[:NUM_SAVED]
    ids = [trajectory.turns[-1].info["question_id"] for trajectory in saved]
    questions = {question.id: question for question in dataset if question.id in ids}
    write_trajectories(_path(run_dir, "train", step), saved, tokenizer, [questions[each] for each in ids], figures)


def write_check(
    run_dir: Path,
    step: int,
    trajectories: Sequence[Trajectory],
    dataset: QuestionSet,
    tokenizer: Any,
    logger: RunLogger,
) -> dict[str, float]:
    """Keep a check on the dev split: first trajectories in a file, and one transcript in the log, each time another.

    Args:
        run_dir: The run directory; the file is `trajectories/dev-<step>.jsonl.gz` in it.
        step: Step of the whole run.
        trajectories: Trajectories of the first questions of the dataset.
        dataset: The questions.
        tokenizer: Decodes the text beside the ids.
        logger: Shows the transcript.

    Returns:
        The figures to log.
    """
    if ranks.is_first():
        logger.text("transcripts/dev", transcript(trajectories[step % len(trajectories)], tokenizer), step)
        write_trajectories(_path(run_dir, "dev", step), trajectories[:_NUM_CHECKED], tokenizer, dataset)
    return dev_metrics(trajectories)


def _path(run_dir: Path, split: str, step: int) -> Path:
    return run_dir / "trajectories" / f"{split}-{step:06d}.jsonl.gz"


def token_figures(batch: Batch, learner: Learner) -> list[dict[str, np.ndarray]]:
    """Compute figures of the model-written tokens of a batch's first trajectories, after an update on them.

    Args:
        batch: The batch after `Learner.update`.
        learner: The learner that trained on it.

    Returns:
        For each of the first `NUM_SAVED` trajectories, [n] float32 by name. `advantages` is there if the algorithm has
        any. `ref_kl` and `teacher_kl` are there if the learner has that network: the exact KL(policy || network) over
        the vocabulary in nats, for the policy after the update.
    """
    batch = batch.select(range(min(NUM_SAVED, len(batch))))
    columns = {} if batch.advantages is None else {"advantages": batch.advantages}
    for name, network in (("ref", learner.reference), ("teacher", learner.teacher)):
        if network is not None:
            columns[f"{name}_kl"] = learner.scorer.kl_and_logprobs(learner.policy, network, batch, name == "teacher")[0]
    return [
        {name: column[row][mask].cpu().numpy() for name, column in columns.items()}
        for row, mask in enumerate(batch.response_mask)
    ]
