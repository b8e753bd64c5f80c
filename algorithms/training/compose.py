"""Composes the configuration of a run: for a command line from its overrides, for Python from values."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import did_you_mean
from algorithms.training.protocol import names_of, with_protocol
from algorithms.training.run_files import flat, plain_data
from algorithms.training.schemas import register_schemas, tell_without_stages
from algorithms.training.setting_errors import told, unknown_setting
from algorithms.training.settings import RunConfig, settings_with_effect
from algorithms.training.typed import run_config

#: Groups whose settings depend on the chosen name.
PARTS = ("algo", "env", "dataset", "retriever", "reward")
#: What Hydra says of a choice without `+` in a group of which nothing is chosen by default.
_ADDED = re.compile(r"Could not override '(?P<group>.*)'\. No match in the defaults list\.\n.* use (?P<choice>\+.*)")


def configure(**values: Any) -> RunConfig:
    """Make the settings of a run. What is not given is as on the command line.

    Args:
        **values: The fields of `RunConfig`, and the groups of `conf/` (`method`, `experiment`, `stages`, `scale`). A
            part (`algo`, `env`, `dataset`, `retriever`, `reward`, `model`) is a name, or a mapping with `name` and
            settings; without `name` the settings are those of the default part. Other sections are mappings too:
            `configure(algo={"name": "dgpo", "steps": 50, "warm_start": {"epochs": 10}}, evaluation={"every": 10})`.

    Returns:
        The settings, complete. Sections are dataclasses, parts are mappings.

    Raises:
        ConfigurationError: A name or a setting is unknown, or a value can't work; the message suggests what to write.
    """
    config, said = composed_values(values), list(_said(plain_data(values)))
    require_one_number(config, said)
    return run_config(with_protocol(config, said))


def complete(config: RunConfig) -> RunConfig:
    """Fill in what settings made by hand leave out, and check the rest. Settings that are complete stay as they are.

    Raises:
        ConfigurationError: As for `configure`.
    """
    default = RunConfig()
    given = {name: value for name, value in vars(config).items() if value != getattr(default, name)}
    # An environment that brings its questions leaves these parts out by itself.
    values = {name: value for name, value in given.items() if value is not None or name not in PARTS}
    return run_config(with_protocol(composed_values(values), list(_said(plain_data(values)))))


def overrides_of(config: RunConfig) -> list[str]:
    """What complete settings choose, as overrides `name=value`: the parts, and settings that are not their defaults."""
    names = {group: _only_names(spec) for group in PARTS if (spec := getattr(config, group)) and "name" in spec}
    settings = settings_with_effect(plain_data(config))
    try:
        default = configure(**names)
    except ConfigurationError:  # a part has settings without defaults, such as an address
        default = RunConfig()
    changed = _changed(settings, plain_data(default))
    return [f"{name}={value}" for name, value in (_said(names) | _said(changed)).items()]


def require_one_number(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse two numbers of demonstrations for one stage. One that a preset or `stages` brings gives way to the user's.

    Args:
        config: A composed configuration.
        overrides: What the user said: the command line, or the names of the settings that a program gave.

    Raises:
        ConfigurationError: The user gave two numbers, and they differ.
    """
    said = names_of(overrides)
    for name in (each for each in said if each.endswith(".demonstrations.num")):
        other = name.removesuffix("demonstrations.num") + "num_demonstrations"
        number, count = (OmegaConf.select(config, each) for each in (name, other))
        if other in said and number not in (None, count):
            raise ConfigurationError(f"{other}={count} and {name}={number} say different things; set one of them.")


