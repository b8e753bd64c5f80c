"""What `model.policy`, `model.teacher` and `checkpoint` may name, and the folder that each name stands for."""

from __future__ import annotations

import difflib
from pathlib import Path

from agentic_rag_env.errors import ConfigurationError, UnknownNameError
from agentic_rag_env.registry import did_you_mean
from algorithms.assets import ASSETS, BUNDLED, gguf


def resolve_model(name: str, cache_dir: str | Path = "~/.cache/agentic_rag_env") -> str:
    """Find what a name stands for: a folder in Hugging Face format or a hub id.

    Args:
        name: A bundled model; a run directory, which stands for its newest checkpoint; a `.gguf` file, which becomes a
            folder in the cache; any other folder, or a hub id, which stay as they are.
        cache_dir: Where folders of `.gguf` files are kept.

    Raises:
        UnknownNameError: The name is almost that of a bundled model.
        ConfigurationError: A run directory has no checkpoint, or a `.gguf` file can't be converted.
    """
    path = Path(name).expanduser()
    if name in BUNDLED:
        return str(ASSETS / name)
    if path.suffix == ".gguf":
        return str(gguf.hugging_face_folder(path, Path(cache_dir).expanduser() / "gguf"))
    if is_run(path):
        return str(newest_checkpoint(path))
    if difflib.get_close_matches(name, BUNDLED, cutoff=0.8) and not path.exists():
        raise UnknownNameError(f"There is no bundled model {name!r}.{did_you_mean(name, BUNDLED)}")
    return name


def is_run(path: Path) -> bool:
    """Whether a run wrote this folder."""
    return (path / ".hydra" / "config.yaml").is_file()


def newest_checkpoint(run_dir: Path) -> Path:
    """Find the newest complete checkpoint of a run.

    Raises:
        ConfigurationError: The run has none.
    """
    from algorithms.training import checkpoint  # which loads torch

    newest = checkpoint.latest(run_dir)
    if newest is None:
        raise ConfigurationError(f"The run {run_dir} has no complete checkpoint yet, under {run_dir / 'checkpoints'}.")
    return newest
