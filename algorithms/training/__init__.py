"""One run, from its settings to `summary.json`: `train(configure(algo="dgpo", seed=1), "runs/first")`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from algorithms.training.compose import configure
    from algorithms.training.from_python import RunResult, read_run, train
    from algorithms.training.settings import RunConfig

__all__ = ["RunConfig", "RunResult", "configure", "read_run", "train"]
_HOME = {"RunConfig": "settings", "configure": "compose"}


def __getattr__(name: str) -> Any:
    """Import what is asked for: who only reads finished runs need not wait for Hydra."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'from_python')}"), name)
