"""What a model played, kept on disk between runs: a model that all of them measure alike is measured by one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentic_rag_env.errors import DataError
from agentic_rag_env.probes import Figures
from algorithms.learner.metrics import write_whole
from algorithms.learner.trajectories import read_trajectories, write_trajectories
from algorithms.learner.types import Trajectory


class Kept:
    """Episodes of one model under one set of conditions, and the figures of probes on them.

    Args:
        folder: Of nothing else; None to keep nothing.
        tokenizer: For the text in the files.

    Attributes:
        found_all: Whether all that was asked for was there.
    """

    def __init__(self, folder: Path | None, tokenizer: Any) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self.found_all = True

    def episodes(self, mode: str, play: Callable[[], list[Trajectory]]) -> list[Trajectory]:
        """Those of a mode of decoding, played if they are not there.

        Episodes are not kept if a search has failed in any of them: another time it may not.
        """
        path = self._folder and self._folder / f"{mode}.jsonl.gz"
        if path and path.exists():
            return read_trajectories(path)
        self.found_all = False
        played = play()
        if any(trajectory.turns[-1].info["error"] is not None for trajectory in played):
            self._folder = None
        elif path:
            write_trajectories(path, played, self._tokenizer)
        return played

    def arc(self, ask: Callable[[], dict[str, Figures]]) -> dict[str, Figures]:
        """Figures of the probes, measured if they are not there.

        Raises:
            DataError: The file is damaged.
        """
        path = self._folder and self._folder / "arc.json"
        if path and path.exists():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise DataError(f"{path} is damaged ({error}); delete the folder that it is in.") from error
        self.found_all = False
        figures = ask()
        if path:
            write_whole(path, json.dumps(figures).encode())
        return figures
