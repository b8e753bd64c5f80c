"""Says in a user's words what OmegaConf, or Hydra with it, found wrong with a setting."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from agentic_rag_env.registry import did_you_mean


def told(error: Exception) -> str:
    """What a user is told of an error; one that is not known here keeps its own words, in one line."""
    return unknown_setting(error) or _wanted(error) or " ".join(f"{error} {error.__cause__ or ''}".split())


def unknown_setting(error: Exception) -> str | None:
    """Say which setting is unknown and which one may be meant; None for every other error."""
    cause = _cause(error)
    if not isinstance(cause, (ConfigKeyError, ConfigAttributeError)) or not OmegaConf.is_dict(cause.parent_node):
        return None
    known = [str(name) for name in cause.parent_node if name != "hydra"]
    if "warm_start" in known and _has(cause.parent_node.warm_start, cause.key):
        place, _, name = str(cause.full_key).rpartition(".")
        return f"There is no setting {cause.full_key}, but the stage before has it: {place}.warm_start.{name}."
    return f"There is no setting {cause.full_key}.{did_you_mean(str(cause.key), known)}"


def _wanted(error: Exception) -> str | None:
    """Say what a setting wants, if the error is a value of another type; None for every other error."""
    cause = _cause(error)
    if not isinstance(cause, ValidationError) or not cause.full_key:
        return None
    name, value = cause.full_key, cause.value
    if "is not a ListConfig" in str(cause):
        if str(value).startswith("["):
            return f"{name} is a list: leave out the inner quotes, {name}={value}."
        return f"{name} is a list: write {name}=[{value}]."
    if "is not Optional" in str(cause):
        if OmegaConf.is_dict(cause.parent_node) and OmegaConf.is_list(cause.parent_node.get(cause.key)):
            return f"{name} is a list, which can't be null: write {name}=[] for none."
        return f"{name} can't be null; leave it out for its default."
    for kind, wanted in (("Integer", "a whole number"), ("Float", "a number")):
        if f"could not be converted to {kind}" in str(cause):
            return f"{name} must be {wanted}, got {value!r}."
    return None


def _cause(error: Exception) -> BaseException | None:
    return error if isinstance(error, OmegaConfBaseException) else error.__cause__


def _has(section: Any, key: Any) -> bool:
    return OmegaConf.is_dict(section) and key in section
