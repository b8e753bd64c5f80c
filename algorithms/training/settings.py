"""The configuration's shape: every setting of a run, its type and its default, known to Hydra under `schema/`.

Parts that have a registry (algorithms, environments, retrievers, datasets, rewards) bring their own dataclass; here
each gets a `name` field and becomes selectable by that name, plug-ins included, without a YAML file.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import algorithms
from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.probes import DEFAULT_PROBES
from agentic_rag_env.registry import DATASETS, ENVS, PROBES, RETRIEVERS, REWARDS, Registry, did_you_mean
from agentic_rag_env.settings import COUNT, FRACTION, Allowed, above, at_least, check_settings, one_of, or_none
from algorithms.assets import ASSETS
from algorithms.learner.algorithm import ALGORITHMS
from algorithms.learner.config import WITHOUT_EFFECT, DemonstrationConfig, LearnerConfig
from algorithms.rollout.config import RolloutConfig
from algorithms.training import presets
from algorithms.training.hardware import HardwareConfig
from algorithms.training.run_files import require_named


@dataclass
class ModelConfig:
    """Which networks a run uses.

    Attributes:
        policy: Start of the policy: a bundled name, a Hugging Face folder, a run directory (its newest checkpoint), a
            `.gguf` file, or a hub id.
        teacher: The teacher, named like the policy; None for no teacher.
        settings: Settings of a preset that suit the model, see `presets`. They are in the configuration already.
        teacher_temperature: The teacher's logits are divided by it everywhere: where it plays demonstrations, judges
            tokens, and is measured. Above 1, a teacher that makes no mistakes begins to make some.
    """

    policy: str = "tiny-student"
    teacher: str | None = "tiny-teacher"
    settings: dict[str, Any] = field(default_factory=dict, metadata=WITHOUT_EFFECT)
    teacher_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_settings(self, above(0), "teacher_temperature")


#: Which passages an evaluation shows; all but the first are names of probes.
CORPORA = ("own", "counterfactual", "shuffled")


@dataclass
class ScoringConfig:
    """How a model is measured.

    Attributes:
        num_questions: Number of questions, from the first one of the split on; None takes all of them.
        temperatures: Modes of decoding; 0 is greedy.
        corpus: "own"; or "counterfactual" or "shuffled" for one more row of probes: what the agent answers when the
            passages are changed, see `agentic_rag_env.probes.grounding`.
        seed: Seed of the sampled modes and of the bootstrap.
    """

    num_questions: int | None = None
    temperatures: list[float] = field(default_factory=lambda: [0.0, 1.0])
    corpus: str = "own"
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, or_none(COUNT, "all"), "num_questions")
        check_settings(
            self, Allowed("one or more numbers of at least 0", lambda value: value and min(value) >= 0), "temperatures"
        )
        check_settings(self, at_least(0), "seed")
        check_settings(self, one_of(CORPORA), "corpus")


@dataclass
class EvaluationConfig(ScoringConfig):
    """What a run measures at its end, and on the way.

    Attributes:
        num_questions: Test questions at the end; None takes all of them.
        every: Training steps between checks on the dev split; 0 for none.
        num_dev_questions: Questions of a check on the dev split.
    """

    num_questions: int | None = 600
    every: int = 20
    num_dev_questions: int = 96

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, at_least(0), "every")
        check_settings(self, COUNT, "num_dev_questions")


@dataclass
class DemonstrationsConfig:
    """Settings of every stage that trains on demonstrations.

    Attributes:
        num: Demonstrations to collect; None: each stage's own `num_demonstrations`.
    """

    num: int | None = None

    def __post_init__(self) -> None:
        check_settings(self, or_none(COUNT), "num")


@dataclass
class RunConfig:
    """Settings of a whole run.

    Attributes:
        seed: Seed of everything random but the evaluation.
        resume: Run directory to go on with; its own configuration is used.
        num_envs: Episodes played at once, in each process.
        max_retriever_error_fraction: Share of a rollout's episodes that a failed search may end; past it the run stops.
        cache_dir: Folder that keeps demonstrations, and evaluations of models that other runs measure too, between
            runs.
        checkpoint_every: Training steps between checkpoints.
        keep_checkpoints: How many of the newest checkpoints are kept, besides the last and the best on the dev split of
            every stage; None: all.
        probes: ARC probes at the end, by name or as a mapping with `name` and settings; empty for none.
        probe_every: Training steps between probes on the questions of a check on the dev split; 0 for none.
        threads: CPU threads of each process; None leaves PyTorch's choice.
        allow: Addresses and files outside of the run directory that the settings saved in `resume` may name.
        preflight: Write a plan of memory, disk, tokens and time to `preflight.json` instead of training.
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
    demonstrations: DemonstrationsConfig = field(default_factory=DemonstrationsConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    seed: int = 0
    resume: str | None = field(default=None, metadata=WITHOUT_EFFECT)
    num_envs: int = 96
    max_retriever_error_fraction: float = 0.2
    cache_dir: str = field(default="~/.cache/agentic_rag_env", metadata=WITHOUT_EFFECT)
    checkpoint_every: int = field(default=25, metadata=WITHOUT_EFFECT)
    keep_checkpoints: int | None = field(default=2, metadata=WITHOUT_EFFECT)
    probes: list[Any] = field(default_factory=lambda: list(DEFAULT_PROBES))
    probe_every: int = field(default=0, metadata=WITHOUT_EFFECT)
    threads: int | None = field(default=None, metadata=WITHOUT_EFFECT)
    allow: list[str] = field(default_factory=list, metadata=WITHOUT_EFFECT)
    preflight: bool = field(default=False, metadata=WITHOUT_EFFECT)

    def __post_init__(self) -> None:
        check_settings(self, Allowed("in [0, 2**32)", lambda value: 0 <= value < 2**32), "seed")
        check_settings(self, COUNT, "num_envs", "checkpoint_every")
        check_settings(self, at_least(0), "probe_every")
        for probe in self.probes:
            PROBES.build(probe)  # finds a misspelled one before training
        check_settings(self, FRACTION, "max_retriever_error_fraction")
        check_settings(self, or_none(COUNT), "threads", "keep_checkpoints")


@dataclass
class EvaluateConfig:
    """Settings of `algorithms.evaluate`.

    `env`, `dataset`, `retriever`, `reward`, `rollout` and `learner` are those of the run that the checkpoint comes
    from. Without a run they are the defaults, with the prompt `search_r1` unless the model is a bundled one. A single
    setting changes one of them (`env.max_turns=2`), and a name replaces a whole part (`dataset=jsonl`).

    Attributes:
        checkpoint: A run directory, a Hugging Face folder, a `.gguf` file, a bundled name or a hub id.
        num_envs: Episodes played at once.
        max_retriever_error_fraction: Share of the episodes that a failed search may end; past it the evaluation stops.
        probes: ARC probes, by name or as a mapping with `name` and settings; empty for none.
        cache_dir: Folder that keeps what a `.gguf` file is converted to.
        threads: CPU threads; None leaves PyTorch's choice.
        allow: Addresses and files outside of the run directory that the settings saved in it may name.
    """

    checkpoint: str = MISSING
    env: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    retriever: dict[str, Any] = field(default_factory=dict)
    reward: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
    learner: dict[str, Any] = field(default_factory=dict)
    evaluation: ScoringConfig = field(default_factory=ScoringConfig)
    num_envs: int = 96
    max_retriever_error_fraction: float = 0.2
    probes: list[Any] = field(default_factory=lambda: list(DEFAULT_PROBES))
    cache_dir: str = "~/.cache/agentic_rag_env"
    threads: int | None = None
    allow: list[str] = field(default_factory=list)


@dataclass
class AskConfig:
    """Settings of `algorithms.ask`.

    `env`, `dataset`, `retriever`, `rollout` and `learner` are as in `EvaluateConfig`, with two exceptions. The model
    decodes greedily. The precision "auto" is float32 on a CPU, which writes a single episode faster.

    Attributes:
        checkpoint: A run directory, a Hugging Face folder, a `.gguf` file, a bundled name or a hub id.
        question: A question in plain words; None: questions are typed one after the other.
        cache_dir: Folder that keeps what a `.gguf` file is converted to.
        threads: CPU threads; None leaves PyTorch's choice.
        allow: Addresses and files outside of the run directory that the settings saved in it may name.
    """

    checkpoint: str = MISSING
    question: str | None = None
    env: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)
    retriever: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
    learner: dict[str, Any] = field(default_factory=dict)
    cache_dir: str = "~/.cache/agentic_rag_env"
    threads: int | None = None
    allow: list[str] = field(default_factory=list)


