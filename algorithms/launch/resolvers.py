"""Functions that the configuration calls, such as `${job_name:...}`; importing this file makes them known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from agentic_rag_env.files import file_name
from algorithms.training.run_directory import begun
from algorithms.training.settings import settings_without_effect


def job_name(overrides: Sequence[str]) -> str:
    """Name of a job's directory: its overrides, in an order that does not depend on how they were given."""
    pairs = [override.lstrip("+").rpartition("@")[2].partition("=") for override in overrides]
    compared = sorted(("." in key, key, value) for key, _, value in pairs if key not in settings_without_effect())
    return file_name("+".join(f"{key}-{value}" for _, key, value in compared) or "defaults")


def _hydra_folder(resume: str | None, run_dir: str) -> str | None:
    """The folder in which Hydra writes a run's configuration; none if the run has begun and Hydra wrote it then."""
    return ".hydra" if resume is None and not begun(Path(run_dir)) else None


# Registered here and not where a command begins: a launcher may compose the configuration in another process.
OmegaConf.register_new_resolver("first_given", lambda first, second: second if first is None else first, replace=True)
OmegaConf.register_new_resolver("hydra_folder", _hydra_folder, replace=True)
OmegaConf.register_new_resolver("job_name", job_name, replace=True)