def composed_values(values: Mapping[str, Any]) -> DictConfig:
    """Compose values as a command line's overrides are composed. See `configure`."""
    register_schemas()
    known = {setting.name for setting in dataclasses.fields(RunConfig)}
    choices: list[str] = []
    given: dict[str, Any] = {}
    for group, value in values.items():
        value = plain_data(value)
        is_group = group in (*PARTS, "model") or (group not in known and isinstance(value, str))
        if group in (*PARTS, "model") and not isinstance(value, (str, dict)):
            raise ConfigurationError(
                f"{group} must be a name, or a mapping with 'name' and settings, got a {type(value).__name__}. The "
                "settings of a run are kept in its folder, so an object needs a name: see algorithms/README.md."
            )
        spec = {"name": value} if isinstance(value, str) and is_group else value
        if is_group and isinstance(spec, dict):
            plus = "" if group in known or group == "stages" else "+"
            choices += [plus + choice for choice in _choices(group, spec)]
            spec = _without_names(spec)
        if spec != {}:
            given[group] = spec
    # The launcher of multiruns is no matter here, and Hydra knows it only where the commands are loaded.
    config = composed("config", [*choices, "hydra/launcher=basic"])
    tell_without_stages(config, config.hydra.runtime.choices)
    OmegaConf.set_struct(config, False)  # sections of any keys, such as `dataset.sources`, stay so; others are typed
    del config["hydra"]
    try:
        merged = OmegaConf.merge(config, given)
    except OmegaConfBaseException as error:
        raise ConfigurationError(_told(error)) from error
    assert isinstance(merged, DictConfig)
    return merged


def composed(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration of a command line.

    Raises:
        ConfigurationError: A name in it is unknown, a value has another type than its setting, or an override can't be
            read.
    """
    hydra = GlobalHydra.instance()
    before, hydra.hydra = hydra.hydra, None  # of a program that uses Hydra itself
    try:
        with initialize_config_module("conf", version_base="1.3"):
            return compose(config_name, list(overrides), return_hydra_config=True)
    # `ValueError` for `dataset=null`.
    except (ConfigCompositionException, MissingConfigException, OverrideParseException, ValueError) as error:
        raise ConfigurationError(_told(error)) from error
    finally:
        GlobalHydra.instance().hydra = before


def explanation(error: Exception) -> str | None:
    """Say which name is unknown and which one may be meant; None for every other error of composition."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        # Hydra also reports a name that it knows and can't find.
        return None if name in error.options else f"Unknown {group} {name!r}.{did_you_mean(name, error.options)}"
    return unknown_setting(error)


def _told(error: Exception) -> str:
    """What a user is told of an error of composition."""
    if isinstance(error, OverrideParseException):
        return f"{error.override} can't be read: {str(error).partition(chr(10))[0]}."
    if added := _ADDED.search(str(error)):
        return f"No {added['group']} is chosen by default. Write {added['choice']}."
    return explanation(error) or told(error)


# --- values of Python ------------------------------------------------------------------------------------------------


def _choices(group: str, spec: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Choices of options, as overrides: of a part, and of the algorithms that it starts from."""
    if isinstance(name := spec.get("name"), str):
        yield f"{group}@{place}={name}" if place else f"{group}={name}"
    start = spec.get("warm_start")
    if group == "algo" and isinstance(start, (str, Mapping)):
        yield from _choices(group, {"name": start} if isinstance(start, str) else start, f"{place or group}.warm_start")


def _without_names(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a part without the names that were choices."""
    rest = {name: value for name, value in spec.items() if name != "name"}
    if isinstance(start := rest.get("warm_start"), (str, Mapping)):
        rest["warm_start"] = {} if isinstance(start, str) else _without_names(start)
    return rest


def _only_names(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A part's name, and the names of the algorithms that it starts from."""
    start = spec.get("warm_start", ...)
    chain = {} if start is ... else {"warm_start": _only_names(start) if isinstance(start, Mapping) else start}
    return {"name": spec["name"], **chain}


def _changed(settings: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """The part of nested settings that differs from the default."""
    return {
        name: _changed(value, default[name])
        if isinstance(value, dict) and isinstance(default.get(name), dict)
        else value
        for name, value in settings.items()
        if name not in default or value != default[name]
    }


def _said(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the names that a command line has for them: that of a part is its group."""
    return {name.removesuffix(".name"): value for name, value in flat(nested).items()}