def ask_config(given: dict[str, Any], model: str, of_run: dict[str, Any]) -> RunConfig:
    """Make the settings of a conversation, in the form of a run's; see `evaluate_config`.

    Args:
        given: Settings from the command line, shaped like `AskConfig`, without checkpoint and question.
        model: Folder or hub id of the model.
        of_run: Settings of the run that it comes from; empty if there is none.
    """
    evaluation = OmegaConf.to_container(OmegaConf.structured(EvaluateConfig))
    assert isinstance(evaluation, dict)
    settings: Any = {**evaluation, **given, "num_envs": 1, "probes": []}
    settings["rollout"] = {"temperature": 0.0, **given["rollout"]}
    return evaluate_config(settings, model, of_run)


#: The default parts of a run, as in conf/config.yaml.
_DEFAULT_PARTS = {"env": "agentic_rag", "dataset": "tiny", "retriever": "bm25", "reward": "exact_match"}


def evaluate_config(given: dict[str, Any], model: str, of_run: dict[str, Any]) -> RunConfig:
    """Make the settings of an evaluation, in the form of a run's.

    Args:
        given: Settings from the command line, shaped like `EvaluateConfig`; "???" stands for what is missing.
        model: Folder or hub id of the model.
        of_run: Settings of the run that it comes from; empty if there is none.

    Raises:
        ConfigurationError: A value can't work, is missing or unknown.
    """
    registries = {registry.group: registry for registry in (ENVS, DATASETS, RETRIEVERS, REWARDS)}
    schemas: dict[str, Any] = {"rollout": RolloutConfig, "learner": LearnerConfig}
    specs = {section: {**of_run.get(section, {}), **given[section]} for section in schemas}
    used: dict[str, Any] = {}
    for group, default in _DEFAULT_PARTS.items():
        chosen = given[group]
        saved = {} if "name" in chosen else {**of_run.get(group, {"name": default})}
        specs[group] = {**saved, **chosen}
        used[group] = {name: value for name, value in saved.items() if name not in chosen}
        schemas[group] = named_config(registries[group], specs[group]["name"])
    if not of_run and Path(model).parent != ASSETS and specs["env"]["name"] == _DEFAULT_PARTS["env"]:
        specs["env"] = {"prompt": "search_r1", **specs["env"]}  # others know no protocol unasked
    require_named(used, given.get("allow", ()), "the run directory")
    try:
        typed = OmegaConf.merge({group: OmegaConf.structured(schema) for group, schema in schemas.items()}, specs)
        parts = plain(typed)
    except OmegaConfBaseException as error:
        raise ConfigurationError(" ".join(str(error).split())) from error
    return RunConfig(
        algo=None,
        model=ModelConfig(policy=model, teacher=None),
        rollout=RolloutConfig(**parts.pop("rollout")),
        learner=LearnerConfig(**parts.pop("learner")),
        evaluation=EvaluationConfig(**given["evaluation"]),
        **{name: given[name] for name in ("num_envs", "max_retriever_error_fraction", "probes", "threads")},
        cache_dir=given["cache_dir"],
        **parts,
    )


