"""The shape of every configuration, known to Hydra under `schema/`.

Each part that has a registry gets a `name` field and becomes selectable by that name, plug-ins included, without a
YAML file.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import algorithms
from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import DATASETS, ENVS, RETRIEVERS, REWARDS, Registry
from agentic_rag_env.terminal import print_line
from agentic_rag_env.vector import brings_questions
from algorithms.learner.algorithm import ALGORITHMS, AlgorithmConfig
from algorithms.training import presets
from algorithms.training.settings import QUESTION_PARTS, AskConfig, EvaluateConfig, ModelConfig, RunConfig

#: Sets of settings by algorithm, one folder a set and one file an algorithm.
STAGES = Path(__file__).parents[2] / "conf" / "stages"


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
    for stages, name, parent in _heirs():
        store.store(name, {"defaults": [f"/stages/{stages}/{parent}@_here_"]}, group=f"stages/{stages}")
    registries: tuple[Registry, ...] = (ALGORITHMS, ENVS, RETRIEVERS, DATASETS, REWARDS)
    for registry in registries:
        for name in registry.names():
            settings = named_settings(registry, name)
            store.store(name, _with_free_mappings(settings), group=f"schema/{registry.group}")
            store.store(name, _selectable(registry, name, settings), group=registry.group)


def named_settings(registry: Registry, name: str) -> Any:
    """Make the typed settings of a registered part with their defaults, and a `name` in front.

    Raises:
        ConfigurationError: A setting has a type or a default that a command line can't hold.
    """
    config = registry.get(name).config
    schema = dataclasses.make_dataclass(
        config.__name__ if config else f"{name.title()}Config",
        [("name", str, field(default=name, kw_only=True))],
        bases=(config,) if config else (),
        namespace={"__post_init__": lambda self: None},
        frozen=config is not None and config.__dataclass_params__.frozen,  # type: ignore[attr-defined]
    )
    try:
        settings = OmegaConf.structured(schema)
    except OmegaConfBaseException as error:
        place = getattr(config, "__module__", None)  # that of a single file is its path
        raise ConfigurationError(f"{registry.group} {name!r} ({place}): the setting {_reason(error)}") from error
    OmegaConf.set_readonly(settings, None)  # a frozen dataclass would take no values from the command line
    return settings


def _reason(error: OmegaConfBaseException) -> str:
    """Which setting can't be one of a command line, and why."""
    what = str(error).partition("\n")[0].rstrip(".")
    kind = what.removeprefix("Unexpected type annotation: ")
    if kind == what:
        return f"{error.full_key} can't be one of a command line: {what}."
    return (
        f"{error.full_key} has the type {kind}, which a command line can't hold; use str, a number, or a list or "
        "mapping of them, and one_of in __post_init__."
    )


def _with_free_mappings(schema: Any) -> Any:
    """Let settings that are mappings take any key: they are arguments of something that is not known yet."""
    settings = OmegaConf.structured(schema)
    for name in settings:
        if not OmegaConf.is_missing(settings, name) and OmegaConf.get_type(settings, name) is dict:
            OmegaConf.set_struct(settings[name], False)
    return settings


def _selectable(registry: Registry, name: str, settings: Any) -> Any:
    """Make a config-group option.

    The option of an algorithm composes the warm start in place, so that its settings are typed too. The algorithm takes
    what the model's preset and then the chosen `stages` say of it, wherever it stands in a chain. The option of an
    environment that brings its own questions leaves out the default dataset, retriever and reward.
    """
    if registry is ENVS and brings_questions({"name": name}):
        left_out = [{f"override /{group}@_global_.{group}": None} for group in QUESTION_PARTS]
        return {"defaults": [{f"/schema/{registry.group}@_here_": name}, *left_out]}
    if registry is not ALGORITHMS:
        return settings
    parts: list[dict[str, str | None]] = [{f"/schema/{registry.group}@_here_": name}]
    for setting in registry.get(name).settings.values():
        if setting.name == "warm_start":
            make = setting.default_factory
            start = None if make is dataclasses.MISSING else make()["name"]
            parts.append({f"/{registry.group}@warm_start": start})
    parts.append({"optional /schema/preset_of_algorithm@_here_": f"${{preset}}-${{model}}-{name}"})
    return {"defaults": [*parts, {"optional /stages@_here_": f"${{stages}}/{name}"}]}


def _heirs() -> Iterator[tuple[str, str, str]]:
    """Yield a set of stages, a plug-in's algorithm, and the one whose file it takes there: the nearest that it extends.

    An algorithm that has a file in any set is none of a plug-in: it composes as its files say.
    """
    files = _stage_files()
    entries = {name: ALGORITHMS.get(name) for name in ALGORITHMS.names()}
    for name, entry in entries.items():
        if any(name in known for known in files.values()):
            continue
        factories, configs = (getattr(each, "__mro__", ()) for each in (entry.factory, entry.config))
        parents = [
            parent
            for factory in factories
            for parent, other in entries.items()
            if other.factory is factory and other.config in configs
        ]
        for stages, known in files.items():
            if nearest := next((parent for parent in parents if parent in known), None):
                yield stages, name, nearest


def _stage_files() -> dict[str, set[str]]:
    """The algorithms that have a file, by set of stages."""
    return {
        folder.name: {file.stem for file in folder.glob("*.yaml")} for folder in STAGES.iterdir() if folder.is_dir()
    }


def tell_without_stages(config: DictConfig, choices: Mapping[str, Any]) -> None:
    """Print a line for each algorithm of a new run of which the chosen `stages` say nothing.

    Args:
        config: A composed configuration.
        choices: The options that Hydra chose, by group.
    """
    chosen = choices.get("stages")
    files = _stage_files()
    if config.resume is not None or chosen not in files:
        return
    known = files[chosen] | {name for stages, name, _ in _heirs() if stages == chosen}
    place, stage = "algo", config.algo
    while OmegaConf.is_dict(stage) and "name" in stage:
        settings = ALGORITHMS.get(stage.name).config
        if stage.name not in known and settings and issubclass(settings, AlgorithmConfig):
            print_line(
                f"stages={chosen} says nothing of {place}={stage.name}, nor of an algorithm whose settings it extends: "
                f"it keeps its own. Give those that a real model needs, such as {place}.optimizer.learning_rate=1e-6."
            )
        place, stage = f"{place}.warm_start", stage.get("warm_start")


_CHOSEN_START = re.compile(r"\+{0,2}(?:algo@)?(algo(?:\.warm_start)+)=(?!(?:[^{]*,)?null(?:,|$)|\{)")


def by_group(override: str) -> str:
    """Turn `algo.warm_start=kd` into Hydra's choice of an option, so that it is composed like any other algorithm.

    Without this it would be only a name, and the algorithm would keep its defaults whatever `stages` says of it.
    """
    return _CHOSEN_START.sub(r"algo@\1=", override)
