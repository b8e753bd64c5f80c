"""`agent.json`, which lies in every checkpoint folder: how the agent was trained to be asked, and measured.

The file may be a stranger's. It is plain data of bounded size, and nothing in it is executed or resolved. A text in it
that could be a path, an address or a module is withheld: it counts only if the command line says it too.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from agentic_rag_env.errors import AgenticRAGError, ConfigurationError, DataError
from agentic_rag_env.registry import DATASETS, ENVS, RETRIEVERS, REWARDS
from agentic_rag_env.settings import check_value, one_of
from agentic_rag_env.terminal import print_line
from algorithms.learner.config import PRECISIONS
from algorithms.learner.model_folders import as_folder
from algorithms.rollout.config import RolloutConfig
from algorithms.training.run_files import differences, require_plain
from algorithms.training.settings import RunConfig, ScoringConfig, settings_with_effect
from algorithms.training.typed import typed

AGENT_FILE = "agent.json"
#: Raised when older code could no longer read the file as it is meant.
_FORMAT = 1
_KEYS = ("format", "env", "action_ends", "rollout", "precision", "vocab_size", "measured")
_MAX_BYTES, _MAX_ENVS, _MAX_NEW_TOKENS = 2**20, 2**12, 2**16
#: Settings of `rollout` that every run with the agent keeps. The others belong to a run and to its figures.
LIMITS = ("max_new_tokens", "max_tokens")
_PARTS = {"env": ENVS, "dataset": DATASETS, "retriever": RETRIEVERS, "reward": REWARDS}
#: Texts that the model reads, or that a registry looks up. No other text with such characters is taken from the file.
_HARMLESS = ("env.prompt", *(f"{part}.name" for part in _PARTS))
_WORD = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class Agent:
    """What `agent.json` says.

    Attributes:
        env: Settings of the environment, with its `name`: prompt, turns, passages and the like.
        action_ends: The texts that end an action there.
        rollout: How the agent wrote when it was measured; of these settings, the token limits belong to the protocol.
        precision: "float32", "bfloat16" or "float64", in which the run computed.
        vocab_size: Only ids below it were written.
        measured: `dataset`, `retriever`, `reward`, `evaluation` and `num_envs` behind the figures of the run.
        withheld: Texts that are not taken from the file, by the dotted names of their settings.
    """

    env: dict[str, Any]
    action_ends: tuple[str, ...]
    rollout: dict[str, Any]
    precision: str
    vocab_size: int
    measured: dict[str, Any]
    withheld: dict[str, Any]

    @property
    def protocol(self) -> dict[str, Any]:
        """What changes what the model sees and how its actions are read, shaped like the settings of a run."""
        return {"env": self.env, "rollout": {name: self.rollout[name] for name in LIMITS}}

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that decides the figures of the run, shaped like its settings."""
        return {
            "env": self.env,
            "rollout": self.rollout,
            "learner": {"precision": self.precision},
            **self.measured,
        }

    def require_said(self, is_said: Callable[[str], bool], origin: str) -> None:
        """Make sure that the command line says what the file may not.

        Args:
            is_said: Whether the command line says a setting, by its dotted name.
            origin: The model, for the error.

        Raises:
            ConfigurationError: A text of the file is withheld, and the command line does not have it either.
        """
        missing = {key: value for key, value in self.withheld.items() if not is_said(key)}
        if missing:
            told = " ".join(shlex.quote(f"{key}={json.dumps(value)}") for key, value in missing.items())
            raise ConfigurationError(
                f"{AGENT_FILE} of {origin} has settings that may name a file, an address or a module, and such "
                f"settings count only on the command line. If you trust them, add: {told}"
            )


def described(config: RunConfig, precision: str, vocab_size: int, action_ends: Sequence[str]) -> dict[str, Any]:
    """Make the content of `agent.json` for the policy of a run.

    Args:
        config: The settings of the run.
        precision: In which it computes.
        vocab_size: Ids that its policy may write.
        action_ends: The texts that end an action in its environments.
    """
    scoring = {setting.name: getattr(config.evaluation, setting.name) for setting in fields(ScoringConfig)}
    data = {name: part for name in ("dataset", "retriever", "reward") if (part := getattr(config, name)) is not None}
    content = {
        "format": _FORMAT,
        "env": config.env,
        "action_ends": list(action_ends),
        "rollout": settings_with_effect(vars(config.rollout), "rollout."),
        "precision": precision,
        "vocab_size": vocab_size,
        "measured": {**data, "evaluation": scoring, "num_envs": config.num_envs},
    }
    return json.loads(json.dumps(content))


