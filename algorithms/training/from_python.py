"""Whole runs from Python: `train(configure(algo="dgpo"), "runs/first")` does what the command line does."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.files import write_whole
from algorithms.learner.algorithm import ALGORITHMS, trains_language_model
from algorithms.training import compose, run_directory
from algorithms.training.run_files import OVERRIDES_FILE, plain_data, read_metrics, read_summary, write_settings
from algorithms.training.settings import RunConfig


@dataclass(frozen=True)
class RunResult:
    """What a complete run left behind.

    Attributes:
        run_dir: The run directory.
        summary: What `summary.json` holds: the figures of every model measured, costs, versions, settings.
        curves: By training step, the metrics of that step by full name (`train/loss`), and its `stage`. A number that
            was not finite is None.
        checkpoints: By training step, a folder in Hugging Face format; the last one is the trained policy.
    """

    run_dir: Path
    summary: dict[str, Any]
    curves: dict[int, dict[str, Any]]
    checkpoints: dict[int, Path]

    def curve(self, metric: str) -> dict[int, float]:
        """One metric by training step, at the steps that have it."""
        return {step: row[metric] for step, row in self.curves.items() if row.get(metric) is not None}

    def exact_match(self, mode: str = "greedy") -> float:
        """Exact match of the trained policy on the test questions, in [0, 1].

        Args:
            mode: Mode of decoding, such as "greedy" or "T=1".
        """
        trained = [stage["name"] for stage in self.summary["stages"] if stage["name"] in self.summary["evaluation"]]
        return self.summary["evaluation"][trained[-1]][mode]["all"]["exact_match"]


def train(config: RunConfig, run_dir: str | Path) -> RunResult:
    """Carry out a whole run: train, measure on the test questions, write everything into a directory.

    A run that was begun there with the same settings goes on after its newest checkpoint; a complete one is only read.
    In a terminal or a notebook a live line shows the progress. The random generators of the process are set.

    Args:
        config: The settings, made by `configure` or by `RunConfig(algo="dgpo", ...)`.
        run_dir: The run directory; made if absent.

    Returns:
        The summary, the curves and the checkpoints.

    Raises:
        ConfigurationError: A setting can't work, or the directory holds a run with other settings.
        DataError: A file is damaged.
        RetrieverError: Too many searches failed.
    """
    run_dir, config = Path(run_dir).expanduser(), compose.complete(config)
    if config.resume is not None:
        raise ConfigurationError("resume is for the command line; to go on, call train with the run's own directory.")
    if config.preflight:
        raise ConfigurationError("preflight is for the command line: python -m algorithms.run preflight=true ...")
    settings = plain_data(config)
    run_directory.hold(run_dir)
    try:
        run_directory.remove_leftovers(run_dir)
        if not run_directory.begun(run_dir):
            write_settings(run_dir, settings)
            write_whole(run_dir / OVERRIDES_FILE, yaml.safe_dump(compose.overrides_of(config)).encode())
        else:
            run_directory.require_same(run_dir, settings)
        if not run_directory.complete(run_dir):
            run(config, run_dir)
    finally:
        run_directory.release(run_dir)
    return read_run(run_dir)


def read_run(run_dir: str | Path) -> RunResult:
    """Read a complete run, whoever carried it out.

    Raises:
        FileNotFoundError: The run is not complete, or there is none.
        DataError: A file is damaged.
    """
    run_dir = Path(run_dir).expanduser()
    rows = read_metrics(run_dir)
    folders = sorted(path for path in (run_dir / "checkpoints").glob("*") if path.name.isdecimal())
    return RunResult(
        run_dir,
        read_summary(run_dir),
        {row["step"]: {name: value for name, value in row.items() if name != "step"} for row in rows},
        {int(path.name): path for path in folders},
    )


def run(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """Carry out a whole run, from the raw models to the summary. Processes of `torchrun` carry it out together.

    Args:
        config: All settings.
        run_dir: Where it is written. A run that was begun there is resumed.

    Returns:
        The summary, as `summary.json` holds it.
    """
    from algorithms.training.threads import threads  # which loads torch

    # A second run of a process warns of what the first one has warned of, too.
    with threads(config.threads), warnings.catch_warnings():
        return _run(config, run_dir)


def _run(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    # Imported here, so that --help and the report of a typo need not wait for torch.
    from algorithms.learner import ranks, seeding
    from algorithms.training.summary import finish
    from algorithms.training.trainer import Trainer

    ranks.join()
    seeding.seed_everything(config.seed)
    if not trains_language_model(config.algo["name"]):  # a learner of another library
        outside = ALGORITHMS.build(config.algo)
        if ranks.count() > 1:
            warnings.warn(f"{outside.name} trains in one process; the others wait for it.", stacklevel=2)
        return ranks.decided(lambda: outside.run(config, run_dir))
    trainer = Trainer(config, run_dir)
    trainer.train()
    return finish(trainer)
