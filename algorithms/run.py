"""Train a search agent, measure it, and say what came out: `python -m algorithms.run algo=dgpo`."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from algorithms.launch.clear_errors import clear_errors
from algorithms.launch.command_line import prepare
from algorithms.launch.hydra_launcher import register_launcher
from algorithms.launch.processes import carry_out, start
from algorithms.launch.run_guard import left_to_run, no_trace_of_refusals
from algorithms.sb3.learner import outside_learner
from algorithms.training.settings import RunConfig, by_group, register_schemas, run_config

with clear_errors():  # of a plug-in
    register_schemas()
    register_launcher()


def main() -> None:
    """Entry point. `torchrun` calls it in several processes."""
    start(_read, run)


def _read() -> None:
    sys.argv[1:] = map(by_group, sys.argv[1:])
    with clear_errors():
        prepare("config")
    _composed()


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def _composed(config: DictConfig) -> None:
    """Run with the configuration that Hydra composes."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    with clear_errors(run_dir), no_trace_of_refusals(run_dir, config):
        left = left_to_run(run_dir, config)
        if left is not None:
            settings = run_config(left)
            if settings.preflight:
                _plan(settings, run_dir)
            else:
                carry_out(run, settings, run_dir)


def _plan(config: RunConfig, run_dir: Path) -> None:
    from algorithms.training.preflight import preflight

    preflight(config, run_dir)


def run(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """Carry out a whole run, from the raw models to the summary. Processes of `torchrun` carry it out together.

    Args:
        config: All settings.
        run_dir: Where it is written. A run that was begun there is resumed.

    Returns:
        The summary, as `summary.json` holds it.
    """
    # Imported here, so that --help and the report of a typo need not wait for torch.
    import torch

    from algorithms.learner import ranks, seeding
    from algorithms.training.summary import finish
    from algorithms.training.trainer import Trainer

    ranks.join()
    if config.threads:
        torch.set_num_threads(config.threads)
    seeding.seed_everything(config.seed)
    if (outside := outside_learner(config.algo)) is not None:
        if ranks.count() > 1:
            warnings.warn(f"{outside.name} trains in one process; the others wait for it.", stacklevel=2)
        return ranks.decided(lambda: outside.run(config, run_dir))
    trainer = Trainer(config, run_dir)
    trainer.train()
    return finish(trainer)


if __name__ == "__main__":
    # Called by its importable name, so that what other launchers pickle finds this module and all that it registers.
    importlib.import_module("algorithms.run").main()
