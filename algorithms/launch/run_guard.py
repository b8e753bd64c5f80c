"""Keeps runs apart: says whether a run directory is begun or complete, what is left to run, and who writes there."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import algorithms.launch.resolvers  # noqa: F401  # which the configuration calls
from agentic_rag_env.errors import ConfigurationError, DataError, UnknownNameError
from agentic_rag_env.registry import DATASETS, ENVS, RETRIEVERS, REWARDS, did_you_mean
from algorithms.launch.processes import are_several
from algorithms.learner.algorithm import ALGORITHMS
from algorithms.training import file_locks
from algorithms.training.compose import PARTS, composed
from algorithms.training.run_directory import begun, complete, hold, release, remove_leftovers, require_same
from algorithms.training.run_files import CONFIG_FILE, read_settings, require_named, write_settings
from algorithms.training.schemas import by_group
from algorithms.training.settings import settings_without_effect
from algorithms.training.typed import plain

#: A setting of a part, added whether the part has it or not.
_FORCED = re.compile(rf"\+\+(?:{'|'.join(PARTS)})\.[\w.]+=")
_OF_HYDRA = {".hydra", "config.yaml", "hydra.yaml", "overrides.yaml", "lock"}


class KeepRuns(Callback):
    """Refuses to start a run over another, to resume where no run is, and to write where another run writes.

    A multirun in several processes is refused, too.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before Hydra writes anything."""
        run_dir = Path(config.hydra.run.dir)
        if config.get("resume") is not None:
            if not (run_dir / CONFIG_FILE).is_file():
                missing = f"{run_dir / CONFIG_FILE} is missing"
                _refuse(f"{run_dir} is no run directory: {missing}. Give a folder that a run printed.")
        elif begun(run_dir):
            place = shlex.quote(str(run_dir))
            _refuse(f"{run_dir} holds a run. Go on with it by resume={place}, or choose another hydra.run.dir.")
        _hold(run_dir)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called in the process that runs the job, wherever a launcher has put it."""
        _hold(Path(config.hydra.runtime.output_dir))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Release the directory."""
        release(Path(config.hydra.runtime.output_dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before Hydra writes anything."""
        _refuse_several("hydra.launcher.gpus_per_job gives each job several processes")
        if config.get("resume") is not None:
            _refuse("resume goes on with a single run; give it without -m and without lists of values.")


