"""The shape of every configuration, known to Hydra under `schema/`.

Each part that has a registry gets a `name` field and becomes selectable by that name, plug-ins included, without a
YAML file.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from dataclasses import field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import algorithms
from agentic_rag_env.registry import DATASETS, ENVS, RETRIEVERS, REWARDS, Registry
from agentic_rag_env.vector import brings_questions
from algorithms.learner.algorithm import ALGORITHMS
from algorithms.training import presets
from algorithms.training.settings import QUESTION_PARTS, AskConfig, EvaluateConfig, ModelConfig, RunConfig


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
    # Their sections are mappings, for single settings that change those of the checkpoint.
    store.store("evaluate_schema", _with_free_mappings(EvaluateConfig))
    store.store("ask_schema", _with_free_mappings(AskConfig))
    store.store("model", ModelConfig, group="schema/model")
    store.store("of_model", {}, group="preset", package="_global_")  # the choice; without it, presets count for nothing
    for name, settings in presets.of_runs().items():
        store.store(f"of_model-{name}", settings, group="schema/preset", package="_global_")
    for name, settings in presets.of_algorithms().items():
        store.store(f"of_model-{name}", settings, group="schema/preset_of_algorithm")
    registries: tuple[Registry, ...] = (ALGORITHMS, ENVS, RETRIEVERS, DATASETS, REWARDS)
    for registry in registries:
        for name in registry.names():
            schema = named_config(registry, name)
            store.store(name, _with_free_mappings(schema), group=f"schema/{registry.group}")
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


def _with_free_mappings(schema: type) -> Any:
    """Let settings that are mappings take any key: they are arguments of something that is not known yet."""
    settings = OmegaConf.structured(schema)
    for name in settings:
        if not OmegaConf.is_missing(settings, name) and OmegaConf.get_type(settings, name) is dict:
            OmegaConf.set_struct(settings[name], False)
    return settings


def _selectable(registry: Registry, name: str, schema: type) -> Any:
    """Make a config-group option.

    The option of an algorithm composes the warm start in place, so that its settings are typed too. The algorithm takes
    what the model's preset and then the chosen `stages` say of it, wherever it stands in a chain. The option of an
    environment that brings its own questions leaves out the default dataset, retriever and reward.
    """
    if registry is ENVS and brings_questions({"name": name}):
        left_out = [{f"override /{group}@_global_.{group}": None} for group in QUESTION_PARTS]
        return {"defaults": [{f"/schema/{registry.group}@_here_": name}, *left_out]}
    if registry is not ALGORITHMS:
        return schema
    parts: list[dict[str, str | None]] = [{f"/schema/{registry.group}@_here_": name}]
    for setting in dataclasses.fields(schema):
        if setting.name == "warm_start":
            make = setting.default_factory
            start = None if make is dataclasses.MISSING else make()["name"]
            parts.append({f"/{registry.group}@warm_start": start})
    parts.append({"optional /schema/preset_of_algorithm@_here_": f"${{preset}}-${{model}}-{name}"})
    return {"defaults": [*parts, {"optional /stages@_here_": f"${{stages}}/{name}"}]}


_CHOSEN_START = re.compile(r"\+{0,2}(?:algo@)?(algo(?:\.warm_start)+)=(?!(?:[^{]*,)?null(?:,|$)|\{)")


def by_group(override: str) -> str:
    """Turn `algo.warm_start=kd` into Hydra's choice of an option, so that it is composed like any other algorithm.

    Without this it would be only a name, and the algorithm would keep its defaults whatever `stages` says of it.
    """
    return _CHOSEN_START.sub(r"algo@\1=", override)
