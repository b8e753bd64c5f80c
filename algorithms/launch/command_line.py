"""Prepares a command line for Hydra: help, "did you mean", and settings of algorithms that are chosen later."""

from __future__ import annotations

import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from importlib import resources
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
_PRINT = {"--cfg", "-c"}
#: Groups of files that choose among whole sets of settings.
_SETS = ("model", "method", "experiment", "scale")
#: Groups whose choice comes with a checkpoint.
_OF_TRAINING = ("algo", "stages", *_SETS)
_SETTING = re.compile(rf"(?:{'|'.join(PARTS)})\.[\w.]+=")


def prepare(config_name: str) -> None:
    """Answer `--help`, refuse what does not compose, and let Hydra accept settings of a part that is chosen later.

    Args:
        config_name: The command's configuration, in `conf/`.

    Raises:
        ConfigurationError: A name is unknown, or a word is no setting; the message suggests what to write.
        SystemExit: The help was printed.
    """
    given = sys.argv[1:]
    if any(word in _HELP for word in given):
        print(help_page(config_name, [word for word in given if not word.startswith("-")]))
        raise SystemExit(0)
    # `--cfg job` prints what is composed, and a typo in it deserves the same answer.
    words = [word for before, word in zip(["", *given], given, strict=False) if not {before, word} & _PRINT]
    words = [word for word in words if word not in _MULTIRUN]
    has_flags = any(word.startswith("-") for word in words)  # of Hydra, with words of their own
    if not has_flags:
        _require_settings(config_name, words)
    if any(word in _MULTIRUN for word in given) or any(word.startswith("resume=") for word in given):
        # A job, or the run to resume, may have another algorithm than this command line's default.
        sys.argv[1:] = [f"++{word}" if _SETTING.match(word) else word for word in given]
    elif not has_flags:
        composed(config_name, words)


def _require_settings(config_name: str, words: Sequence[str]) -> None:
    """Refuse words that are no settings, and settings of training where a checkpoint brings them."""
    takes_checkpoint = config_name != "config"
    for word in words:
        if "=" not in word and not word.startswith("~"):
            is_checkpoint = takes_checkpoint and not any(other.startswith("checkpoint=") for other in words)
            written = f"checkpoint={shlex.quote(word)}" if is_checkpoint else "name=value"
            raise ConfigurationError(f"{word!r} has no '='; write {written}.")
        name = re.split(r"[.@=]", word.lstrip("+~"))[0]
        if takes_checkpoint and name in _OF_TRAINING:
            known = ", ".join(sorted(str(key) for key in composed(config_name, []) if key != "hydra"))
            raise ConfigurationError(f"{name} can't be given, as the checkpoint brings it. What can be given: {known}.")


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
    texts = config.hydra.help
    page = [texts.header, "", texts.template.strip(), "", "Parts to choose from (group=name)"]
    page += [_choices(group) for group in PARTS if group in config]
    page += [f"  logger: {', '.join(LOGGERS.names())}; several as logger=[jsonl,wandb]"] if "logger" in config else []
    if "model" in config:
        page += ["", "Sets of settings (model=name, +method=name, +experiment=name, +scale=name)"]
        page += [_choices(group) for group in _SETS]
    page += ["", "Settings (name=value)", *(line for _, line in lines), "", texts.footer.strip()]
    return "\n".join(page)


def _choices(group: str) -> str:
    """The names to choose from in a group, of the registries and of the files in `conf/`."""
    folder = resources.files("conf").joinpath(group)
    files = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    registered = ConfigStore.instance().repo.get(group, ())
    names = sorted({name.removesuffix(".yaml") for name in (*files, *registered) if name.endswith(".yaml")})
    return textwrap.fill(f"  {group}: {', '.join(names)}", _WIDTH, subsequent_indent="      ")


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
