"""The Hydra launcher of `python -m algorithms.run -m ...`: jobs side by side, and on a restart only what is missing."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.errors import ConfigCompositionException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from agentic_rag_env.errors import AgenticRAGError, ConfigurationError
from agentic_rag_env.settings import COUNT, check_value, or_none
from algorithms.launch import job_pool
from algorithms.launch.job_display import JobDisplay
from algorithms.launch.run_guard import settings_of
from algorithms.training import file_locks
from algorithms.training.compose import PARTS, explanation
from algorithms.training.event_files import EventFile
from algorithms.training.protocol import with_protocol
from algorithms.training.run_directory import PLAN_FILE, begun, complete, has_plan, require_same
from algorithms.training.run_files import allowed, places, read_settings
from algorithms.training.schemas import by_group
from algorithms.training.setting_errors import told
from algorithms.training.settings import settings_without_effect

_LOCKS = ".launcher"
#: Hydra takes launchers from the package `hydra_plugins` only, so this module has a second name.
_HYDRA_NAME = "hydra_plugins.agentic_rag_env"


@dataclass
class SlotsConfig:
    """Settings of the launcher of multiruns (`hydra.launcher.num_slots=2`).

    Attributes:
        num_slots: Jobs at a time. None: one for each GPU, or without GPUs for each CPU core, at most 8.
        gpus: How many of the visible GPUs to use; None for all, 0 for none. Slots beyond that number share them.
        gpus_per_job: GPUs of a job, and so its processes. Without GPUs it is the number of its processes on the CPU.
    """

    _target_: str = f"{_HYDRA_NAME}.SlotsLauncher"
    num_slots: int | None = None
    gpus: int | None = None
    gpus_per_job: int = 1


class SlotsLauncher(Launcher):
    """Runs each job as `python -m algorithms.run` with the job's overrides, in a slot.

    Args:
        num_slots, gpus, gpus_per_job: See `SlotsConfig`.
    """

    __module__ = _HYDRA_NAME

    def __init__(self, num_slots: int | None = None, gpus: int | None = None, gpus_per_job: int = 1) -> None:
        self._processes = gpus_per_job
        try:
            self._slots = make_slots(num_slots, gpus, gpus_per_job)
        except ConfigurationError as error:
            raise SystemExit(f"ConfigurationError: {error}") from error

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take the sweep directory before Hydra writes into it."""
        self._loader, self._config = hydra_context.config_loader, config
        self._sweep_dir = Path(config.hydra.sweep.dir)
        self._plans = False
        self._hold()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs that are not complete.

        Raises:
            SystemExit: A job failed, a directory holds a run with other settings, or a signal asked to end.
        """
        setup_globals()
        self._hold()
        planned: list[job_pool.Job] = []
        try:
            planned = self._plan(job_overrides, initial_job_idx)
            self._lay_out(job_overrides)
            missing = [job for job in planned if not self._is_done(job.directory)]
            display = JobDisplay(missing, len(planned), self._sweep_dir)
            with display:
                failed = job_pool.Launcher(self._slots, self._sweep_dir / _LOCKS, display).run(planned)
        except KeyboardInterrupt as error:
            self._say_how_to_go_on(planned, "Interrupted.")
            raise SystemExit(130) from error
        except (AgenticRAGError, OSError) as error:
            raise SystemExit(f"{type(error).__name__}: {error}") from error
        finally:
            file_locks.release(self._lock_file)
        if failed:
            display.show_failures(failed)
            self._say_how_to_go_on(planned, f"{len(failed)} of {len(planned)} runs failed.")
            raise SystemExit(1)
        print(
            f"all {len(planned)} plans are written: {self._sweep_dir}/*/{PLAN_FILE}"
            if self._plans
            else f"all {len(planned)} runs are done: python -m algorithms.compare {shlex.quote(str(self._sweep_dir))}"
        )
        return [JobReturn(overrides, status=JobStatus.COMPLETED) for overrides in job_overrides]

    def _is_done(self, directory: Path) -> bool:
        return has_plan(directory) if self._plans else complete(directory)

    @property
    def _lock_file(self) -> Path:
        return self._sweep_dir / _LOCKS / "launcher.lock"

    def _hold(self) -> None:
        try:
            holder = file_locks.hold(self._lock_file)
        except OSError as error:
            raise SystemExit(f"{type(error).__name__}: {error}") from error
        if holder is not None:
            raise SystemExit(
                f"ConfigurationError: the multirun in {self._sweep_dir} is being run by {holder}; wait for it, or "
                "choose another hydra.sweep.dir."
            )

    def _plan(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[job_pool.Job]:
        """Make the jobs, each with its directory.

        Raises:
            ConfigurationError: Two jobs have the same directory, or a directory holds a run with other settings.
        """
        planned: dict[str, job_pool.Job] = {}
        job_overrides = [list(map(by_group, overrides)) for overrides in job_overrides]
        job_overrides = self._fitting(job_overrides)
        shared = set.intersection(*map(set, job_overrides))
        for number, overrides in enumerate(job_overrides, start=first):
            config = self._loader.load_sweep_config(self._config, list(overrides))
            own = [override for override in overrides if override not in shared]
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
                # The name of its directory says what it is and what varies, not what is the same in all jobs. The seed
                # always stands in it, because more seeds often follow.
                config.hydra.overrides.task = [each for each in overrides if each in own or _is_in_name(each)]
            name = str(config.hydra.sweep.subdir)
            if name in planned:
                raise ConfigurationError(
                    f"two jobs would write into {self._sweep_dir / name}; one of them has the overrides "
                    f"{' '.join(overrides)}. Remove what is given twice, or choose another hydra.sweep.subdir."
                )
            directory = self._sweep_dir / name
            if begun(directory):
                if config.preflight:
                    raise ConfigurationError(f"{directory} holds a run; plan with another hydra.sweep.dir.")
                require_same(directory, settings_of(with_protocol(config, overrides, quiet=True)))
            if config.preflight:
                self._plans = True
                (directory / PLAN_FILE).unlink(missing_ok=True)  # it may be the plan of other settings
            command = self._command(directory, overrides, set_threads=config.threads is None)
            label = " ".join(each.lstrip("+") for each in own) or name
            planned[name] = job_pool.Job(name, directory, command, partial(self._is_done, directory), label)
        return list(planned.values())

    def _lay_out(self, job_overrides: Sequence[Sequence[str]]) -> None:
        """Give TensorBoard the columns of the study's table: the algorithm, and what varies between the jobs."""
        folder = self._sweep_dir / "tb"
        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        shared = set.intersection(*map(set, job_overrides))
        varying = (each.lstrip("+").partition("=")[0] for job in job_overrides for each in job if each not in shared)
        named = (f"{key}.name" if key in PARTS else key.rpartition("@")[2] for key in varying)
        with EventFile(folder) as file:
            file.layout()
            file.columns(dict.fromkeys(["algo.name", *named, "seed"]))

    def _fitting(self, jobs: Sequence[Sequence[str]]) -> list[list[str]]:
        """Drop from each job's overrides the settings that its own parts do not have.

        Raises:
            ConfigurationError: No job's parts have one of the settings.
        """
        fitting: list[list[str]] = []
        #: Reason why every job left a setting out; None for a setting that some job takes.
        unused: dict[str, str | None] = {each: "" for job in jobs for each in job if each.startswith("++")}
        for job in jobs:
            sure = [each for each in job if not each.startswith("++")]
            for override in (each for each in job if each.startswith("++")):
                try:
                    self._loader.load_sweep_config(self._config, [*sure, override.lstrip("+")])
                except ConfigCompositionException as error:
                    if explanation(error) is None:
                        raise ConfigurationError(told(error)) from error
                    if unused[override] is not None:
                        unused[override] = explanation(error)
                else:
                    sure.append(override.lstrip("+"))
                    unused[override] = None
            fitting.append(sure)
        if messages := [message for message in unused.values() if message]:
            raise ConfigurationError(f"No job of the multirun takes a setting: {messages[0]}")
        return fitting

    def _command(
        self, directory: Path, overrides: Sequence[str], set_threads: bool
    ) -> Callable[[job_pool.Slot], Sequence[str]]:
        """See `job_pool.Job.command`."""

        def command(slot: job_pool.Slot) -> list[str]:
            start = [sys.executable, *self._torchrun(), "-m", "algorithms.run", *self._hydra_flags()]
            if begun(directory):
                # `_plan` has checked that its settings are this command's, so the job may use the places they name.
                named = allowed([place for _, place in places(read_settings(directory))])
                # How it is carried out may have changed since.
                free = [each for each in overrides if each.lstrip("+").partition("=")[0] in settings_without_effect()]
                return [*start, f"resume={_quoted(directory)}", named, *free, "hydra.mode=RUN"]
            given = [*self._config.hydra.overrides.hydra, *overrides]
            threads = [f"threads={slot.environment['OMP_NUM_THREADS']}"] if set_threads else []
            return [*start, *given, *threads, f"hydra.run.dir={_quoted(directory)}", "hydra.mode=RUN"]

        return command

    def _torchrun(self) -> list[str]:
        """What starts a job in several processes, at a port of its own."""
        if self._processes == 1:
            return []
        return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self._processes}"]

    def _hydra_flags(self) -> list[str]:
        """Flags that give the jobs the place where this command found its configuration."""
        flags = ["--config-name", self._config.hydra.job.config_name]
        for source in self._config.hydra.runtime.config_sources:
            if source.provider == "main":
                flags += ["--config-path", f"pkg://{source.path}" if source.schema == "pkg" else source.path]
            if source.provider == "command-line":
                flags += ["--config-dir", source.path]
        return flags

    def _say_how_to_go_on(self, planned: Sequence[job_pool.Job], what: str) -> None:
        missing = sum(not self._is_done(job.directory) for job in planned) or "all"
        given = sys.argv[1:]
        if not any(argument.startswith("hydra.sweep.dir=") for argument in given):
            given = [*given, f"hydra.sweep.dir={self._sweep_dir}"]
        again = shlex.join(["python", "-m", "algorithms.run", *given])
        print(
            f"{what} Run the same command again to finish what is missing ({missing} of the runs):\n{again}",
            file=sys.stderr,
        )


