"""Learners of other libraries on the discrete view of the environment: they are trained and measured like any run.

Such a learner is no language model. It sees what `agentic_rag_env.wrappers.DiscreteActions` shows, picks numbered
actions, and the text of its turns is a template. A language model has to beat it. From a run's settings it uses
`seed`, `threads`, `num_envs`, `env`, `dataset`, `retriever`, `reward`, `evaluation` and `max_retriever_error_fraction`;
its transcripts use the tokenizer of `model.policy`. It runs no probes, because those need written text.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.wrappers import DiscreteActions
from algorithms.learner.algorithm import ALGORITHMS
from algorithms.training.run_directory import complete

if TYPE_CHECKING:
    from algorithms.training.settings import RunConfig

#: Called once per update with metrics by full name; metrics under `time/` are counted as costs.
Report = Callable[[Mapping[str, float]], None]


class OutsideLearner(ABC):
    """Base of the learners that `algo=` may name beside the zoo; registered in `ALGORITHMS` like any algorithm.

    Attributes:
        name: The registered name, also used in tables and files.
        max_candidates: Number of spans that the view lists.
    """

    name: ClassVar[str]
    max_candidates: int = 12

    @abstractmethod
    def num_updates(self, config: RunConfig) -> int:
        """Number of updates of a whole training; each gives one line of metrics."""

    @abstractmethod
    def train(self, make_view: Callable[[], DiscreteActions], config: RunConfig, report: Report) -> None:
        """Train the learner.

        Args:
            make_view: Makes one more environment of the training questions.
            config: Settings of the run.
            report: Must be called after each update.
        """

    @abstractmethod
    def log_probs(self, observation: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Log-probabilities of the actions, [actions] nats; minus infinity where the mask [actions] is False.

        Called after the training, and during it while an episode is played.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what was learned into a folder that exists."""

    def run(self, config: RunConfig, run_dir: Path) -> dict[str, Any]:
        """Do a whole run: train, measure on the test questions, write everything.

        Args:
            config: All settings.
            run_dir: Folder that the run writes.

        Returns:
            The summary, as `summary.json` holds it.

        Raises:
            ConfigurationError: The folder holds a complete run. An interrupted one starts again, with the same result.
        """
        if complete(run_dir):
            raise ConfigurationError(
                f"{run_dir} holds a complete run of {self.name}, which can't be resumed; see its summary.json, or "
                "train again in another directory."
            )
        if (run_dir / "metrics.jsonl").exists():
            print(f"{self.name} keeps no training state, so the run begins again.", flush=True)
        if config.model.lora.rank is not None:
            warnings.warn(
                f"{self.name} trains no language model, so model.lora.rank={config.model.lora.rank} has no effect.",
                stacklevel=2,
            )
        from algorithms.sb3.run import OutsideRun  # it needs torch

        run = OutsideRun(self, config, run_dir)
        run.train()
        return run.finish()


def is_outside_learner(name: str | None) -> bool:
    """Whether `algo=name` stands for such a learner; False for an algorithm of the zoo and for an unknown name."""
    factory = ALGORITHMS.get(name).factory if name in ALGORITHMS.names() else None
    return isinstance(factory, type) and issubclass(factory, OutsideLearner)
