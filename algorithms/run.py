"""Train a search agent, measure it, and say what came out: `python -m algorithms.run algo=dgpo`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from agentic_rag_env.terminal import escape_what_streams_lack
from algorithms.launch.clear_errors import clear_errors
from algorithms.launch.command_line import prepare
from algorithms.launch.hydra_launcher import register_launcher
from algorithms.launch.processes import carry_out, start
from algorithms.launch.run_guard import drop_settings_of_others, left_to_run, no_trace_of_refusals
from algorithms.training.compose import require_one_number
from algorithms.training.from_python import run
from algorithms.training.protocol import with_protocol
from algorithms.training.schemas import by_group, register_schemas, tell_without_stages
from algorithms.training.typed import run_config

with clear_errors():  # of a plug-in
    register_schemas()
    register_launcher()


def main() -> None:
    """Entry point. `torchrun` calls it in several processes."""
    escape_what_streams_lack()
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
        drop_settings_of_others(config)
        said: Any = OmegaConf.to_container(HydraConfig.get().overrides.task)
        require_one_number(config, said)
        tell_without_stages(config, HydraConfig.get().runtime.choices)
        left = left_to_run(run_dir, with_protocol(config, said))
        if left is not None:
            settings = run_config(left)
            if settings.preflight:
                from algorithms.training.preflight import preflight  # which loads torch

                preflight(settings, run_dir)
            else:
                carry_out(run, settings, run_dir)


if __name__ == "__main__":
    # Called by its importable name, so that what other launchers pickle finds this module and all that it registers.
    importlib.import_module("algorithms.run").main()
