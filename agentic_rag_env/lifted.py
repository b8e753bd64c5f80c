"""Any text environment that is registered with Gymnasium, as the vector environment that the zoo plays.

What it must be: strings in, strings out; `reset` observes the whole prompt, `step` only what follows the action; and

- `metadata["action_ends"]`: texts that end an action, such as `["</calc>", "</answer>"]`;
- `info["correct"]` on the last step: a bool, whether the task was solved. A time limit that truncates an episode may
  leave it out, which counts as unsolved.

`metadata["num_episodes"]` may say how many episodes there are, so that none is measured twice under two seeds.

Further keys of `StepInfo` are passed on where its infos have them, such as `answer`, `action` or `ending`. A value of
another type than there is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, overload

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.episode import StepResult
from agentic_rag_env.errors import ConfigurationError, ResetNeededError
from agentic_rag_env.registry import ENVS, PLUGINS_VARIABLE
from agentic_rag_env.resets import rows_and_questions
from agentic_rag_env.settings import COUNT, Allowed, check_settings, check_value, one_of, or_none
from agentic_rag_env.spaces import FreeText
from agentic_rag_env.types import Ending, Passage, Question, StepInfo, blank_info
from agentic_rag_env.vector import BringsQuestions, stack_infos

#: Seeds that belong to a split at most.
SEEDS_OF_A_SPLIT = 1_000_000_000
#: The first seed of each split; so that no episode is both trained on and measured.
FIRST_SEEDS = {split: place * SEEDS_OF_A_SPLIT for place, split in enumerate(("train", "dev", "test"))}

#: Infos of several environments are stacked into columns, so the numbers of an info have one type each.
_NUMBERS: dict[str, type] = {"exact_match": float, "f1": float, "num_searches": int}
_NUMBER = Allowed("a finite number", lambda value: isinstance(value, (Real, np.bool_)) and math.isfinite(value))
_INFO = Allowed("a dict", lambda value: isinstance(value, Mapping))
_TEXT = or_none(Allowed("a text (str)", lambda value: isinstance(value, str)))
#: What the other keys of an info may hold. Infos are stacked, compared with answers, and written to files.
_OTHERS: dict[str, Allowed] = {
    "action": _TEXT,
    "query": _TEXT,
    "answer": _TEXT,
    "error": or_none(Allowed("a text (str) that is not empty", lambda value: isinstance(value, str) and bool(value))),
    "passages": Allowed(
        "a list of Passage (from agentic_rag_env)",
        lambda value: isinstance(value, (list, tuple)) and all(isinstance(each, Passage) for each in value),
    ),
}
_ACTION_ENDS = Allowed(
    "a list of the texts that end an action, such as ['</answer>']",
    lambda value: (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(end, str) and end for end in value)
    ),
)
_ID = Allowed(
    f"a name such as 'My-v0' alone; name the module that registers it in {PLUGINS_VARIABLE}",
    lambda value: isinstance(value, str) and ":" not in value,
)


class SeededEpisodes(Sequence[Question]):
    """The episodes of an environment as questions: number i is what `reset` begins with the i-th seed.

    Their texts are empty: nothing but `reset` knows the task.

    Args:
        name: The name of the environment.
        seeds: The seeds of the episodes, in the order of the questions.
    """

    def __init__(self, name: str, seeds: range) -> None:
        self.name, self.seeds = name, seeds

    def __len__(self) -> int:
        return len(self.seeds)

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | Sequence[Question]:
        if isinstance(index, slice):
            return SeededEpisodes(self.name, self.seeds[index])
        seed = self.seeds[index]
        return Question(f"{self.name}/{seed}", "", ())


class LiftedVectorEnv(VectorEnv[tuple[str, ...], Sequence[str | None], np.ndarray]):
    """N environments from `gymnasium.make`, stepped one after the other.

    Observations are tuples of N strings, rewards [N] float64, terminations and truncations [N] bool. An episode ends
    for good until `reset` with a `reset_mask`, and the action None leaves a row alone (autoreset mode DISABLED).

    Args:
        env_id: As registered with Gymnasium.
        num_envs: N, at least 1.
        seeds: Seeds of the episodes that can be asked for by `question_index`. Those past the environment's
            `metadata["num_episodes"]` are left out.
        kwargs: What the environment's constructor is given.

    Raises:
        ConfigurationError: The environment can't be made, or does not say where an action ends.

    Attributes:
        dataset: The episodes.
        retriever: None; whatever the environment searches is its own affair.
        rules, top_k: None and 0; so are its rules.
    """

    retriever = None
    rules = None
    top_k = 0

    def __init__(self, env_id: str, num_envs: int, seeds: range, kwargs: Mapping[str, Any] | None = None) -> None:
        check_value("num_envs", num_envs, COUNT)
        self.num_envs = num_envs
        self._envs: list[Any] = []  # gymnasium closes them even if one can't be made
        self._envs += [_make(env_id, kwargs or {}) for _ in range(num_envs)]
        self._name = env_id.rpartition(":")[2]
        ends: Any = self._envs[0].metadata.get("action_ends")
        check_value(f"metadata['action_ends'] of {self._name}", ends, _ACTION_ENDS)
        most: Any = self._envs[0].metadata.get("num_episodes")
        check_value(f"metadata['num_episodes'] of {self._name}", most, or_none(COUNT, "no limit"))
        seeds = seeds[:most]
        self.metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.DISABLED, "action_ends": tuple(ends)}
        self.dataset = QuestionSet(self._name, SeededEpisodes(self._name, seeds))
        self.single_action_space = self.single_observation_space = FreeText()
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._seeds = seeds
        self._observations = [""] * num_envs
        self._infos: list[StepInfo | None] = [None] * num_envs
        self._running = [False] * num_envs

    @property
    def layers(self) -> list[gymnasium.Env[Any, Any]]:
        """The wrappers of the first environment, from the outside, and the environment itself."""
        layers = [self._envs[0]]
        while isinstance(layers[-1], gymnasium.Wrapper):
            layers.append(layers[-1].env)
        return layers

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Begin episodes.

        Args:
            seed: The seed of the draw of episodes; None leaves it as it is.
            options: `reset_mask` and `question_index`, as `AgenticRAGVectorEnv.reset` takes them.

        Returns:
            The prompts (for rows left alone their last observation), and the infos of the rows that were reset.

        Raises:
            ConfigurationError: An option does not fit, or a prompt is no text.
        """
        if seed is not None:
            super().reset(seed=seed)
        mask, indices = rows_and_questions(options, self.num_envs, len(self._seeds), f"environment {self._name!r}")
        infos: dict[int, StepInfo] = {}
        for row in np.flatnonzero(mask).tolist():
            index = int(indices[row])
            question = self.dataset[int(self.np_random.integers(len(self._seeds))) if index < 0 else index]
            prompt, info = self._envs[row].reset(seed=int(question.id.rpartition("/")[2]))
            self._observations[row] = self._text(prompt, "reset")
            infos[row] = self._infos[row] = self._filled(blank_info(question.id, 0), info)
            self._running[row] = True
        return tuple(self._observations), stack_infos(infos, self.num_envs)

    def step(
        self, actions: Sequence[str | None]
    ) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one turn in every row that gets a text; None leaves a row alone.

        Raises:
            ResetNeededError: A row without a running episode got a text.
            ConfigurationError: The number of actions does not fit, or the environment breaks the contract; the message
                says what to add.
            Exception: Whatever an environment raises, with a note naming the episode.
        """
        if isinstance(actions, str) or len(actions) != self.num_envs:
            raise ConfigurationError(f"step needs one text or None per row, {self.num_envs}, got {actions!r}.")
        for row, action in enumerate(actions):
            if action is not None and not self._running[row]:
                raise ResetNeededError(f"Row {row} has no running episode; reset it, or pass None to leave it alone.")
        rewards = np.zeros(self.num_envs, dtype=np.float64)
        terminations = np.zeros(self.num_envs, dtype=np.bool_)
        truncations = np.zeros(self.num_envs, dtype=np.bool_)
        infos: dict[int, StepInfo] = {}
        for row, action in enumerate(actions):
            self._observations[row] = ""
            if action is not None:
                result = self._step(row, action)
                self._observations[row], rewards[row], terminations[row], truncations[row], infos[row] = result
        return tuple(self._observations), rewards, terminations, truncations, stack_infos(infos, self.num_envs)

    def cut_off(self, row: int) -> StepResult:
        """End the episode of a row after a turn, because its player has no room to go on.

        Args:
            row: Its last observation, which nobody reads, is taken back.

        Returns:
            The row's last step as it is now: reward 0, truncated, ending "out_of_tokens".

        Raises:
            ResetNeededError: The row has no running episode, or one that has not yet had a turn.
        """
        info = self._infos[row]
        if not self._running[row] or info is None or not info["turn"]:
            raise ResetNeededError("cut_off ends an episode between two turns, and none is there; call reset and step.")
        self._running[row], self._observations[row] = False, ""
        return StepResult("", 0.0, False, True, info | {"ending": Ending.OUT_OF_TOKENS})

    def close_extras(self, **kwargs: Any) -> None:
        """Close all environments."""
        for env in self._envs:
            env.close()

    def _step(self, row: int, action: str) -> StepResult:
        last = self._infos[row]
        assert last is not None
        self._running[row] = False  # until the step is done: an episode that blew up can't go on
        try:
            observation, reward, terminated, truncated, given = self._envs[row].step(action)
        except Exception as error:
            error.add_note(f"In episode {last['question_id']} of {self._name}, after the action {action!r}")
            raise
        ended = bool(terminated or truncated)
        info = self._filled(blank_info(last["question_id"], last["turn"] + 1), given)
        if ended:
            info = self._at_the_end(info, given, bool(terminated))
        check_value(f"reward of {self._name}", reward, _NUMBER)
        self._infos[row], self._running[row] = info, not ended
        return StepResult(self._text(observation, "step"), float(reward), bool(terminated), bool(truncated), info)

    def _text(self, observation: Any, of: str) -> str:
        if not isinstance(observation, str):
            raise ConfigurationError(
                f"{of} of {self._name} must observe a text (str), got {type(observation).__name__}; wrap it into an "
                "environment that puts its observations into words."
            )
        return observation

    def _filled(self, info: StepInfo, given: Mapping[str, Any]) -> StepInfo:
        """An info with what the environment knows of it, while the episode goes on."""
        check_value(f"info of {self._name}", given, _INFO)
        known = {key: given[key] for key in StepInfo.__annotations__ if key in given}
        for key, kind in _NUMBERS.items():
            if key in known:
                check_value(f"info[{key!r}] of {self._name}", known[key], _NUMBER)
                known[key] = kind(known[key])
        for key, allowed in _OTHERS.items():
            if key in known:
                check_value(f"info[{key!r}] of {self._name}", known[key], allowed)
        if "passages" in known:
            known["passages"] = tuple(known["passages"])
        of_the_player = {key: info[key] for key in ("question_id", "turn")}
        return StepInfo(**{**info, **known, **of_the_player, "correct": False, "ending": None})  # type: ignore[typeddict-item]

    def _at_the_end(self, info: StepInfo, given: Mapping[str, Any], terminated: bool) -> StepInfo:
        correct = given.get("correct", None if terminated else False)
        if not isinstance(correct, (bool, np.bool_)):
            raise ConfigurationError(
                f"info of the last step of {self._name} must have 'correct', a bool that says whether the task was "
                f"solved, got {correct!r}; the info has {', '.join(given) or 'nothing'}."
            )
        ending = given.get("ending")
        if ending is None:
            failed = Ending.SEARCH_FAILED if info["error"] is not None else Ending.OUT_OF_TURNS
            ending = Ending.ANSWERED if terminated else failed
        check_value(f"info['ending'] of {self._name}", str(ending), one_of(Ending))
        scores = {name: float(correct) for name in ("exact_match", "f1") if name not in given}
        return StepInfo(**{**info, **scores, "correct": bool(correct), "ending": Ending(ending)})  # type: ignore[typeddict-item]


def _make(env_id: str, kwargs: Mapping[str, Any]) -> gymnasium.Env[Any, Any]:
    try:
        return gymnasium.make(env_id, disable_env_checker=True, **kwargs)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise ConfigurationError(
            f"Gymnasium can't make {env_id!r}: {error} Import the module that registers it first; commands import the "
            f"files that {PLUGINS_VARIABLE} names."
        ) from error
    except TypeError as error:
        raise ConfigurationError(f"{env_id} can't be made with kwargs={dict(kwargs)}: {error}") from error


@dataclass
class GymnasiumConfig(BringsQuestions):
    """Which environment, and how many of its episodes make up a split.

    Episode i of a split is what `reset(seed=first + i)` begins, with another first seed for each split.

    Attributes:
        id: As registered with Gymnasium. The module that registers it is a plug-in.
        kwargs: What the environment's constructor is given.
        split_argument: The constructor's argument that is told the split, "train", "dev" or "test"; None: there is no
            such argument, and the seeds alone tell the splits apart.
        num_train, num_dev, num_test: Episodes of each split, or fewer where the environment has fewer.
    """

    id: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    split_argument: str | None = None
    num_train: int = 10_000
    num_dev: int = 500
    num_test: int = 1_000

    def __post_init__(self) -> None:
        check_settings(self, COUNT, "num_train", "num_dev", "num_test")
        # Saved settings have such a name, too, and what they name must not be imported.
        check_settings(self, _ID, "id")


@ENVS.register("gymnasium", GymnasiumConfig)
def make_gymnasium(config: GymnasiumConfig, num_envs: int, split: str = "train") -> LiftedVectorEnv:
    """The environments of a split.

    Args:
        config: Which ones.
        num_envs: Rows.
        split: "train", "dev" or "test".

    Raises:
        ConfigurationError: As of `LiftedVectorEnv`, or there is no such split.
    """
    check_value("split", split, one_of(FIRST_SEEDS))
    counts = {"train": config.num_train, "dev": config.num_dev, "test": config.num_test}
    first = FIRST_SEEDS[split]
    told = {} if config.split_argument is None else {config.split_argument: split}
    return LiftedVectorEnv(config.id, num_envs, range(first, first + counts[split]), {**config.kwargs, **told})
