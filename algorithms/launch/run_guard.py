"""No run is taken for another one: what is begun, complete or left to run in a run directory, and who writes there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from agentic_rag_env.errors import ConfigurationError
from algorithms.launch.job_pool import file_name
from algorithms.training import file_locks
from algorithms.training.settings import settings_without_effect

CONFIG_FILE = Path(".hydra") / "config.yaml"
_LOCK_FILE = Path(".hydra") / "lock"


def begun(run_dir: Path) -> bool:
    """Whether a directory holds a run that has trained, or is about to."""
    return (run_dir / "metrics.jsonl").exists() or (run_dir / "checkpoints").exists()


def complete(run_dir: Path) -> bool:
    """Whether a directory holds a run that has come to its end."""
    return (run_dir / "summary.json").is_file()


def job_name(overrides: Sequence[str]) -> str:
    """What the directory of a job is called: its overrides, in an order that does not depend on how they were given."""
    pairs = [override.lstrip("+").rpartition("@")[2].partition("=") for override in overrides]
    compared = sorted(("." in key, key, value) for key, _, value in pairs if key not in settings_without_effect())
    return file_name("+".join(f"{key}-{value}" for _, key, value in compared) or "defaults")


def _hydra_folder(resume: str | None, run_dir: str) -> str | None:
    """Where Hydra writes the configuration of a run: nowhere, if it has done so when the run began."""
    return ".hydra" if resume is None and not begun(Path(run_dir)) else None


# Here, and not where a command begins, because a launcher may compose the configuration in a process of its own.
OmegaConf.register_new_resolver("first_given", lambda first, second: second if first is None else first, replace=True)
OmegaConf.register_new_resolver("hydra_folder", _hydra_folder, replace=True)
OmegaConf.register_new_resolver("job_name", job_name, replace=True)


class KeepRuns(Callback):
    """Refuses to put a run where there is one, to resume where there is none, and to write where another one writes."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before Hydra writes anything."""
        run_dir = Path(config.hydra.run.dir)
        if config.get("resume") is not None:
            if not (run_dir / CONFIG_FILE).is_file():
                _refuse(_no_run(run_dir))
        elif begun(run_dir):
            _refuse(f"{run_dir} holds a run. Go on with it by resume={run_dir}, or choose another hydra.run.dir.")
        _hold(run_dir)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """In the process that runs the job, wherever a launcher has put it."""
        _hold(Path(config.hydra.runtime.output_dir))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """The directory is free again."""
        file_locks.release(Path(config.hydra.runtime.output_dir) / _LOCK_FILE)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before Hydra writes anything."""
        if config.get("resume") is not None:
            _refuse("resume goes on with a single run; give it without -m and without lists of values.")


def _hold(run_dir: Path) -> None:
    try:
        holder = file_locks.hold(run_dir / _LOCK_FILE)
    except OSError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
    if holder is not None:
        _refuse(f"{run_dir} is being written by {holder}; wait for it, or choose another directory.")


def _no_run(run_dir: Path) -> str:
    return f"{run_dir} is no run directory: {run_dir / CONFIG_FILE} is missing. Give a folder that a run printed."


def _refuse(message: str) -> NoReturn:
    # Hydra turns any other exception of a callback into a warning and goes on.
    raise SystemExit(f"ConfigurationError: {message}")


def left_to_run(run_dir: Path, given: DictConfig) -> DictConfig | None:
    """The configuration of what is left to do in a run directory, None if that is nothing.

    Args:
        run_dir: The run directory; one of a multirun may have begun, or be complete, in an earlier attempt.
        given: The configuration of the present command line.

    Raises:
        ConfigurationError: It is not that of the run that is there.
    """
    if given.resume is not None:
        return saved_config(run_dir, given)
    if not begun(run_dir):
        return given
    require_same(run_dir, given)
    return None if complete(run_dir) else _load(run_dir)


def saved_config(run_dir: Path, given: DictConfig) -> DictConfig:
    """The configuration that a run was started with, for resuming it.

    Args:
        run_dir: The run directory.
        given: The configuration of the present command line. What it sets must be as it was, or be without effect.

    Raises:
        ConfigurationError: The folder is no run directory, or a setting differs: a run that goes on with other settings
            would be neither the old one nor a new one.
    """
    file = run_dir / CONFIG_FILE
    if not file.is_file():
        raise ConfigurationError(_no_run(run_dir))
    saved = _load(run_dir)
    for override in HydraConfig.get().overrides.task:
        key = override.lstrip("+~").partition("=")[0].rpartition("@")[2]
        was, wanted = (_comparable(OmegaConf.select(config, key)) for config in (saved, given))
        if key in settings_without_effect():
            OmegaConf.update(saved, key, wanted)
        elif was != wanted:
            raise ConfigurationError(
                f"resume goes on with the run's own settings, where {key} is {was}, not {wanted}. Leave it out; or "
                f"begin a new run, from these weights if you like: model.policy={run_dir}/checkpoints/<step>."
            )
    return saved


def _load(run_dir: Path) -> DictConfig:
    saved = OmegaConf.load(run_dir / CONFIG_FILE)
    assert isinstance(saved, DictConfig)
    return saved


def require_same(run_dir: Path, given: DictConfig) -> None:
    """Refuse to take one run for another; settings that only one of the two knows are not compared.

    Args:
        run_dir: Of a run that has begun.
        given: The configuration that is to be run there.

    Raises:
        ConfigurationError: A setting differs; the message names it.
    """
    saved = OmegaConf.to_container(_load(run_dir))
    task = OmegaConf.masked_copy(given, [str(key) for key in given if key not in ("hydra", *settings_without_effect())])
    wanted = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(task)))
    found = [f"{key} is {there} there, {here} here" for key, there, here in _differences(saved, wanted)]
    if found:
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise ConfigurationError(
            f"{run_dir} holds a run with other settings: {'; '.join(found[:5])}{more}. Choose another directory, or "
            "remove that run."
        )


def _differences(first: Any, second: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(first, dict) and isinstance(second, dict):
        shared = [name for name in first if name in second]
        return [each for name in shared for each in _differences(first[name], second[name], f"{key}.{name}".strip("."))]
    return [] if first == second else [(key, _comparable(first), _comparable(second))]


def _comparable(value: Any) -> Any:
    """A setting as plain data; of a part that was chosen by its name, that name."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    return value.get("name", value) if isinstance(value, dict) else value
