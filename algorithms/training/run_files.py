"""The settings and the summary of a run directory. They may be a stranger's, so they are read as plain data only.

Nothing in them is executed or resolved, and no name in them becomes a class. A place that they name outside of the run
directory counts only if the command line names it too.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from agentic_rag_env.errors import ConfigurationError, DataError
from agentic_rag_env.files import lines_of, sha256, write_whole
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import OUTSIDE
from agentic_rag_env.terminal import printable
from algorithms.assets import BUNDLED

CONFIG_FILE = Path(".hydra") / "config.yaml"
OVERRIDES_FILE = Path(".hydra") / "overrides.yaml"
SUMMARY_FILE = "summary.json"
METRICS_FILE = "metrics.jsonl"
#: Files whose checksums stand in the summary.
_SUMMED = (METRICS_FILE, "predictions/*.jsonl", "trajectories/*.jsonl.gz")
_MAX_BYTES, _MAX_DEPTH = 2**20, 50
#: YAML 1.2 reads 1e-5 as a number, as Hydra does; PyYAML by itself does not.
_FLOAT = "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
#: Settings that name a model.
_MODELS = ("policy", "teacher", "model")


class _Loader(yaml.SafeLoader):
    """Loads plain data without references, because references can make a small file endless."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it holds a reference (*name)")
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.add_implicit_resolver(*_FLOAT)
_Dumper.add_implicit_resolver(*_FLOAT)


def read_yaml(file: Path) -> Any:
    """Read plain data from a YAML file.

    Raises:
        DataError: The file is no YAML, is too large, or holds more than numbers, strings, lists and mappings.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise DataError(f"{file} is no file of settings: it has more than {_MAX_BYTES} bytes.")
        read = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} is damaged or holds no plain settings: {_one_line(error)}") from error
    _require_scalars(read, file)
    return read


def read_settings(run_dir: Path) -> dict[str, Any]:
    """Read the settings that a run was begun with.

    Args:
        run_dir: The run directory.

    Raises:
        DataError: The file is missing or damaged, or holds an interpolation; the message names the setting.
    """
    file = run_dir / CONFIG_FILE
    if not file.is_file():
        raise DataError(f"{run_dir} is no run directory: {file} is missing. Give a folder that a run printed.")
    settings = read_yaml(file)
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise DataError(
            f"{file} was cut off or is damaged: it holds no settings. Put the file of this run back; without it, begin "
            f"a new run from its weights: model.policy={shlex.quote(str(run_dir))}/checkpoints/<step>."
        )
    _require_resolved(settings, file)
    return settings


def require_plain(data: Any, origin: str | Path) -> None:
    """Make sure that saved settings are plain data.

    Args:
        data: What was read.
        origin: Where from, for the error.

    Raises:
        DataError: They hold more than numbers, strings, lists and mappings, lie too deep, or hold an interpolation.
    """
    _require_scalars(data, origin)
    _require_resolved(data, origin)


def _require_scalars(data: Any, origin: str | Path) -> None:
    for key, value in _leaves(data):
        if not isinstance(value, (str, int, float, type(None))):
            raise DataError(f"{origin}: {key} is a {type(value).__name__}; settings are numbers, strings or null.")


def _require_resolved(data: Any, origin: str | Path) -> None:
    if found := _interpolations(data):
        raise DataError(
            f"{origin}: {found[0]} holds an interpolation (${{...}}). Saved settings are plain data and are never "
            "resolved, since that would read this machine's environment. Write the value itself there if you know it."
        )


def write_settings(run_dir: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run that begins, with every interpolation resolved.

    Raises:
        ConfigurationError: A value would be taken for an interpolation when it is read again.
    """
    if found := _interpolations(settings):
        raise ConfigurationError(
            f"{found[0]} holds the characters ${{, which could not be told from an interpolation when the run goes "
            "on; choose other characters."
        )
    write_whole(run_dir / CONFIG_FILE, yaml.dump(dict(settings), Dumper=_Dumper, sort_keys=False).encode())