def run_config(composed: DictConfig) -> RunConfig:
    """Turn a composed configuration into typed settings. The parts with a registry stay mappings with a `name`.

    Raises:
        ConfigurationError: A value can't work, is missing or unknown.
    """
    settings = plain(composed)
    sections = {
        "model": ModelConfig,
        "learner": LearnerConfig,
        "rollout": RolloutConfig,
        "evaluation": EvaluationConfig,
        "demonstrations": DemonstrationsConfig,
        "hardware": HardwareConfig,
    }
    # The run may be older than these settings.
    settings = {"demonstrations": {"num": None}, "hardware": vars(HardwareConfig()), "preflight": False, **settings}
    _check_names(RunConfig, "", settings)
    for name, section in sections.items():
        _check_names(section, f"{name}.", settings[name])
        settings[name] = section(**settings[name])
    if (count := settings["demonstrations"].num) is not None:
        settings["algo"] = _with_demonstrations(settings["algo"], count)
        settings["demonstrations"] = DemonstrationsConfig()
    return RunConfig(**settings)


def _with_demonstrations(spec: Any, count: int) -> dict[str, Any]:
    """Set in an algorithm's settings how many demonstrations each stage that trains on them collects.

    Raises:
        ConfigurationError: No stage trains on demonstrations.
    """
    first: dict[str, Any] = {"warm_start": spec}
    place, found = first, False
    while place.get("warm_start") is not None:
        start = place["warm_start"]
        place["warm_start"] = start = {"name": start} if isinstance(start, str) else dict(start)
        kind = ALGORITHMS.get(start["name"]).config
        if kind is not None and issubclass(kind, DemonstrationConfig):
            start["num_demonstrations"], found = count, True
        for setting in dataclasses.fields(kind) if kind else ():
            if setting.name == "warm_start" and setting.default_factory is not dataclasses.MISSING:
                start.setdefault("warm_start", setting.default_factory())
        place = start
    if not found:
        raise ConfigurationError(
            f"demonstrations.num={count}: no stage of {first['warm_start']['name']} trains on demonstrations; leave it "
            "out."
        )
    return first["warm_start"]