class SpareRuns(Callback):
    """Refuses to write anything else over a run, and to measure many checkpoints in several processes."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before Hydra writes anything."""
        if begun(run_dir := Path(config.hydra.run.dir)):
            other = shlex.quote(f"{run_dir}/test")
            _refuse(f"{run_dir} holds a run. Choose another directory for what is found, say hydra.run.dir={other}.")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Before Hydra writes anything."""
        _refuse_several("with torchrun, measure one checkpoint at a time")


def _refuse_several(instead: str) -> None:
    """Refuse a multirun in several processes, because they part after its first job."""
    if are_several():
        _refuse(f"a multirun is started without torchrun; {instead}.")


def _hold(run_dir: Path) -> None:
    try:
        hold(run_dir)
    except (ConfigurationError, OSError) as error:
        # Hydra turns any other exception of a callback into a warning and goes on.
        raise SystemExit(f"{type(error).__name__}: {error}") from error


def _refuse(message: str) -> NoReturn:
    # Hydra turns any other exception of a callback into a warning and goes on.
    raise SystemExit(f"ConfigurationError: {message}")


@contextmanager
def no_trace_of_refusals(run_dir: Path, given: DictConfig) -> Iterator[None]:
    """Remove the directory of a run that is refused before it has begun; name the settings of one that was resumed.

    Args:
        run_dir: The run directory; it stays if it holds anything that Hydra did not write.
        given: The configuration of the present command line.
    """
    try:
        yield
    except (ConfigurationError, DataError, UnknownNameError) as error:
        folder = run_dir / CONFIG_FILE.parent
        left = {path.name for path in (*run_dir.glob("*"), *folder.glob("*"))}
        if given.resume is None and left <= _OF_HYDRA:
            for name in _OF_HYDRA:
                if name != folder.name:
                    (folder / name).unlink(missing_ok=True)
            for empty in (folder, run_dir):
                empty.rmdir()
        if given.resume is not None and str(run_dir) not in str(error):
            error.add_note(f"The settings are those in {run_dir / CONFIG_FILE}; if it was changed, change it back.")
        raise


def left_to_run(run_dir: Path, given: DictConfig) -> DictConfig | None:
    """Return the configuration for the rest of a run; None if the run is complete.

    Args:
        run_dir: The run directory; one of a multirun may have begun, or be complete, in an earlier attempt.
        given: The configuration of the present command line.

    Raises:
        ConfigurationError: The directory holds a run with another configuration.
    """
    remove_leftovers(run_dir)
    if given.resume is not None:
        return saved_config(run_dir, given)
    if not begun(run_dir):
        write_settings(run_dir, plain(given))
        return given
    require_same(run_dir, settings_of(given))
    if complete(run_dir):
        return None
    saved = OmegaConf.create(read_settings(run_dir))
    for key in settings_without_effect():
        OmegaConf.update(saved, key, OmegaConf.select(given, key))
    return saved


def drop_settings_of_others(given: DictConfig) -> None:
    """Hold `++group.setting=value` to what the group's part has, because Hydra adds whatever is written so.

    `prepare` writes a multirun's settings so, because a job may have another algorithm than the command line's default.
    The launcher `slots` has sorted them out; the jobs of other launchers come here with all of them.

    Args:
        given: The configuration of the present command line; in a job of a multirun, what belongs to other algorithms
            is removed from it.

    Raises:
        ConfigurationError: The part has no such setting; in a multirun, no part of the group has one.
    """
    overrides: Any = OmegaConf.to_container(HydraConfig.get().overrides.task)
    forced = [each for each in overrides if _FORCED.match(each)]
    sure = [by_group(each) for each in overrides if each not in forced]
    for override in forced if given.resume is None else ():
        try:
            composed("config", [*sure, override.lstrip("+"), "hydra/launcher=basic"])
            sure.append(override.lstrip("+"))
        except ConfigurationError:
            section, _, name = override.lstrip("+").partition("=")[0].rpartition(".")
            is_job = HydraConfig.get().mode == RunMode.MULTIRUN
            if not (is_job and name in _settings_of(section.partition(".")[0])):
                raise
            print(f"{section}.{name} is left out: {given[section.partition('.')[0]].name} has no such setting.")
            had: Any = OmegaConf.to_container(OmegaConf.select(given, section))
            kept = {key: value for key, value in had.items() if key != name}
            OmegaConf.update(given, section, kept, merge=False, force_add=True)


def _settings_of(group: str) -> set[str]:
    """Names of the settings that any part of a group has."""
    (registry,) = (each for each in (ALGORITHMS, ENVS, DATASETS, RETRIEVERS, REWARDS) if each.group == group)
    return {setting for name in registry.names() for setting in registry.get(name).settings}


def saved_config(run_dir: Path, given: DictConfig) -> DictConfig:
    """Return the configuration that a run was started with, for resuming it.

    Args:
        run_dir: The run directory.
        given: The configuration of the present command line. A setting in it must be as it was, or be without effect.

    Raises:
        ConfigurationError: A setting differs: a run that goes on with other settings would be neither the old one nor a
            new one. Or the saved settings name places outside that the command line does not allow.
        DataError: The folder is not a run directory, or its settings are damaged.
    """
    settings = read_settings(run_dir)
    saved = OmegaConf.create(settings)
    for override in HydraConfig.get().overrides.task:
        key = override.lstrip("+~").partition("=")[0].rpartition("@")[2]
        was, wanted = (_comparable(OmegaConf.select(config, key)) for config in (saved, given))
        section, _, name = key.rpartition(".")
        known = OmegaConf.select(saved, section) if section else saved
        if key in settings_without_effect():
            OmegaConf.update(saved, key, wanted)
        elif was is None and not (OmegaConf.is_dict(known) and name in known):
            raise ConfigurationError(f"The run in {run_dir} has no setting {key}.{did_you_mean(name, known or ())}")
        elif was != wanted:
            raise ConfigurationError(
                f"resume goes on with the run's own settings, where {key} is {was}, not {wanted}. Leave it out; or "
                f"begin a new run, from these weights if you like: model.policy={shlex.quote(str(run_dir))}/"
                "checkpoints/<step>."
            )
    require_named(settings, given.allow, str(run_dir))
    saved.logger = given.logger  # a stranger's run must not choose where the numbers go
    if not file_locks.is_cache(Path(str(saved.get("cache_dir", ""))).expanduser()):
        print(f"cache_dir={given.cache_dir} is used: {saved.get('cache_dir')} is no cache of these commands.")
        saved.cache_dir = given.cache_dir
    return saved


def settings_of(given: DictConfig) -> dict[str, Any]:
    """The settings of a command line as plain data, without those of Hydra."""
    return plain(OmegaConf.masked_copy(given, [str(key) for key in given if key != "hydra"]))


def _comparable(value: Any) -> Any:
    """A setting as plain data; a part that was chosen by its name becomes that name."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    return value.get("name", value) if isinstance(value, dict) else value
