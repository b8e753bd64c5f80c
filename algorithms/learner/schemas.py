"""The configuration's shape: every setting of a run, its type and its default, known to Hydra under `schema/`.

Parts that have a registry (algorithms, environments, retrievers, datasets, rewards) bring their own dataclass; here
each gets a `name` field and becomes selectable by that name, plug-ins included, without a YAML file.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

import agentic_rag_env
import algorithms
from agentic_rag_env.registry import DATASETS, ENVS, RETRIEVERS, REWARDS, Registry
from algorithms.learner.algorithm import ALGORITHMS
from algorithms.learner.learner import LearnerConfig
from algorithms.learner.rollout import RolloutConfig


@dataclass
class ModelConfig:
    """Which networks.

    Attributes:
        policy: Start of the policy: a bundled name, a Hugging Face folder or a hub id.
        teacher: Likewise; None where no teacher is to be had.
    """

    policy: str = "tiny-student"
    teacher: str | None = "tiny-teacher"


@dataclass
class EvaluationConfig:
    """What is measured, and when.

    Attributes:
        num_questions: Test questions at the end; None takes all of them.
        temperatures: Modes of decoding at the end; 0 is greedy.
        every: Training steps between checks on the dev split; 0 for none.
        num_dev_questions: Questions of such a check.
        seed: Of the sampled modes and of the bootstrap.
    """

    num_questions: int | None = 600
    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])
    every: int = 20
    num_dev_questions: int = 96
    seed: int = 0


@dataclass
class RunConfig:
    """A whole run.

    Attributes:
        seed: Of everything random but the evaluation.
        resume: Run directory to go on with; its own configuration is used.
        num_envs: Episodes played at once.
        max_retriever_error_fraction: Share of a rollout's episodes that a failed search may end; past it the run stops.
        cache_dir: Where teacher trajectories are kept between runs.
        checkpoint_every: Training steps between checkpoints.
        threads: CPU threads; None leaves PyTorch's choice.
    """

    algo: Any = MISSING
    env: Any = MISSING
    dataset: Any = MISSING
    retriever: Any = MISSING
    reward: Any = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    resume: str | None = None
    num_envs: int = 96
    max_retriever_error_fraction: float = 0.2
    cache_dir: str = "~/.cache/agentic_rag_env"
    checkpoint_every: int = 25
    threads: int | None = None


def run_config(composed: DictConfig) -> RunConfig:
    """A composed configuration as typed settings; the parts with a registry stay mappings with a `name`.

    Raises:
        ConfigurationError: A value can't work.
    """
    settings = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(settings, dict)
    typed = {"model": ModelConfig, "learner": LearnerConfig, "rollout": RolloutConfig, "evaluation": EvaluationConfig}
    return RunConfig(**{name: typed[name](**value) if name in typed else value for name, value in settings.items()})


def import_zoo() -> None:
    """Import every algorithm file, so that its decorator has run."""
    entry_points = {"run", "evaluate", "compare", "show"}
    for module in pkgutil.iter_modules(algorithms.__path__):
        if not module.ispkg and module.name not in entry_points:
            importlib.import_module(f"algorithms.{module.name}")


def register_schemas() -> None:
    """Tell Hydra about the configuration; must run before it composes.

    A name that a YAML file of `conf/` also bears is left to that file, which binds to `schema/<group>/<name>`.
    """
    assert agentic_rag_env.__name__
    import_zoo()
    store = ConfigStore.instance()
    store.store("run_schema", RunConfig)
    store.store("model", ModelConfig, group="schema/model")
    registries: tuple[Registry, ...] = (ALGORITHMS, ENVS, RETRIEVERS, DATASETS, REWARDS)
    for registry in registries:
        for name in registry.names():
            schema = named_config(registry, name)
            store.store(name, schema, group=f"schema/{registry.group}")
            store.store(name, _selectable(registry, name, schema), group=registry.group)


def named_config(registry: Registry, name: str) -> type:
    """The settings of a registered part with a `name` field in front, as a dataclass."""
    config = registry.get(name).config
    return dataclasses.make_dataclass(
        config.__name__ if config else f"{name.title()}Config",
        [("name", str, field(default=name, kw_only=True))],
        bases=(config,) if config else (),
        namespace={"__post_init__": lambda self: None},
    )


def _selectable(registry: Registry, name: str, schema: type) -> Any:
    """A config-group option; a warm start is composed in place, so that its settings are typed too."""
    for setting in dataclasses.fields(schema):
        if setting.name == "warm_start" and setting.default_factory is not dataclasses.MISSING:
            start = setting.default_factory()["name"]
            return {"defaults": [{f"/schema/{registry.group}@_here_": name}, {f"/{registry.group}@warm_start": start}]}
    return schema
