"""`metrics.jsonl`: a line for each step, on the disk at once. Every run has it, for resuming and comparing."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agentic_rag_env.files import write_whole
from algorithms.training.loggers.base import LOGGERS, Logger


@dataclass
class JsonLinesConfig:
    """Settings of `JsonLines`: none."""


@LOGGERS.register("jsonl", JsonLinesConfig)
class JsonLines(Logger):
    """Writes `metrics.jsonl`."""

    def open(self, run_dir: Path, start_step: int) -> None:
        """Remove the lines after a step, and go on behind the others."""
        path = run_dir / "metrics.jsonl"
        truncate_metrics(path, start_step)
        self._lines = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        """Append a line; a number that is not finite becomes null, `time/clock` is in seconds since 1970."""
        line = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line["time/clock"] = round(time.time(), 3)
        self._lines.write(json.dumps({"step": step, "stage": stage, **line}, allow_nan=False) + "\n")
        self._lines.flush()

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def truncate_metrics(path: Path, last_step: int) -> None:
    """Remove the lines after a step and broken lines. A message says which earlier steps are lost.

    Args:
        path: A `metrics.jsonl`, which need not exist.
        last_step: The last step to keep.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept, steps = [], set()
    for line in lines:
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            continue
        if step <= last_step and line.endswith(b"\n"):
            kept.append(line)
            steps.add(step)
    if lost := len(set(range(1, last_step + 1)) - steps):
        warnings.warn(
            f"{path} lacks {lost} of the {last_step} steps so far: it was damaged or shortened. Curves will lack them "
            "too; the weights and the final figures do not depend on it.",
            stacklevel=2,
        )
    if kept != lines:
        write_whole(path, b"".join(kept))