def plain(composed: Any) -> dict[str, Any]:
    """Turn a configuration into plain data, if nothing in it is missing."""
    try:
        settings: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigurationError(f"{error.full_key} has no default and must be set: {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigurationError(" ".join(str(error).split())) from error
    return settings


def _check_names(section: type, prefix: str, settings: dict[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(section)]
    for given in settings:
        if given not in known:
            raise ConfigurationError(f"There is no setting {prefix}{given}.{did_you_mean(given, known)}")
    if missing := [f"{prefix}{name}" for name in known if name not in settings]:
        raise ConfigurationError(
            f"The configuration lacks {', '.join(missing)}; it was cut off, or is of another version."
        )


def settings_without_effect(section: type = RunConfig, prefix: str = "") -> frozenset[str]:
    """Dotted names of the settings that say how a run is carried out and do not change results: `WITHOUT_EFFECT`."""
    found = set()
    for setting in dataclasses.fields(section):
        if setting.metadata.get("without_effect"):
            found.add(prefix + setting.name)
        elif dataclasses.is_dataclass(inner := setting.default_factory):
            found |= settings_without_effect(inner, f"{prefix}{setting.name}.")
    return frozenset(found)


def settings_with_effect(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings of a run, nested, without those that have no effect on its results."""
    left_out = settings_without_effect()
    return {
        name: settings_with_effect(value, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in settings.items()
        if prefix + name not in left_out
    }


def import_zoo() -> None:
    """Import every algorithm file, so that its decorator has run."""
    for module in pkgutil.iter_modules(algorithms.__path__):
        if not module.ispkg and module.name not in algorithms.COMMANDS:
            importlib.import_module(f"algorithms.{module.name}")


def register_schemas() -> None:
    """Tell Hydra about the configuration. Call this before Hydra composes.

    If a YAML file of `conf/` has the same name as a part, the file counts and binds to `schema/<group>/<name>`.
    """
    import_zoo()
    store = ConfigStore.instance()
    store.store("run_schema", RunConfig)
    evaluate_schema = OmegaConf.structured(EvaluateConfig)
    for group in ("rollout", "learner", *_DEFAULT_PARTS):
        OmegaConf.set_struct(evaluate_schema[group], False)  # single settings that change those of the checkpoint
    store.store("evaluate_schema", evaluate_schema)
    ask_schema = OmegaConf.structured(AskConfig)
    for group in ("env", "dataset", "retriever", "rollout", "learner"):
        OmegaConf.set_struct(ask_schema[group], False)
    store.store("ask_schema", ask_schema)
    store.store("model", ModelConfig, group="schema/model")
    for name, settings in presets.options().items():
        store.store(name, settings, group="schema/preset", package="_global_")
    registries: tuple[Registry, ...] = (ALGORITHMS, ENVS, RETRIEVERS, DATASETS, REWARDS)
    for registry in registries:
        for name in registry.names():
            schema = named_config(registry, name)
            store.store(name, schema, group=f"schema/{registry.group}")
            store.store(name, _selectable(registry, name, schema), group=registry.group)


def named_config(registry: Registry, name: str) -> type:
    """Make a dataclass of a registered part's settings, with a `name` field in front."""
    config = registry.get(name).config
    return dataclasses.make_dataclass(
        config.__name__ if config else f"{name.title()}Config",
        [("name", str, field(default=name, kw_only=True))],
        bases=(config,) if config else (),
        namespace={"__post_init__": lambda self: None},
    )


def _selectable(registry: Registry, name: str, schema: type) -> Any:
    """Make a config-group option.

    The option of an algorithm composes the warm start in place, so that its settings are typed too. The algorithm takes
    what the chosen `stages` say of it, wherever it stands in a chain.
    """
    if registry is not ALGORITHMS:
        return schema
    parts: list[dict[str, str | None]] = [{f"/schema/{registry.group}@_here_": name}]
    for setting in dataclasses.fields(schema):
        if setting.name == "warm_start":
            make = setting.default_factory
            start = None if make is dataclasses.MISSING else make()["name"]
            parts.append({f"/{registry.group}@warm_start": start})
    return {"defaults": [*parts, {"optional /stages@_here_": f"${{stages}}/{name}"}]}


_CHOSEN_START = re.compile(r"\+{0,2}(?:algo@)?(algo(?:\.warm_start)+)=(?!(?:[^{]*,)?null(?:,|$)|\{)")


def by_group(override: str) -> str:
    """Turn `algo.warm_start=kd` into Hydra's choice of an option, so that it is composed like any other algorithm.

    Without this it would be only a name, and the algorithm would keep its defaults whatever `stages` says of it.
    """
    return _CHOSEN_START.sub(r"algo@\1=", override)
