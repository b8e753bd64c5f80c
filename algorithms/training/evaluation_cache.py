"""Evaluations kept on disk between runs, so that only one run measures a model that all of them measure alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from agentic_rag_env.files import write_whole
from agentic_rag_env.probes import Figures
from algorithms.learner import ranks
from algorithms.learner.types import Trajectory
from algorithms.rollout.trajectory_files import read_trajectories, write_trajectories
from algorithms.training.build import Networks, RunEnvs
from algorithms.training.fingerprints import of_code, of_playing, of_retriever
from algorithms.training.kept_files import read_kept, seal
from algorithms.training.settings import RunConfig, ScoringConfig


def place(
    root: Path, config: RunConfig, networks: Networks, envs: RunEnvs, model: str, is_teacher: bool
) -> Path | None:
    """Find the folder of an evaluation: its name is a hash of all that the evaluation depends on.

    Args:
        root: Folder of all evaluations.
        config: Settings of the run.
        networks: Networks of the run, which play with the model.
        envs: The environments in which it plays.
        model: Folder or hub id.
        is_teacher: Whether the model is the teacher, which may be softened or loaded in another precision.

    Returns:
        The folder; None if something that the evaluation depends on is not known.
    """
    searched, code = of_retriever(envs.retriever), of_code()
    if searched is None or code is None:
        return None
    settings = {name: getattr(config, name) for name in ("env", "retriever", "reward", "num_envs", "probes")}
    settings |= {
        "rollout": vars(config.rollout),
        "scoring": {field.name: getattr(config.evaluation, field.name) for field in fields(ScoringConfig)},
        "precision": networks.precision,
        "vocab_size": networks.vocab_size,
        "device": networks.device.type,
        "is_teacher": is_teacher,
        "teacher_temperature": config.model.teacher_temperature if is_teacher else None,
        "teacher_dtype": config.model.teacher_dtype if is_teacher else None,
        "searched": searched,
        "code": code,
    }
    tokenizer = networks.teacher_tokenizer if is_teacher else networks.tokenizer
    key = of_playing(settings, model, tokenizer, envs.dataset)
    return root / key


class Kept:
    """Episodes of one model under one set of conditions, and the figures of probes on them.

    A file that is damaged, shortened or belongs to something else is made again, with a message.

    Args:
        folder: A folder for this evaluation alone; None keeps nothing.
        tokenizer: Decodes the text in the files.

    Attributes:
        found_all: Whether everything asked for was there.
    """

    def __init__(self, folder: Path | None, tokenizer: Any) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self.found_all = True

    def episodes(self, mode: str, play: Callable[[], list[Trajectory]]) -> list[Trajectory]:
        """Get the episodes of a mode of decoding; they are played if they are not there.

        Episodes are not kept if a search has failed in any of them, because it may not fail another time.
        """
        path = self._folder and self._folder / f"{mode}.jsonl.gz"
        if path and (kept := ranks.decided(lambda: read_kept(path, read_trajectories))) is not None:
            return kept[0]
        self.found_all = False
        played = play()
        if any(trajectory.error is not None for trajectory in played):
            self._folder = None
        elif path and ranks.is_first():
            write_trajectories(path, played, self._tokenizer)
            seal(path)
        return played

    def arc(self, ask: Callable[[], tuple[dict[str, Figures], bool]]) -> dict[str, Figures]:
        """Get the figures of the probes; they are measured if they are not there.

        Args:
            ask: Measures the figures, and says whether to keep them: not if a search has failed meanwhile.
        """
        path = self._folder and self._folder / "arc.json"
        if path and (kept := ranks.decided(lambda: read_kept(path, _read_json))) is not None:
            return kept[0]
        self.found_all = False
        figures, is_lasting = ask()
        if path and is_lasting and ranks.is_first():
            write_whole(path, json.dumps(figures).encode())
            seal(path)
        return figures


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
