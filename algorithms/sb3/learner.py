"""Learners of other libraries on the discrete view of the environment: trained, measured and written down like a run.

Such a learner is no language model. It sees what `agentic_rag_env.wrappers.DiscreteActions` shows, picks numbered
actions, and the text of its turns is a template. It is what a language model has to beat. Of a run's settings it obeys
`seed`, `threads`, `num_envs`, `env`, `dataset`, `retriever`, `reward`, `evaluation` and `max_retriever_error_fraction`;
of `model.policy` it borrows the tokenizer, for transcripts. Probes, which need text to be written, are left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.wrappers import DiscreteActions
from algorithms.learner.algorithm import ALGORITHMS

if TYPE_CHECKING:
    from algorithms.training.settings import RunConfig

#: Called once per update with metrics by full name; those under `time/` are counted as costs.
Report = Callable[[Mapping[str, float]], None]


class OutsideLearner(ABC):
    """Base of what `algo=` may name beside the zoo; registered in `ALGORITHMS` under the decorator as any other.

    Attributes:
        name: As it was registered; what it is called in tables and files.
        max_candidates: Spans that the view lists.
    """

    name: ClassVar[str]
    max_candidates: int = 12

    @abstractmethod
    def num_updates(self, config: RunConfig) -> int:
        """Updates of a whole training; one line of metrics each."""

    @abstractmethod
    def train(self, make_view: Callable[[], DiscreteActions], config: RunConfig, report: Report) -> None:
        """Learn.

        Args:
            make_view: Makes one more environment of the training questions.
            config: The run's.
            report: To be called after each update.
        """

    @abstractmethod
    def log_probs(self, observation: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Log-probabilities of the actions, [actions] nats; minus infinity where the mask [actions] is False.

        Asked after the training, and in it while an episode is played.
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what was learned into a folder that exists."""

    def run(self, config: RunConfig, run_dir: Path) -> dict[str, Any]:
        """A whole run: train, measure on the test questions, write everything.

        Args:
            config: All settings.
            run_dir: Where it is written.

        Returns:
            The summary, as `summary.json` holds it.

        Raises:
            ConfigurationError: There is a complete run. One that was interrupted begins again, which gives the same.
        """
        if (run_dir / "summary.json").exists():
            raise ConfigurationError(
                f"{run_dir} holds a complete run of {self.name}, which can't be resumed; see its summary.json, or "
                "train again in another directory."
            )
        if (run_dir / "metrics.jsonl").exists():
            print(f"{self.name} keeps no training state, so the run begins again.", flush=True)
        from algorithms.sb3.run import OutsideRun  # which needs torch

        run = OutsideRun(self, config, run_dir)
        run.train()
        return run.finish()


def is_outside_learner(name: str | None) -> bool:
    """Whether `algo=name` stands for such a learner; False for an algorithm of the zoo and for an unknown name."""
    factory = ALGORITHMS.get(name).factory if name in ALGORITHMS.names() else None
    return isinstance(factory, type) and issubclass(factory, OutsideLearner)


def outside_learner(spec: Mapping[str, Any]) -> OutsideLearner | None:
    """The learner that settings with a `name` stand for; None if it is an algorithm of the zoo."""
    return ALGORITHMS.build(spec) if is_outside_learner(spec["name"]) else None
