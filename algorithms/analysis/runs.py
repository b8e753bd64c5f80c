"""Run directories as they are found on disk: the finished ones with their figures, the others with what is missing."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from agentic_rag_env.errors import ConfigurationError, DataError

ALL = "all"


#: What the settings without effect were when summaries did not name them.
_WITHOUT_EFFECT_BEFORE = ("resume", "cache_dir", "threads", "checkpoint_every", "keep_checkpoints", "probe_every")


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        path: Where it is.
        summary: What `summary.json` holds; empty if the run is unfinished.
        config: All settings, nested.
        overrides: What was said on the command line.
        missing: Why nothing can be read from it; None for a finished run.
    """

    path: Path
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    overrides: tuple[str, ...] = ()
    missing: str | None = None

    @property
    def seed(self) -> int | None:
        """Seed of the run; None where a checkpoint was only evaluated."""
        return self.summary.get("seed", self.config.get("seed") if self.missing else None)

    @property
    def fingerprints(self) -> Mapping[str, str | None]:
        """Hashes of the data, see `algorithms.training.fingerprints`; None for what can't tell."""
        return self.summary.get("fingerprints", {})

    @property
    def settings_without_effect(self) -> frozenset[str]:
        """Settings that say how the run was carried out, not what came of it; runs that do not say so are older."""
        return frozenset(self.summary.get("settings_without_effect", _WITHOUT_EFFECT_BEFORE))

    @property
    def name(self) -> str:
        """What it calls itself: its `+method`, its algorithm, or the checkpoint that was evaluated."""
        for override in self.overrides:
            group, _, choice = override.lstrip("+").partition("=")
            if group in ("method", "ablation"):
                return choice
        if "checkpoint" in self.summary:
            return Path(self.summary["checkpoint"]).name
        algo = self.config.get("algo") or {}
        return self.summary.get("algo") or (algo.get("name") if isinstance(algo, Mapping) else algo) or "unknown"

    @property
    def final(self) -> str:
        """The trained model among those that were evaluated: that of the last stage that had any step."""
        evaluated = self.summary["evaluation"]
        trained = [stage["name"] for stage in self.summary.get("stages", ()) if stage["name"] in evaluated]
        return trained[-1] if trained else next(iter(evaluated))

    @property
    def modes(self) -> list[str]:
        """Modes of decoding."""
        return list(self.summary["evaluation"][self.final])

    def figures(self, mode: str, model: str | None = None) -> Mapping[str, Mapping[str, Any]]:
        """Figures by group of questions, of the trained model or of another one; empty if it was not evaluated."""
        return self.summary["evaluation"].get(model or self.final, {}).get(mode, {})

    @cached_property
    def outcomes(self) -> dict[str, dict[str, bool]]:
        """By mode of decoding, whether the trained model was right, by question; a mode without a file is left out."""
        return {mode: {row["question_id"]: bool(row["correct"]) for row in rows} for mode, rows in self._rows.items()}

    @cached_property
    def datasets(self) -> dict[str, str]:
        """The group that each question is in, where the predictions say it."""
        return {row["question_id"]: row["dataset"] for rows in self._rows.values() for row in rows if "dataset" in row}

    @cached_property
    def _rows(self) -> dict[str, list[dict[str, Any]]]:
        """The predictions of each mode of decoding, or where these are not kept the transcripts."""
        found = {}
        for mode in self.modes:
            stem = f"{self.summary.get('split', 'test')}-{self.final}-{mode}.jsonl"
            for file in (self.path / "predictions" / stem, self.path / "trajectories" / f"{stem}.gz"):
                if file.is_file():
                    found[mode] = _predictions(file)
                    break
        return found

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of `metrics.jsonl`, without a last one that was cut off; empty if there is no such file."""
        return _metrics(self.path / "metrics.jsonl")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings by dotted name."""
        return flat(self.config)


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Every run in some folders or below them, sorted by path.

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


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `{"optimizer.learning_rate": 0.001}`."""
    leaves: dict[str, Any] = {}
    for key, value in nested.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def groups(runs: Sequence[Run]) -> list[str]:
    """Groups of questions that all runs have figures of, the whole first."""
    common = [set(run.figures(mode)) for run in runs for mode in run.modes]
    shared = set.intersection(*common) if common else set()
    first = runs[0].figures(runs[0].modes[0]) if runs else {}
    return [ALL, *(name for name in first if name in shared and name != ALL and "n" in first[name])]


def _read(folder: Path) -> Run:
    config, overrides = _yaml(folder / ".hydra" / "config.yaml"), _yaml(folder / ".hydra" / "overrides.yaml")
    given = tuple(str(override) for override in overrides) if isinstance(overrides, list) else ()
    config = config if isinstance(config, dict) else {}
    file = folder / "summary.json"
    if not file.is_file():
        return Run(folder, {}, config, given, f"unfinished: no summary.json{_last_step(folder)}")
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        run = Run(folder, summary, summary["config"], given)
        if not all(run.figures(mode)[ALL]["n"] for mode in run.modes):
            return Run(folder, {}, config, given, "nothing was evaluated")
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        return Run(folder, {}, config, given, f"summary.json is not that of a run ({type(error).__name__}: {error})")
    return run


def _predictions(file: Path) -> list[dict[str, Any]]:
    """Question, group and verdict of each row; of all the rest of a transcript nothing is needed here."""
    kept = ("question_id", "correct", "dataset")
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
            if any("question_id" not in row or "correct" not in row for row in rows):
                raise KeyError("question_id, correct")
            return [{name: row[name] for name in kept if name in row} for row in rows]
    except (EOFError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} holds no predictions ({type(error).__name__}: {error}).") from error


def _last_step(folder: Path) -> str:
    lines = _metrics(folder / "metrics.jsonl")
    return f", stopped after step {lines[-1]['step']}" if lines else ", no step done"


def _metrics(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise DataError(f"{file}, line {number} is not a JSON object with a 'step'.") from error
    return rows


def _yaml(file: Path) -> Any:
    if not file.is_file():
        return None
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{file} is no YAML file: {' '.join(str(error).split())}") from error