def read_agent(place: str | Path) -> Agent | None:
    """Read the `agent.json` of a model folder; None if there is none, or if the place is no folder here.

    Raises:
        DataError: The file is damaged, too large, of another version, or holds what no agent can have.
    """
    folder = as_folder(place)
    if folder is None or not (file := folder / AGENT_FILE).is_file():
        return None
    try:
        return _checked(_read(file))
    except (ValueError, TypeError, KeyError, RecursionError, AgenticRAGError) as error:
        told = " ".join(str(error).split())[:300]
        raise DataError(
            f"{file} says nothing of an agent ({told or type(error).__name__}). Put the file of this checkpoint back; "
            "or remove it, and the model is asked as the command line says."
        ) from error


def shareable(folder: Path) -> dict[str, Any]:
    """The content of `agent.json` without the texts that a reader withholds, which may be paths of this machine."""
    content = _read(folder / AGENT_FILE)
    for key in _checked(content).withheld:
        part, _, setting = key.partition(".")
        del (content[part] if part in content else content["measured"][part])[setting]
    return content


def _read(file: Path) -> Any:
    if file.stat().st_size > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES} bytes")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of a setting")

    content = json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)
    require_plain(content, AGENT_FILE)
    return content


def _checked(content: Any) -> Agent:
    """Make an agent of what a file holds, and withhold texts that could name something."""
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"its format must be {_FORMAT}")
    if unknown := content.keys() - set(_KEYS):
        raise ValueError(f"there is no entry {min(unknown)}; there are {', '.join(_KEYS)}")
    if not isinstance(content["measured"], dict):
        raise ValueError(f"measured must be settings, got {content['measured']!r}")
    withheld: dict[str, Any] = {}
    measured: dict[str, Any] = {
        name: _part(name, content["measured"][name], withheld)
        for name in ("dataset", "retriever", "reward")
        if name in content["measured"]
    }
    measured["evaluation"] = vars(typed(ScoringConfig, content["measured"].get("evaluation", {})))
    measured["num_envs"] = _whole(content["measured"].get("num_envs", RunConfig.num_envs), "num_envs", _MAX_ENVS)
    rollout = typed(RolloutConfig, content["rollout"])
    _whole(rollout.max_new_tokens, "max_new_tokens", _MAX_NEW_TOKENS)
    check_value("precision", content["precision"], one_of(name for name in PRECISIONS if name != "auto"))
    ends = content["action_ends"]
    if not isinstance(ends, list) or not ends or not all(isinstance(end, str) and end for end in ends):
        raise ValueError(f"action_ends must be a list of texts, got {ends!r}")
    env = _part("env", content["env"], withheld)
    vocab_size = _whole(content["vocab_size"], "vocab_size", 2**31)
    written_with = settings_with_effect(vars(rollout), "rollout.")
    return Agent(env, tuple(ends), written_with, content["precision"], vocab_size, measured, withheld)


def _part(group: str, settings: Any, withheld: dict[str, Any]) -> dict[str, Any]:
    """Take the settings of a part, without those that could name something."""
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
        raise ValueError(f"{group} must be settings with a name, got {settings!r}")
    registry, name = _PARTS[group], settings["name"]
    known = registry.get(name).settings if name in registry.names() else {}
    taken = {}
    for setting, value in settings.items():
        key = f"{group}.{setting}"
        if key in _HARMLESS or _names_nothing(value) or (setting in known and value == known[setting].default):
            taken[setting] = value
        else:
            withheld[key] = value
    return taken


def _names_nothing(value: Any) -> bool:
    """Whether no text in a value could be a path, an address or a module: it is one word, and no file has this name."""
    if isinstance(value, Mapping):
        return all(map(_names_nothing, value.values()))
    if isinstance(value, list):
        return all(map(_names_nothing, value))
    return not isinstance(value, str) or (_WORD.fullmatch(value) is not None and not Path(value).exists())


def _whole(value: Any, name: str, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"{name} must be a whole number in [1, {most}], got {value!r}")
    return value


def tell_overruled(trained: Mapping[str, Any], now: Mapping[str, Any], who: str) -> None:
    """Say in a line which settings of a protocol the command line has changed.

    Args:
        trained: The protocol that a model was trained in.
        now: The settings that count, shaped like those of a run.
        who: The model.
    """
    if found := differences(trained, now):
        was = listed(found, 1)
        print_line(f"The command line says {listed(found, 2)}, and that counts; {who} was trained with {was}.")


def listed(found: Sequence[tuple[str, Any, Any]], index: int) -> str:
    """The settings of `differences` in words, with their first (1) or second (2) values."""
    return ", ".join(f"{each[0]}={each[index]}" for each in found)
