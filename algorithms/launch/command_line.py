"""Prepares a command line for Hydra: help, "did you mean", and settings of algorithms that are chosen later."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import did_you_mean

#: Groups whose settings depend on the chosen name.
PARTS = ("algo", "env", "dataset", "retriever", "reward")
_HELP = ("--help", "-h")
_MULTIRUN = ("--multirun", "-m")
_SETTING = re.compile(rf"(?:{'|'.join(PARTS)})\.[\w.]+=")


def prepare(config_name: str) -> None:
    """Answer `--help`, refuse what does not compose, and let Hydra accept settings of a part that is chosen later.

    Args:
        config_name: The command's configuration, in `conf/`.

    Raises:
        ConfigurationError: A name is unknown; the message suggests one.
        SystemExit: The help was printed.
    """
    given = sys.argv[1:]
    if any(word in _HELP for word in given):
        print(help_page(config_name, [word for word in given if not word.startswith("-")]))
        raise SystemExit(0)
    if any(word in _MULTIRUN for word in given) or any(word.startswith("resume=") for word in given):
        # A job, or the run to resume, may have another algorithm than this command line's default.
        sys.argv[1:] = [f"++{word}" if _SETTING.match(word) else word for word in given]
    elif all("=" in word or word[0] == "~" for word in given):
        composed(config_name, given)


def composed(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose the configuration of a command line.

    Raises:
        ConfigurationError: A name in it is unknown.
    """
    try:
        with initialize_config_module("conf", version_base="1.3"):
            return compose(config_name, list(overrides), return_hydra_config=True)
    except (ConfigCompositionException, MissingConfigException, ValueError) as error:  # the last for `dataset=null`
        if (message := explanation(error)) is None:
            message = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise ConfigurationError(message) from error


def explanation(error: Exception) -> str | None:
    """Say which name is unknown and which one may be meant; None for every other error of composition."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"Unknown {group} {name!r}.{did_you_mean(name, error.options)}"
    cause = error.__cause__
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and OmegaConf.is_dict(cause.parent_node):
        known = [str(name) for name in cause.parent_node if name != "hydra"]
        return f"There is no setting {cause.full_key}.{did_you_mean(str(cause.key), known)}"
    return None


# --- help ------------------------------------------------------------------------------------------------------------


def help_page(config_name: str, words: Sequence[str]) -> str:
    """Describe every setting with its default and meaning, or only the settings that words without `=` name.

    Args:
        config_name: The command's configuration, in `conf/`.
        words: Overrides choose the parts to describe; other words name settings or sections.
    """
    config = composed(config_name, [word for word in words if "=" in word])
    asked = [word for word in words if "=" not in word]
    lines = list(_described(config))
    if asked:
        found = [line for key, line in lines if any(key == word or key.startswith(f"{word}.") for word in asked)]
        if not found:
            hint = did_you_mean(asked[0], [key for key, _ in lines])
            raise ConfigurationError(f"There is no setting {asked[0]}.{hint}")
        return "\n".join(found)
    texts, repo = config.hydra.help, ConfigStore.instance().repo
    names = {group: sorted(name.removesuffix(".yaml") for name in repo[group]) for group in PARTS}
    page = [texts.header, "", texts.template.strip(), "", "Parts to choose from (group=name)"]
    page += [f"  {group}: {', '.join(names[group])}" for group in PARTS]
    page += ["", "Settings (name=value)", *(line for _, line in lines), "", texts.footer.strip()]
    return "\n".join(page)


def _described(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    meanings = attributes_of(OmegaConf.get_type(config) or dict)
    values: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, [name for name in config if name != "hydra"]))
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _described(config[name], f"{key}.")
        elif name != "name":
            shown = "null" if value is None else value
            yield key, f"  {key}={shown}" + (f"  # {meanings[name]}" if name in meanings else "")


def attributes_of(kind: type) -> dict[str, str]:
    """Read the Attributes sections of a class and of its bases: one line for each name."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        section = (base.__doc__ or "").partition("Attributes:\n")[2]
        for names, text in re.findall(r"^ {4,8}(\w+(?:, \w+)*): ((?:.+\n?)(?: {9,}.+\n?)*)", section, re.MULTILINE):
            found.update(dict.fromkeys(names.split(", "), " ".join(text.split())))
    return found
