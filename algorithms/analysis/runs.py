"""Reads run directories: a finished run with its figures, an unfinished one with what is missing."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from agentic_rag_env.errors import ConfigurationError, DataError
from agentic_rag_env.files import file_name, read_rows, sha256
from agentic_rag_env.terminal import printable
from algorithms.training.run_files import CONFIG_FILE, flat, read_metrics, read_overrides, read_summary, read_yaml

ALL = "all"
#: Settings that an evaluated checkpoint has from its training, and those that its evaluation has for itself as well.
_OF_TRAINING = ("algo", "seed", "model", "demonstrations")
_OF_BOTH = ("env", "dataset", "retriever", "reward", "rollout", "num_envs")

#: The settings without effect for runs whose summaries do not name them yet.
_WITHOUT_EFFECT_BEFORE = ("resume", "cache_dir", "threads", "checkpoint_every", "keep_checkpoints", "probe_every")


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        path: Where it is.
        summary: What `summary.json` holds; empty if the run is unfinished.
        config: All settings, nested.
        overrides: Overrides from the command line; of an evaluated checkpoint, those of its training come first.
        missing: Reason why the run can't be read; None for a finished run.
    """

    path: Path
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    overrides: tuple[str, ...] = ()
    missing: str | None = None

    @property
    def seed(self) -> int | None:
        """Seed of the training; None for an evaluated checkpoint that comes from no run."""
        if self.missing:
            return self.config.get("seed")
        return self.trained["config"].get("seed") if self.trained else self.summary.get("seed")

    @property
    def trained(self) -> Mapping[str, Any]:
        """What an evaluated checkpoint's summary says of its training (`config`, `overrides`, `is_last`).

        It is empty for a run itself, and for a checkpoint that comes from no run.
        """
        return self.summary.get("trained", {})

    @property
    def fingerprints(self) -> Mapping[str, str | None]:
        """Hashes of the data, see `algorithms.training.fingerprints`; None for data without a hash."""
        return self.summary.get("fingerprints", {})

    @property
    def settings_without_effect(self) -> frozenset[str]:
        """Settings that say how the run was carried out, not what came of it; runs that do not say so are older."""
        return frozenset(self.summary.get("settings_without_effect", _WITHOUT_EFFECT_BEFORE))

    @property
    def name(self) -> str:
        """The run's own name: its `+method` or its algorithm.

        An evaluated checkpoint has the name of its training, with the step unless it is the last one. If it comes from
        no run, it is named by its place.
        """
        if "checkpoint" not in self.summary:
            return self._trained_name
        place = self.summary["checkpoint"]
        if not self.trained:
            return _name_of_checkpoint(place)
        return self._trained_name if self.trained["is_last"] else f"{self._trained_name}@{Path(place).name}"

    @property
    def _trained_name(self) -> str:
        for override in self.overrides:
            group, _, choice = override.lstrip("+").partition("=")
            if group in ("method", "ablation"):
                return choice
        algo = self.trained.get("config", self.config).get("algo") or {}
        return self.summary.get("algo") or (algo.get("name") if isinstance(algo, Mapping) else algo) or "unknown"

    @property
    def data(self) -> str:
        """Name of the data of the questions: `nq` of a benchmark, `nq + hotpotqa` of a mixture, else the dataset's."""
        dataset = self.config.get("dataset") or {}
        return str(dataset.get("subset") or " + ".join(dataset.get("sources") or ()) or dataset.get("name", "unknown"))

    @property
    def final(self) -> str:
        """The trained model among the evaluated ones; it comes from the last stage that had any step."""
        evaluated = self.summary["evaluation"]
        trained = [stage["name"] for stage in self.summary.get("stages", ()) if stage["name"] in evaluated]
        return trained[-1] if trained else next(iter(evaluated))

    @property
    def modes(self) -> list[str]:
        """Modes of decoding."""
        return list(self.summary["evaluation"][self.final])

    def figures(self, mode: str, model: str | None = None) -> Mapping[str, Mapping[str, Any]]:
        """Figures of the trained model or of another one, by group of questions; empty if it was not evaluated."""
        return self.summary["evaluation"].get(model or self.final, {}).get(mode, {})

    @cached_property
    def outcomes(self) -> dict[str, dict[str, bool]]:
        """Whether the trained model was right, by mode of decoding and question; a mode without a file is left out."""
        return {mode: {row["question_id"]: bool(row["correct"]) for row in rows} for mode, rows in self._rows.items()}

    @cached_property
    def datasets(self) -> dict[str, str]:
        """The group of each question whose group the predictions name."""
        return {row["question_id"]: row["dataset"] for rows in self._rows.values() for row in rows if "dataset" in row}

    @cached_property
    def _rows(self) -> dict[str, list[dict[str, Any]]]:
        """The predictions of each mode of decoding; the transcripts where no predictions were kept."""
        found = {}
        for mode in self.modes:
            split = str(self.summary.get("split", "test"))
            stem = f"{file_name(split)}-{file_name(self.final)}-{file_name(mode, also='=')}.jsonl"
            for file in (self.path / "predictions" / stem, self.path / "trajectories" / f"{stem}.gz"):
                if file.is_file():
                    self.check(file)
                    found[mode] = _predictions(file)
                    break
        return found

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of `metrics.jsonl`; a last line that was cut off is left out. Empty if there is no such file."""
        self.check(self.path / "metrics.jsonl")
        return read_metrics(self.path)

    def check(self, file: Path) -> None:
        """Check that a file of a finished run is as the run left it.

        Raises:
            DataError: The file was damaged or changed since; runs of earlier versions can't show it.
        """
        sums = self.summary.get("files")
        told = sums.get(file.relative_to(self.path).as_posix()) if isinstance(sums, Mapping) else None
        if told is not None and file.is_file() and sha256(file) != told:
            raise DataError(
                f"{file} is not as the run left it: its checksum is not that in summary.json. Finish the run again "
                f"with resume={shlex.quote(str(self.path))}, or leave the run out."
            )

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings by dotted name; `trained.dataset.name` is that of the training of an evaluated checkpoint."""
        if not self.trained:
            return flat(self.config)
        trained = self.trained["config"]
        of_training = {name: trained[name] for name in _OF_TRAINING if name in trained}
        of_evaluation = {name: value for name, value in self.config.items() if name not in _OF_TRAINING}
        others = {name: trained[name] for name in _OF_BOTH if name in trained}
        return flat({**of_training, **of_evaluation, "trained": others})


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Find every run in some folders or below them; the runs are sorted by path.

    Raises:
        ConfigurationError: A folder does not exist, or holds no run.
    """
    found: dict[Path, Run] = {}
    for given in paths:
        root = Path(given).expanduser()
        if not root.is_dir():
            raise ConfigurationError(f"{given} is no folder; give run directories or folders of them.")
        marks = [file.parent for file in root.rglob("summary.json")]
        marks += [file.parent.parent for file in root.rglob(".hydra/config.yaml")]
        if not marks:
            raise ConfigurationError(
                f"{given} holds no run: neither summary.json nor .hydra/config.yaml is in it or below it."
            )
        found |= {folder.resolve(): _read(folder) for folder in marks}
    return [found[path] for path in sorted(found)]


def groups(runs: Sequence[Run]) -> list[str]:
    """Groups of questions for which all runs have figures; the group of all questions comes first."""
    common = [set(run.figures(mode)) for run in runs for mode in run.modes]
    shared = set.intersection(*common) if common else set()
    first = runs[0].figures(runs[0].modes[0]) if runs else {}
    return [ALL, *(name for name in first if name in shared and name != ALL and "n" in first[name])]


def _read(folder: Path) -> Run:
    file = folder / CONFIG_FILE
    config = _shown(read_yaml(file)) if file.is_file() else {}
    given = tuple(_shown(read_overrides(folder)))
    config = config if isinstance(config, dict) else {}
    try:
        summary = _shown(read_summary(folder))
        given = (*summary.get("trained", {}).get("overrides", ()), *given)
        run = Run(folder, summary, summary["config"], given)
        if not all(run.figures(mode)[ALL]["n"] for mode in run.modes):
            return Run(folder, {}, config, given, "nothing was evaluated")
    except FileNotFoundError:
        return Run(folder, {}, config, given, f"unfinished: no summary.json{_last_step(folder)}")
    except DataError as error:
        return Run(folder, {}, config, given, str(error))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        return Run(folder, {}, config, given, f"summary.json is not that of a run ({type(error).__name__}: {error})")
    return run


def _name_of_checkpoint(place: str) -> str:
    """Name a model by its place: `<run>@<step>` in a run, the whole hub id, else the last part of the path."""
    *folders, last = Path(place).parts
    if len(folders) > 1 and folders[-1] == "checkpoints":
        return f"{folders[-2]}@{last}"
    return place if len(folders) == 1 else last


def _shown(plain: Any) -> Any:
    """Remove whatever could steer a terminal from a run's plain data, because the run may be a stranger's."""
    if isinstance(plain, str):
        return plain if plain.isprintable() else printable(plain)
    if isinstance(plain, dict):
        return {_shown(name): _shown(value) for name, value in plain.items()}
    return [_shown(value) for value in plain] if isinstance(plain, list) else plain


def _predictions(file: Path) -> list[dict[str, Any]]:
    """Question, group and verdict of each row; nothing else of a transcript is needed here."""

    def kept(row: Mapping[str, Any]) -> dict[str, Any]:
        group = {"dataset": _shown(row["dataset"])} if "dataset" in row else {}
        return {"question_id": str(row["question_id"]), "correct": bool(row["correct"]), **group}

    return list(read_rows(file, kept))


def _last_step(folder: Path) -> str:
    lines = read_metrics(folder)
    return f", stopped after step {lines[-1]['step']}" if lines else ", no step done"
