"""Weights & Biases: the same numbers on a page that others can open. Needs the extra `wandb`."""

from __future__ import annotations

import html
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.files import write_whole
from agentic_rag_env.settings import check_settings, one_of
from algorithms.training.loggers.base import LOGGERS, Logger, without_surrogates

_MODES = ("online", "offline", "disabled")
#: The axis of all curves. A resumed run goes back to an earlier step, which the library's own counter can't.
_STEP = "train_step"


@dataclass
class WandbConfig:
    """Settings of `WeightsAndBiases`.

    Attributes:
        project: Project that the run is added to.
        entity: User or team; None: that of the account that is logged in.
        name: The run's name there; None: the name of the run directory.
        mode: "online", "offline" (into the run directory; `wandb sync` sends it later), or "disabled".
    """

    project: str = "agentic-rag-env"
    entity: str | None = None
    name: str | None = None
    mode: str = "online"

    def __post_init__(self) -> None:
        check_settings(self, one_of(_MODES), "mode")


@LOGGERS.register("wandb", WandbConfig)
class WeightsAndBiases(Logger):
    """Sends numbers, settings and transcripts to Weights & Biases. A resumed run goes on as the same run there.

    Raises:
        ConfigurationError: The library is not installed.
    """

    def __init__(self, config: WandbConfig) -> None:
        if find_spec("wandb") is None:
            raise ConfigurationError(
                "logger=[wandb] needs the library wandb: pip install 'agentic-rag-env[wandb]'; or leave it out."
            )
        self._config = config
        self._run: Any = None

    def open(self, run_dir: Path, start_step: int) -> None:
        """Begin the run, or go on with the one whose id the run directory keeps."""
        import wandb

        kept = run_dir / "wandb" / "run-id.txt"
        if not kept.is_file():
            kept.parent.mkdir(exist_ok=True)
            write_whole(kept, uuid.uuid4().hex.encode())
        self._run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            name=self._config.name or run_dir.name,
            mode=self._config.mode,
            id=kept.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run_dir),
        )
        self._run.define_metric("*", step_metric=_STEP)

    def begin(self, settings: Mapping[str, Any], command: str) -> None:
        """Show the settings."""
        self._run.config.update({**settings, "command": command}, allow_val_change=True)

    def write(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        """Send the metrics of a step."""
        self._run.log({**metrics, "stage": stage, _STEP: step})

    def text(self, name: str, text: str, step: int) -> None:
        """Send a transcript, word for word."""
        import wandb

        page = f"<pre>{html.escape(without_surrogates(text))}</pre>"
        self._run.log({name: wandb.Html(page, inject=False), _STEP: step})

    def results(self, metrics: Mapping[str, float], step: int) -> None:
        """Put the final figures into the run's summary, by which the table of runs can be sorted."""
        self._run.summary.update(dict(metrics))

    def close(self) -> None:
        """Send the rest."""
        self._run.finish()
