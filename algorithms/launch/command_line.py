"""Prepares a command line for Hydra: help, "did you mean", and settings of algorithms that are chosen later."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import did_you_mean
from agentic_rag_env.settings import meanings_of
from algorithms.training.compose import PARTS, composed
from algorithms.training.loggers import LOGGERS

_WIDTH = 118
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
    elif all("=" in word or word.startswith("~") for word in given):
        composed(config_name, given)


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
    page += [f"  {group}: {', '.join(names[group])}" for group in PARTS if group in config]
    page += [f"  logger: {', '.join(LOGGERS.names())}; several as logger=[jsonl,wandb]"] if "logger" in config else []
    page += ["", "Settings (name=value)", *(line for _, line in lines), "", texts.footer.strip()]
    return "\n".join(page)


def _described(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    meanings = meanings_of(OmegaConf.get_type(config) or dict)
    values: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, [name for name in config if name != "hydra"]))
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            yield from _described(config[name], f"{key}.")
        elif name != "name":
            shown = "null" if value is None else value
            meaning = f"  # {meanings[name]}" if name in meanings else ""
            yield key, textwrap.fill(f"  {key}={shown}{meaning}", _WIDTH, subsequent_indent="      # ")
