"""From a composed configuration, or what a command line gives, to typed settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import DATASETS, ENVS, RETRIEVERS, REWARDS, did_you_mean
from agentic_rag_env.vector import brings_questions
from algorithms.assets import ASSETS
from algorithms.learner.algorithm import ALGORITHMS
from algorithms.learner.config import DemonstrationConfig, LearnerConfig, LoraConfig
from algorithms.rollout.config import RolloutConfig
from algorithms.training.hardware import HardwareConfig
from algorithms.training.run_files import require_named
from algorithms.training.schemas import named_settings
from algorithms.training.setting_errors import told
from algorithms.training.settings import (
    DEFAULT_PARTS,
    QUESTION_PARTS,
    DemonstrationsConfig,
    EvaluateConfig,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    ScoringConfig,
)


def ask_config(given: dict[str, Any], model: str, of_run: dict[str, Any]) -> RunConfig:
    """Make the settings of a conversation, in the form of a run's; see `evaluate_config`.

    Args:
        given: Settings from the command line, shaped like `AskConfig`, without checkpoint and question.
        model: Folder or hub id of the model.
        of_run: Settings of the run that it comes from; empty if there is none.
    """
    evaluation = OmegaConf.to_container(OmegaConf.structured(EvaluateConfig))
    assert isinstance(evaluation, dict)
    # Each episode is one question; where its search fails, the verdict says so, and the next question can be asked.
    settings: Any = {**evaluation, **given, "num_envs": 1, "probes": [], "max_retriever_error_fraction": 1.0}
    settings["rollout"] = {"temperature": 0.0, **given["rollout"]}
    config = evaluate_config(settings, model, of_run)
    if brings_questions(config.env):
        raise ConfigurationError(
            f"env={config.env['name']} brings its own questions, so it can't be asked one of yours; see what the agent "
            "does there by python -m algorithms.evaluate and python -m algorithms.show."
        )
    return config


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
    left_out: dict[str, Any] = {}
    schemas: dict[str, Any] = {"rollout": RolloutConfig, "learner": LearnerConfig, "evaluation": ScoringConfig}
    of_run = {**of_run, "evaluation": _scoring(of_run)}
    if "name" in given["dataset"]:  # how many questions the run took, and how, says nothing of other data
        of_run = {name: value for name, value in of_run.items() if name not in ("evaluation", "num_envs")}
    specs = {section: {**of_run.get(section, {}), **given[section]} for section in schemas}
    num_envs = of_run.get("num_envs", RunConfig.num_envs) if given["num_envs"] is None else given["num_envs"]
    used: dict[str, Any] = {}
    for group, default in DEFAULT_PARTS.items():
        chosen = given[group]
        if group in QUESTION_PARTS and brings_questions(specs["env"]):
            left_out[group] = chosen or None
            continue
        saved = {} if "name" in chosen else {**(of_run.get(group) or {"name": default})}
        specs[group] = {**saved, **chosen}
        used[group] = {name: value for name, value in saved.items() if name not in chosen}
        schemas[group] = named_settings(registries[group], specs[group]["name"])
    if "env" not in of_run and Path(model).parent != ASSETS and specs["env"]["name"] == DEFAULT_PARTS["env"]:
        specs["env"] = {"prompt": "search_r1", **specs["env"]}  # others know no protocol unasked
    require_named(used, given.get("allow", ()), "the run directory")
    try:
        typed = OmegaConf.merge({group: OmegaConf.structured(schema) for group, schema in schemas.items()}, specs)
        parts = plain(typed)
    except OmegaConfBaseException as error:
        raise ConfigurationError(told(error)) from error
    return RunConfig(
        algo=None,
        model=ModelConfig(policy=model, teacher=None),
        rollout=RolloutConfig(**parts.pop("rollout")),
        learner=LearnerConfig(**parts.pop("learner")),
        evaluation=EvaluationConfig(**parts.pop("evaluation")),
        num_envs=num_envs,
        **{name: given[name] for name in ("max_retriever_error_fraction", "probes", "threads", "cache_dir")},
        **left_out,
        **parts,
    )


def _scoring(of_run: Mapping[str, Any]) -> dict[str, Any]:
    """How a run measures at its end, without what it does on the way."""
    known = [setting.name for setting in dataclasses.fields(ScoringConfig)]
    return {name: value for name, value in of_run.get("evaluation", {}).items() if name in known}


def run_config(composed: DictConfig) -> RunConfig:
    """Turn a composed configuration into typed settings. The parts with a registry stay mappings with a `name`.

    Raises:
        ConfigurationError: A value can't work, is missing or unknown.
    """
    settings = plain(composed)
    # The run may be older than these settings.
    settings = {"demonstrations": {"num": None}, "hardware": vars(HardwareConfig()), "preflight": False, **settings}
    settings.setdefault("logger", RunConfig().logger)
    if "model" in settings:
        settings["model"] = {
            "teacher_dtype": ModelConfig.teacher_dtype,
            "lora": vars(LoraConfig()),
            **settings["model"],
        }
    _check_names(RunConfig, "", settings)
    for setting in dataclasses.fields(RunConfig):
        name, section = setting.name, setting.default_factory
        if isinstance(section, type) and dataclasses.is_dataclass(section):
            _check_names(section, f"{name}.", settings[name])
            if section is ModelConfig:
                _check_names(LoraConfig, "model.lora.", settings[name]["lora"])
                settings[name]["lora"] = LoraConfig(**settings[name]["lora"])
            settings[name] = section(**settings[name])
    if (count := settings["demonstrations"].num) is not None:
        settings["algo"] = _with_demonstrations(settings["algo"], count)
        settings["demonstrations"] = DemonstrationsConfig()
    return RunConfig(**settings)


def _with_demonstrations(spec: Any, count: int) -> dict[str, Any]:
    """Set in an algorithm's settings how many demonstrations each stage that trains on them collects.

    Raises:
        ConfigurationError: No stage trains on demonstrations, or one has another `demonstrations.num` of its own.
    """
    first: dict[str, Any] = {"warm_start": spec}
    place, found = first, False
    while place.get("warm_start") is not None:
        start = place["warm_start"]
        place["warm_start"] = start = {"name": start} if isinstance(start, str) else dict(start)
        kind = ALGORITHMS.get(start["name"]).config
        if kind is not None and issubclass(kind, DemonstrationConfig):
            if (own := (start.get("demonstrations") or {}).get("num")) not in (None, count):
                raise ConfigurationError(
                    f"demonstrations.num={count} is for every stage, and {start['name']} has demonstrations.num={own} "
                    "of its own; set one of them."
                )
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


def typed(section: type, settings: Any) -> Any:
    """Make a dataclass of settings from plain data.

    Raises:
        ConfigurationError: A setting is unknown, has another type, or can't work.
    """
    try:
        return section(**plain(OmegaConf.merge(OmegaConf.structured(section), settings)))
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigurationError(told(error)) from error


def plain(composed: Any) -> dict[str, Any]:
    """Turn a configuration into plain data, if nothing in it is missing."""
    try:
        settings: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigurationError(f"{error.full_key} has no default and must be set: {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigurationError(told(error)) from error
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