def _safe_path() -> dict[str, str]:
    """Keep the working directory off a job's module path where it is not on this process's path either.

    An installed command does not import from there, so a user's own package `algorithms` must not be imported by jobs.
    A variable, unlike Python's flag -P, also reaches the processes that torchrun starts.
    """
    imports_from_here = not sys.flags.safe_path and {"", str(Path.cwd())} & set(sys.path)
    return {} if imports_from_here else {"PYTHONSAFEPATH": "1"}


def make_slots(num_slots: int | None, gpus: int | None, gpus_per_job: int = 1) -> list[job_pool.Slot]:
    """Divide the machine into slots.

    Raises:
        ConfigurationError: A number is out of range.
    """
    check_value("hydra.launcher.num_slots", num_slots, or_none(COUNT))
    check_value("hydra.launcher.gpus_per_job", gpus_per_job, COUNT)
    visible = _visible_gpus() if gpus != 0 else []
    if gpus is not None and not 0 <= gpus <= len(visible):
        raise ConfigurationError(f"hydra.launcher.gpus must be from 0 to {len(visible)}, or null; got {gpus}.")
    # What is left over when the GPUs do not divide is not used.
    used = visible[:gpus]
    if used and len(used) < gpus_per_job:
        raise ConfigurationError(
            f"hydra.launcher.gpus_per_job={gpus_per_job} needs more GPUs than the {len(used)} here."
        )
    shares = [used[start : start + gpus_per_job] for start in range(0, len(used) - gpus_per_job + 1, gpus_per_job)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = num_slots or len(shares) or max(1, min(cores, 8) // gpus_per_job)
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = given if given.isdecimal() else str(max(1, cores // (count * gpus_per_job)))
    slots = []
    for index in range(count):
        gpu = ",".join(shares[index % len(shares)]) if shares else ""
        environment = {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": threads, **_safe_path()}
        slots.append(job_pool.Slot(index, environment, f"GPU {gpu}" if shares else f"slot {index}"))
    return slots


def register_launcher() -> None:
    """Make `hydra/launcher=slots` known to Hydra."""
    Plugins.instance().register(SlotsLauncher)
    ConfigStore.instance().store("slots", SlotsConfig, group="hydra/launcher", provider="agentic_rag_env")


def _visible_gpus() -> list[str]:
    """Names that CUDA_VISIBLE_DEVICES may hold, found without initializing CUDA in this process."""
    import torch  # this import takes seconds, and only multiruns need it

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if named.startswith("MIG-"):  # CUDA shows a process only the first of several instances
        return named.split(",")
    return (named.split(",") if named else list(map(str, range(count))))[:count]


def _is_in_name(override: str) -> bool:
    return override.lstrip("+").partition("=")[0] in ("algo", "method", "seed")


def _quoted(path: Path) -> str:
    return QuotedString(str(path), Quote.single).with_quotes()


def _bear_second_name() -> None:
    """Let this module be imported by the name that Hydra knows it by."""
    try:
        importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:  # no plug-in of Hydra is installed
        package = ModuleType("hydra_plugins")
        package.__path__ = []
        sys.modules["hydra_plugins"] = package
    sys.modules[_HYDRA_NAME] = sys.modules[__name__]


# Registering where a command begins is not enough: other launchers pickle the plug-ins for the processes of their
# jobs. Such a process begins elsewhere and imports this module on the way.
_bear_second_name()