def read_overrides(run_dir: Path) -> list[str]:
    """Read the overrides that a run was begun with; none if they are not kept or are no list."""
    file = run_dir / OVERRIDES_FILE
    overrides = read_yaml(file) if file.is_file() else []
    return [str(override) for override in overrides] if isinstance(overrides, list) else []


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read the lines of `metrics.jsonl`; a last line that was cut off is left out. Empty if there is no such file.

    Raises:
        DataError: A line is not that of a run.
    """
    file = run_dir / METRICS_FILE
    rows: list[dict[str, Any]] = []
    lines = list(lines_of(file)) if file.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            if number < len(lines):
                raise DataError(f"{file}, line {number} is not a JSON object with a 'step'.") from error
    return rows


def differences(first: Any, second: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Find settings that two configurations share and that differ, as `(dotted name, first, second)`."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        shared = [name for name in first if name in second]
        return [each for name in shared for each in differences(first[name], second[name], f"{key}.{name}".strip("."))]
    return [] if first == second else [(key, first, second)]


# --- places outside of the run directory -----------------------------------------------------------------------------


def require_named(settings: Mapping[str, Any], allowed: Sequence[str], origin: str) -> None:
    """Refuse saved settings that would ask an address, or write a file, that the command line does not name.

    Args:
        settings: Saved settings that are to be used.
        allowed: Addresses and files that the command line names.
        origin: Where the settings come from, for the error.

    Raises:
        ConfigurationError: A place is not named; the message says which, and how to allow it.
    """
    named = places(settings)
    if any(place not in allowed for _, place in named):
        told = "; ".join(f"{key} is {printable(place)}" for key, place in named)
        raise ConfigurationError(
            f"The settings saved in {origin} name places outside of it: {told}. Nothing has been asked or written. If "
            f"you trust them, add {allow(settings)}"
        )
    for key, value in _leaves(settings):
        setting = key.rpartition(".")[2]
        # An encoder without a slash is the name of a registered one.
        names_model = isinstance(value, str) and (setting in _MODELS or (setting == "encoder" and "/" in value))
        if names_model and not Path(value).expanduser().exists() and value not in BUNDLED:
            print(f"{key} is {printable(value)}, which is looked for on the Hugging Face hub.", flush=True)


def places(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Find settings that name an address or a file to write: dotted name and place."""
    by_declaration = tuple(_declared(settings))
    return [
        (key, value)
        for key, value in _leaves(settings)
        if isinstance(value, str) and ("://" in value or f"{key}.".startswith(by_declaration))
    ]


def allow(settings: Mapping[str, Any]) -> str:
    """Overrides that allow all places that settings name."""
    return shlex.quote(allowed([place for _, place in places(settings)]))


def allowed(named: Sequence[str]) -> str:
    """An override that allows places, in Hydra's grammar."""
    quoted = ("'" + place.replace("\\", "\\\\").replace("'", "\\'") + "'" for place in named)
    return f"allow=[{','.join(dict.fromkeys(quoted))}]"


def _declared(settings: Any, key: str = "") -> Iterator[str]:
    """Find settings of retrievers that are declared to name places outside; their dotted names end with a dot."""
    if not isinstance(settings, Mapping):
        return
    name = settings.get("name")
    config = RETRIEVERS.get(name).config if isinstance(name, str) and name in RETRIEVERS.names() else None
    for setting in fields(config) if config else ():
        if setting.metadata.get(OUTSIDE) and setting.name in settings:
            yield f"{key}{setting.name}."
    for inner, value in settings.items():
        for number, each in enumerate(value) if isinstance(value, list) else ((None, value),):
            yield from _declared(each, f"{key}{inner}." if number is None else f"{key}{inner}.{number}.")


# --- the summary -----------------------------------------------------------------------------------------------------


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, whole or not at all, with checksums of the other files and of its own other entries."""
    files = [file for pattern in _SUMMED for file in sorted(folder.glob(pattern))]
    sums = {file.relative_to(folder).as_posix(): sha256(file) for file in files}
    plain = json.loads(json.dumps({**summary, "files": sums}))
    content = {**plain, "checksum": _checksum(plain)}
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_whole(folder / SUMMARY_FILE, text.encode("utf-8", "backslashreplace"))


def read_summary(folder: Path) -> dict[str, Any]:
    """Read what `write_summary` wrote.

    Raises:
        DataError: The file is damaged or was changed.
        FileNotFoundError: There is no summary.
    """
    file = folder / SUMMARY_FILE
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is damaged ({_one_line(error)})") from error
    if not isinstance(summary, dict):
        raise DataError(f"{file} is not that of a run")
    try:
        for _ in _leaves(summary):
            pass
    except DataError as error:
        raise DataError(f"{file} is not that of a run: {error}") from error
    expected = summary.pop("checksum", None)  # summaries of earlier versions have none
    if expected is not None and expected != _checksum(summary):
        raise DataError(f"{file} does not have the checksum that it was written with")
    return summary


def _checksum(summary: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(summary, sort_keys=True).encode()).hexdigest()


# --- plain data ------------------------------------------------------------------------------------------------------


def plain_data(value: Any) -> Any:
    """A value as plain data: mappings, lists, numbers and strings."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {setting.name: getattr(value, setting.name) for setting in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain_data(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `{"optimizer.learning_rate": 0.001}`."""
    leaves: dict[str, Any] = {}
    for key, value in nested.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def _leaves(nested: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """List the dotted name and the value of everything that is no mapping and no list."""
    if isinstance(nested, (Mapping, list)):
        if depth > _MAX_DEPTH:
            raise DataError(f"{key[:80]}... lies more than {_MAX_DEPTH} levels deep")
        for name, value in nested.items() if isinstance(nested, Mapping) else enumerate(nested):
            yield from _leaves(value, f"{key}.{name}".strip("."), depth + 1)
    else:
        yield key, nested


def _interpolations(settings: Any) -> list[str]:
    return [key for key, value in _leaves(settings) if "${" in key or (isinstance(value, str) and "${" in value)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
