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
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import agentic_rag_env
import algorithms
from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import DATASETS, ENVS, RETRIEVERS, REWARDS, Registry, did_you_mean
from algorithms.learner.algorithm import ALGORITHMS, check_settings
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

    def __post_init__(self) -> None:
        check_settings(self, "at least 1, or null for all", lambda value: value is None or value >= 1, "num_questions")
        check_settings(
            self, "one or more numbers of at least 0", lambda value: value and min(value) >= 0, "temperatures"
        )
        check_settings(self, "at least 0", lambda value: value >= 0, "every", "seed")
        check_settings(self, "at least 1", lambda value: value >= 1, "num_dev_questions")


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

    def __post_init__(self) -> None:
        check_settings(self, "in [0, 2**32)", lambda value: 0 <= value < 2**32, "seed")
        check_settings(self, "at least 1", lambda value: value >= 1, "num_envs", "checkpoint_every")
        check_settings(self, "in [0, 1]", lambda value: 0 <= value <= 1, "max_retriever_error_fraction")
        check_settings(self, "at least 1, or null", lambda value: value is None or value >= 1, "threads")


def run_config(composed: DictConfig) -> RunConfig:
    """A composed configuration as typed settings; the parts with a registry stay mappings with a `name`.

    Raises:
        ConfigurationError: A value can't work, is missing or unknown.
    """
    try:
        settings: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigurationError(f"{error.full_key} has no default and must be set: {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigurationError(" ".join(str(error).split())) from error
    sections = {
        "model": ModelConfig,
        "learner": LearnerConfig,
        "rollout": RolloutConfig,
        "evaluation": EvaluationConfig,
    }
    _check_names(RunConfig, "", settings)
    for name, section in sections.items():
        _check_names(section, f"{name}.", settings[name])
        settings[name] = section(**settings[name])
    return RunConfig(**settings)


def _check_names(section: type, prefix: str, settings: dict[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(section)]
    for given in settings:
        if given not in known:
            raise ConfigurationError(f"There is no setting {prefix}{given}.{did_you_mean(given, known)}")
    if missing := [f"{prefix}{name}" for name in known if name not in settings]:
        raise ConfigurationError(
            f"The configuration lacks {', '.join(missing)}; it was cut off, or is of another version."
        )


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
    # For the place of a run in conf/config.yaml, which depends on whether it is resumed.
    OmegaConf.register_new_resolver(
        "first_given", lambda first, second: second if first is None else first, replace=True
    )
    OmegaConf.register_new_resolver("unless_given", lambda given, value: value if given is None else None, replace=True)
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
