"""Environments of the package `skyrl-gym` (the extra `skyrl`), as plain Gymnasium environments of strings.

    env = gymnasium.make("SkyRL-v0", env_class="search", tasks="tasks-{split}.jsonl", config={"search_url": ...})

Each of their environments is made for one task, and talks in lists of chat messages. Here `reset` takes a task from a
file, and the contents of the messages are the texts.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium

from agentic_rag_env.errors import ConfigurationError, DataError, required_library
from agentic_rag_env.files import read_rows
from agentic_rag_env.lifted import FIRST_SEEDS, SEEDS_OF_A_SPLIT
from agentic_rag_env.registry import did_you_mean
from agentic_rag_env.settings import COUNT, Allowed, check_value, one_of
from agentic_rag_env.spaces import FreeText

#: Where an action ends, for each environment that we know to run nothing that a model writes but the tool's query.
ACTION_ENDS = {
    "aime": ["\n\n\n"],
    "gsm8k": ["\n\n\n"],
    "gsm8k_multi_turn": ["\n\n\n"],
    "search": ["</search>", "</answer>"],
    "text2sql": ["</sql>", "</solution>"],
}
#: All settings that an environment reads, with the values where the user gives none.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "search": {"search_url": "http://127.0.0.1:8000/retrieve", "topk": 3, "timeout": 30, "log_requests": False},
    "text2sql": {"db_path": "sql_data"},
}
_TEXT = Allowed("a text", lambda value: isinstance(value, str))
_SUM = Allowed(
    "a number as a text without commas, such as '1200'",  # all that the package reads out of an answer
    lambda value: isinstance(value, str) and re.fullmatch(r"-?[0-9.]+", value) is not None,
)
_TARGET = Allowed(
    "{'target': ...} with a text or a list of texts",
    lambda value: isinstance(value, Mapping) and _is_text_or_texts(value.get("target")),
)
#: The field of a task whose `ground_truth` is the solution, and what that must be. Of another one the package would
#: call every answer wrong, or it would break at the first answer.
_SOLUTIONS: dict[str, tuple[str, Allowed]] = {
    "aime": ("reward_model", _TEXT),
    "gsm8k": ("reward_spec", _SUM),
    "gsm8k_multi_turn": ("reward_spec", _SUM),
    "search": ("reward_spec", _TARGET),
    "text2sql": ("reward_spec", _TEXT),
}
#: How the package begins the result of a search that has failed. That of one that worked begins with a passage.
_FAILURES = ("Search error:", "Search request failed", "Error processing search results", "Unknown API state")
#: The reward of a solved task, in each of these environments.
_SOLVED = 1.0


class SkyRLEnv(gymnasium.Env[str, str]):
    """An environment of `skyrl-gym`, with tasks from a file.

    A task is a line of JSON, in the form of that package's data: `prompt` is a list of messages with `content`, and all
    other fields (`reward_spec`, `max_turns`, ...) go to the environment. The episode with seed i is about task i; seeds
    count from the first one of the split. In training they begin again after the last task. In the other splits they
    end with it, so that no task counts twice.

    A task is correct if its last reward is that of a solved one, 1. An episode ends as "answered", because the package
    does not tell an answer from the last turn; or as "search_failed", and `error` in the info says why. Environments
    that run code which the model writes are refused.

    Args:
        env_class: Name of the environment in `skyrl_gym`: aime, gsm8k, gsm8k_multi_turn, search or text2sql.
        tasks: A file of JSON lines; `{split}` in its name stands for the split.
        split: The split, as `env.split_argument=split` gives it.
        config: Settings of the environment: `search_url`, `topk`, `timeout` and `log_requests` of search, and `db_path`
            of text2sql, the folder of the databases.
        action_ends: Texts that end an action, where the default does not suit the tasks. For those without tools it is
            an empty double line; the model's end of text ends every action anyway.

    Raises:
        ConfigurationError: The package is missing, or there is no such environment, setting, file or task.
        DataError: A line of the file is no task; the message names it.
    """

    observation_space = action_space = FreeText()

    def __init__(
        self,
        env_class: str,
        tasks: str | Path,
        split: str = "train",
        config: Mapping[str, Any] | None = None,
        action_ends: Sequence[str] | None = None,
    ) -> None:
        check_value("env_class", env_class, one_of(ACTION_ENDS))
        with required_library("SkyRL-v0 needs the library skyrl-gym: pip install 'agentic-rag-env[skyrl]'."):
            import skyrl_gym
        self._make: Any = skyrl_gym.make
        self._name = env_class
        check_value("split", split, one_of(FIRST_SEEDS))
        defaults = _DEFAULTS.get(env_class, {})
        for given in config or {}:
            if given not in defaults:
                raise ConfigurationError(f"config of {env_class} has no {given!r}.{did_you_mean(str(given), defaults)}")
        self._config = SimpleNamespace(**{**defaults, **(config or {})})
        self._split = split
        if split != "train" and "{split}" not in str(tasks):
            warnings.warn(
                f"tasks={tasks} is the same file for every split, so {split} measures tasks that a run has trained on; "
                "write {split} in the name, such as tasks-{split}.jsonl.",
                stacklevel=2,
            )
        self._file = file = Path(str(tasks).replace("{split}", split)).expanduser()
        if not file.is_file():
            raise ConfigurationError(f"tasks={tasks} of split {split!r} is no file.")
        now = file.stat()
        self._tasks = _read(file, env_class, (now.st_mtime_ns, now.st_size))
        if not self._tasks:
            raise ConfigurationError(f"{file} has no tasks.")
        self.metadata = {"render_modes": [], "action_ends": list(action_ends or ACTION_ENDS[env_class])}
        if split != "train":
            self.metadata["num_episodes"] = len(self._tasks)
        self._env: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin the task of a seed; without a seed, a task drawn at random.

        Raises:
            ConfigurationError: The seed belongs to another split, there are not so many tasks, or the task's database
                is missing.
            DataError: The task is none of this environment.
        """
        super().reset(seed=seed)
        number = int(self.np_random.integers(len(self._tasks))) if seed is None else self._number(seed)
        prompt, task = self._tasks[number]
        self.close()
        try:
            self._env = self._make(self._name, env_config=self._config, extras=task)
            messages, info = self._env.init(prompt)
        except (AssertionError, KeyError) as error:  # so it says what a task lacks
            lack = f"{error.args[0]} field is required" if isinstance(error, KeyError) else error
            raise DataError(f"Task {number} is none of {self._name}: {lack}. Mend {self._file}.") from error
        except NotImplementedError as error:  # text2sql says no more
            raise DataError(
                f"Task {number} is none of {self._name}: data must be synsql, spider or bird, got {task['data']!r}. "
                f"Mend {self._file}."
            ) from error
        except FileNotFoundError as error:
            raise ConfigurationError(
                f"Task {number} of {self._file} has no database: {error}. Set config.db_path to the folder of the "
                f"databases, now {self._config.db_path}, or mend the task's data and db_id."
            ) from error
        return _text(messages), dict(info)

    def _number(self, seed: int) -> int:
        """The number of the task of a seed."""
        first = FIRST_SEEDS[self._split]
        number = seed - first
        if not 0 <= number < SEEDS_OF_A_SPLIT:
            raise ConfigurationError(
                f"Seed {seed} belongs to another split than {self._split!r}, whose seeds begin with {first}. Set "
                "env.split_argument=split, so that each split reads its own tasks."
            )
        if self._split != "train" and number >= len(self._tasks):
            raise ConfigurationError(
                f"Task {number} was asked for, but {self._file} has {len(self._tasks)} tasks; set "
                f"env.num_{self._split}={len(self._tasks)}."
            )
        return number % len(self._tasks)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take a turn."""
        result = self._env.step(action)
        observation, reward, done = _text(result["observations"]), float(result["reward"]), bool(result["done"])
        if self._name == "search" and (error := _failure(observation)) is not None:
            return "", 0.0, False, True, {"correct": False, "error": error}
        return observation, reward, done, False, {"correct": done and reward >= _SOLVED}

    def close(self) -> None:
        """Close the environment of the present task."""
        if self._env is not None:
            self._env.close()


@lru_cache(maxsize=8)  # for the many environments of a run, which share their tasks
def _read(
    file: Path, env_class: str, version: tuple[int, int]
) -> tuple[tuple[list[dict[str, str]], dict[str, Any]], ...]:
    """The tasks of a file; another time or size of it, its `version`, is another file."""
    return tuple(read_rows(file, partial(_task, env_class)))


def _task(env_class: str, row: Any) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """Split a line into the prompt and the rest."""
    prompt = row.get("prompt")
    if not isinstance(prompt, list) or not all(
        isinstance(one, dict) and isinstance(one.get("content"), str) for one in prompt
    ):
        raise DataError("a task needs 'prompt', a list of messages with a text as 'content'")
    field, allowed = _SOLUTIONS[env_class]
    if not isinstance(row.get(field), dict) or "ground_truth" not in row[field]:
        raise DataError(f"a task of {env_class} needs {field!r} with 'ground_truth'")
    check_value(f"ground_truth of {env_class}", row[field]["ground_truth"], allowed)
    if "max_turns" in row:
        check_value("max_turns", row["max_turns"], COUNT)
    return prompt, {name: value for name, value in row.items() if name != "prompt"}


def _is_text_or_texts(value: Any) -> bool:
    many = isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)
    return many or isinstance(value, str)


def _failure(observation: str) -> str | None:
    """Why a search has failed; None for passages, and where nothing was searched for."""
    block = re.fullmatch(r"\s*<information>(.*)</information>\s*", observation, re.DOTALL)
    if block is None:  # the package observes an exception of its tool as it is
        return observation or None
    result = str(json.loads(block[1])["result"]) if block[1] else ""
    return result if result.startswith(_FAILURES) else None


def _text(messages: Sequence[Mapping[str, str]]) -> str:
    return "\n\n".join(message["content"] for message in messages)
