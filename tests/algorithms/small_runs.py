"""Whole runs that take seconds, and what two runs of the same settings must have in common."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from algorithms.run import main

TINY = [
    "threads=1", "num_envs=16", "checkpoint_every=2", "dataset.num_passages=150", "dataset.num_questions=60",
    "rollout.max_new_tokens=24", "rollout.max_tokens=512", "env.max_turns=2",
    "evaluation.num_questions=32", "evaluation.every=2", "evaluation.num_dev_questions=8", "probes=[search_behaviour]",
]  # fmt: skip
SFT = ["algo.batch_size=8", "algo.num_demonstrations=24", "algo.epochs=2"]
PPO = ["algo.batch_size=16", "algo.num_minibatches=2", "algo.steps=4", "algo.critic_warmup_steps=1"]
DGPO = [
    "algo=dgpo", *PPO,
    "algo.warm_start.batch_size=8", "algo.warm_start.num_demonstrations=24", "algo.warm_start.epochs=2",
]  # fmt: skip
#: Steps of the two stages with the settings `DGPO`: 24 demonstrations, 8 in a batch, twice; and 4 rollouts.
KD_STEPS, DGPO_STEPS = 6, 4


@dataclass
class Run:
    """What a run left behind."""

    path: Path
    code: int | str | None = 0
    out: str = ""
    err: str = ""

    @cached_property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.path / "summary.json").read_text(encoding="utf-8"))

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    def metrics_without_times(self) -> list[dict[str, Any]]:
        return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in self.metrics]

    def weights(self, step: int) -> dict[str, torch.Tensor]:
        files = list((self.path / "checkpoints" / f"{step:06d}").glob("*model*.safetensors"))  # or that of an adapter
        assert files, step
        return {name: value for file in files for name, value in load_file(file).items()}

    def transcripts(self) -> dict[str, str]:
        files = (self.path / "trajectories").iterdir()
        return {file.name: gzip.decompress(file.read_bytes()).decode() for file in files}

    def scalars(self) -> dict[str, list[tuple[int, float]]]:
        """What TensorBoard shows; the final figures once, however often a finished run was measured."""
        events = EventAccumulator(str(self.path / "tb")).Reload()
        shown = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
        return {
            name: list(dict(points).items()) if name.startswith(("eval/", "arc/")) else points
            for name, points in shown.items()
        }

    def costs_without_times(self) -> dict[str, float]:
        return {name: cost for name, cost in self.summary["costs"].items() if not name.endswith("_s")}


def command(*overrides: str) -> Run:
    """`python -m algorithms.run ...` without a new process; the code is what it exits with."""
    out, err = io.StringIO(), io.StringIO()
    code: int | str | None = 0
    try:
        with (
            patch.object(sys, "argv", ["run", *overrides]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            code, _ = 1, err.write(code + "\n")
    return Run(Path(), code, out.getvalue(), err.getvalue())


def train(path: Path, cache: Path, *overrides: str) -> Run:
    """A small run into a directory; it must succeed."""
    run = command(*TINY, *overrides, f"hydra.run.dir={path}", f"cache_dir={cache}")
    assert run.code == 0, run.err
    return Run(path, run.code, run.out, run.err)


def resume(path: Path) -> Run:
    """Go on with a run; it must succeed."""
    run = command(f"resume={path}")
    assert run.code == 0, run.err
    return Run(path, run.code, run.out, run.err)


def assert_same_training(first: Run, second: Run) -> None:
    """Bit for bit the same steps and weights."""
    assert first.metrics_without_times() == second.metrics_without_times()
    last = first.metrics[-1]["step"]
    mine, theirs = first.weights(last), second.weights(last)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def assert_same_run(first: Run, second: Run) -> None:
    """Bit for bit the same in everything but the times."""
    assert_same_training(first, second)
    for name in ("algo", "stages", "seed", "evaluation", "gain", "demonstrations", "teacher_share_of_training"):
        assert first.summary[name] == second.summary[name], name
    assert first.costs_without_times() == second.costs_without_times()
    assert first.transcripts() == second.transcripts()
    mine, theirs = first.scalars(), second.scalars()
    assert mine.keys() == theirs.keys()
    assert all(mine[name] == theirs[name] for name in mine if not name.startswith("time/"))
    assert {path.name for path in (first.path / "checkpoints").iterdir()} == {
        path.name for path in (second.path / "checkpoints").iterdir()
    }
