"""Train a search agent, measure it, and say what came out: `python -m algorithms.run algo=dgpo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from agentic_rag_env.errors import AgenticRAGError, ConfigurationError
from algorithms.learner import report, seeding
from algorithms.learner.schemas import RunConfig, register_schemas, run_config
from algorithms.learner.trainer import Trainer

register_schemas()


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(config: DictConfig) -> None:
    """Entry point; Hydra composes the configuration."""
    try:
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        if config.resume:
            run_dir = Path(config.resume)
            config = load_run_config(run_dir)
        run(run_config(config), run_dir)
    except AgenticRAGError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def load_run_config(run_dir: Path) -> DictConfig:
    """The configuration that a run was started with.

    Raises:
        ConfigurationError: The folder is no run directory.
    """
    saved = run_dir / ".hydra" / "config.yaml"
    if not saved.is_file():
        raise ConfigurationError(f"{run_dir} is no run directory: {saved} is missing. Give the folder that a run printed.")
    return cast("DictConfig", OmegaConf.load(saved))


def run(config: RunConfig, run_dir: Path) -> dict[str, Any]:
    """A whole run, from the raw models to the summary.

    Args:
        config: All settings.
        run_dir: Where it is written; what is there already is taken up again.

    Returns:
        The summary, as `summary.json` holds it.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    seeding.seed_everything(config.seed)
    trainer = Trainer(config, run_dir)
    trainer.train()
    return report.finish(trainer)


if __name__ == "__main__":
    main()
