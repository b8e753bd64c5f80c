"""Many episodes in lockstep, with one search for all of them in every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from agentic_rag_env.env import AgenticRAGEnv
from agentic_rag_env.episode import Episode, StepResult, search
from agentic_rag_env.errors import ConfigurationError, ResetNeededError
from agentic_rag_env.registry import ENVS
from agentic_rag_env.resets import row_seeds, rows_and_questions
from agentic_rag_env.settings import COUNT, check_value, one_of, or_none
from agentic_rag_env.types import Found, StepInfo

_Batch = tuple[str, ...]


class AgenticRAGVectorEnv(VectorEnv[_Batch, Sequence[str | None], np.ndarray]):
    """N episodes of `AgenticRAGEnv` in lockstep; all searches of a step go to the retriever in one call.

    Observations are tuples of N strings, rewards [N] float64, terminations and truncations [N] bool. Everything equals
    what N single environments return, with one exception: a search that raises ends every episode that took part in it.
    A retriever that returns an error in place of the passages of one query ends that episode alone.

    Args:
        num_envs: N, at least 1.
        autoreset_mode: Gymnasium's modes. NEXT_STEP: the step after the end of an episode ignores the action and
            begins the next one. SAME_STEP: the next one begins at once; `infos["final_obs"]` and `infos["final_info"]`
            hold the end of the last. DISABLED: an episode ends for good until `reset` with a `reset_mask`, and the
            action None leaves a row alone.
        **settings: Those of `AgenticRAGEnv`. The only render mode is "ansi".

    `gymnasium.make_vec(..., vectorization_mode="async")` makes N single environments in processes of their own instead.
    It needs `vector_kwargs={"shared_memory": False}`, since text has no longest length, and searches row by row.

    Raises:
        ConfigurationError: `AgenticRAGEnv` would raise it, or `num_envs` or `autoreset_mode` can't work.

    Attributes:
        dataset: The questions, shared by all rows.
        retriever: The retriever, shared by all rows.
        rules: The settings of the episodes.
        top_k: Most passages per search.
    """

    def __init__(
        self, num_envs: int, *, autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP, **settings: Any
    ) -> None:
        check_value("num_envs", num_envs, COUNT)
        mode = autoreset_mode.value if isinstance(autoreset_mode, AutoresetMode) else autoreset_mode
        check_value("autoreset_mode", mode, one_of(member.value for member in AutoresetMode))
        check_value("render_mode of the vector environment", settings.get("render_mode"), or_none(one_of(["ansi"])))
        parts = AgenticRAGEnv(**settings)
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode(mode)
        self.metadata = {**AgenticRAGEnv.metadata, "render_modes": ["ansi"], "autoreset_mode": self.autoreset_mode}
        self.render_mode = parts.render_mode
        self.dataset = parts.dataset
        self.retriever = parts.retriever
        self.rules = parts.rules
        self.top_k = parts.top_k
        self.single_action_space = parts.action_space
        self.single_observation_space = parts.observation_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._episodes = [Episode(self.rules) for _ in range(num_envs)]
        self._generators: list[np.random.Generator | None] = [None] * num_envs
        self._seeds: list[int | None] = [None] * num_envs
        self._observations = [""] * num_envs

    def reset(
        self, *, seed: int | Sequence[int | None] | np.ndarray | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[_Batch, dict[str, Any]]:
        """Begin episodes.

        Args:
            seed: An int seeds row i with `seed + i`; a sequence or array gives each row its own; None: none.
            options: `reset_mask` [N] bool: rows to reset, the others stay as they are; default all.
                `question_index` [N] int: question of each row, -1 draws one; default all -1. An int stands for N.

        Returns:
            The prompts (for rows left alone their last observation), and the infos of the rows that were reset.

        Raises:
            ConfigurationError: An option or the number of seeds does not fit.
        """
        seeds = row_seeds(seed, self.num_envs)
        of_dataset = len(self.dataset), f"dataset {self.dataset.name!r}"
        mask, indices = rows_and_questions(options, self.num_envs, *of_dataset)
        infos = {}
        for row in np.flatnonzero(mask).tolist():
            if seeds[row] is not None:
                self._generators[row], self._seeds[row] = seeding.np_random(seeds[row])
            infos[row] = self._begin(row, int(indices[row]))
        return tuple(self._observations), stack_infos(infos, self.num_envs)

    def step(self, actions: Sequence[str | None]) -> tuple[_Batch, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take one turn in every row.

        Args:
            actions: N texts; None leaves a row alone (mode DISABLED only).

        Returns:
            Observations, rewards, terminations, truncations and infos. A row left alone observes "", earns 0, has no
            flag set and is False in the masks of the infos.

        Raises:
            ResetNeededError: A row without a running episode got a text.
            ConfigurationError: The number of actions does not fit, or an action is None in another mode.
            Exception: Whatever the retriever or the reward raises, with a note naming the questions.
        """
        acting = self._acting_rows(actions)
        queries: dict[int, str] = {}
        for row in acting:
            query = self._episodes[row].act(actions[row])  # type: ignore[arg-type]
            if query is not None:
                queries[row] = query
        found = self._search(queries)
        rewards = np.zeros(self.num_envs, dtype=np.float64)
        terminations = np.zeros(self.num_envs, dtype=np.bool_)
        truncations = np.zeros(self.num_envs, dtype=np.bool_)
        infos: dict[int, StepInfo] = {}
        final: dict[int, StepResult] = {}
        for row in range(self.num_envs):
            if row in acting:
                result = self._episodes[row].observe(found.get(row))
                self._observations[row], rewards[row], terminations[row], truncations[row], info = result
                if self.autoreset_mode is AutoresetMode.SAME_STEP and (result.terminated or result.truncated):
                    final[row] = result
                    info = self._begin(row)
            elif self.autoreset_mode is AutoresetMode.NEXT_STEP:
                info = self._begin(row)
            else:
                self._observations[row] = ""
                continue
            infos[row] = info
        stacked = stack_infos(infos, self.num_envs)
        if final:
            ends = stack_infos({row: {"final_obs": result.observation} for row, result in final.items()}, self.num_envs)
            last = stack_infos({row: result.info for row, result in final.items()}, self.num_envs)
            stacked |= ends | {"final_info": last, "_final_info": ends["_final_obs"].copy()}
        return tuple(self._observations), rewards, terminations, truncations, stacked

    def cut_off(self, row: int) -> StepResult:
        """End the episode of a row after a turn, because its player has no room to go on, say in a model's context.

        Args:
            row: Number of the row. Its last observation is taken back, because nobody reads it. Mode DISABLED only.

        Returns:
            The row's last step in its new form, see `Episode.cut_off`.

        Raises:
            ResetNeededError: The row has no running episode, or one that has not yet had a turn.
            ConfigurationError: The mode is another one, in which rows reset themselves.
            Exception: Whatever the reward raises, with a note naming the question.
        """
        if self.autoreset_mode is not AutoresetMode.DISABLED:
            raise ConfigurationError(f"cut_off needs autoreset_mode DISABLED, this is {self.autoreset_mode}.")
        result = self._episodes[row].cut_off()
        self._observations[row] = ""
        return result

    def render(self) -> tuple[str, ...] | None:
        """The transcripts of all rows in mode "ansi", else None."""
        if self.render_mode is None:
            return None
        return tuple("".join(episode.transcript) for episode in self._episodes)

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The generators of the rows."""
        return tuple(self._generator(row) for row in range(self.num_envs))

    @property
    def np_random_seed(self) -> tuple[int | None, ...]:  # type: ignore[override]
        """The seeds of the rows; drawn from the system where none was given."""
        for row in range(self.num_envs):
            self._generator(row)
        return tuple(self._seeds)

    def _generator(self, row: int) -> np.random.Generator:
        generator = self._generators[row]
        if generator is None:
            generator, self._seeds[row] = seeding.np_random()
            self._generators[row] = generator
        return generator

    def _begin(self, row: int, index: int = -1) -> StepInfo:
        if index < 0:
            index = int(self._generator(row).integers(len(self.dataset)))
        self._observations[row] = self._episodes[row].begin(self.dataset[index])
        return self._episodes[row].report()

    def _search(self, queries: Mapping[int, str]) -> dict[int, Found]:
        if not queries:
            return {}
        ids = [question.id for row in queries if (question := self._episodes[row].question)]
        return dict(zip(queries, search(self.retriever, list(queries.values()), self.top_k, ids), strict=True))

    def _acting_rows(self, actions: Sequence[str | None]) -> set[int]:
        """Rows whose action counts in this step, all checked before the first one moves."""
        if isinstance(actions, str) or len(actions) != self.num_envs:
            raise ConfigurationError(f"step needs one text per row, {self.num_envs}, got {actions!r}.")
        acting = set()
        for row, (action, episode) in enumerate(zip(actions, self._episodes, strict=True)):
            if self.autoreset_mode is AutoresetMode.DISABLED:
                if action is None:
                    continue
            elif self.autoreset_mode is AutoresetMode.NEXT_STEP and not episode.running and episode.question:
                continue
            elif action is None:
                raise ConfigurationError(
                    f"The action of row {row} is None, which only autoreset_mode DISABLED allows; pass a text."
                )
            if not isinstance(action, str):
                raise TypeError(f"The action of row {row} must be a text, got {type(action).__name__}: {action!r}")
            if not episode.running:
                raise ResetNeededError(
                    f"Row {row} has no running episode; reset it (options={{'reset_mask': ...}}), or pass None in mode "
                    "DISABLED to leave it alone."
                )
            acting.add(row)
        return acting


def stack_infos(infos: Mapping[int, Mapping[str, Any]], num_envs: int) -> dict[str, Any]:
    """Infos of rows in the form that Gymnasium gives those of vector environments, in one pass over the rows.

    Args:
        infos: By row, all with the same keys, and the same types where these are numbers.
        num_envs: N.

    Returns:
        For each key a column [N], of objects unless the values are numbers, and under `_<key>` which rows have one.
    """
    rows = list(infos)
    has_one = np.zeros(num_envs, dtype=np.bool_)
    has_one[rows] = True
    stacked: dict[str, Any] = {}
    for key in infos[rows[0]] if rows else ():
        values = [info[key] for info in infos.values()]
        if (kind := type(values[0])) in (int, float, bool):
            column = np.zeros(num_envs, dtype=kind)
            column[rows] = values
        else:
            column = np.full(num_envs, None, dtype=object)
            for row, value in zip(rows, values, strict=True):
                column[row] = value
        stacked[key], stacked[f"_{key}"] = column, has_one.copy()
    return stacked


def info_at(infos: Mapping[str, Any], row: int) -> StepInfo:
    """One row of the infos of a vector environment, as the single environment would report it.

    Args:
        infos: What `reset` or `step` returned, or its `"final_info"`.
        row: Which row.

    Raises:
        ValueError: The row has no info, because it was left alone.
    """
    if "question_id" not in infos or not infos["_question_id"][row]:
        raise ValueError(f"Row {row} has no info here: it was left alone in this step.")
    values = {key: infos[key][row] for key in StepInfo.__annotations__}
    return StepInfo(**{key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()})  # type: ignore[typeddict-item]


class BringsQuestions:
    """Base of the settings of an environment with tasks of its own.

    Its factory gets `num_envs` and `split` alone: neither dataset nor retriever, reward or tokenizer. What it makes has
    the attributes `dataset` (the tasks as questions), `retriever` (None), `rules` (None) and `top_k` (0).
    """


def brings_questions(spec: Mapping[str, Any]) -> bool:
    """Whether an environment has tasks of its own.

    Args:
        spec: A mapping with `name`, and settings of the environment.

    Raises:
        UnknownNameError: There is no such environment.
    """
    config = ENVS.get(spec["name"]).config
    return config is not None and issubclass(config, BringsQuestions)


@dataclass
class AgenticRAGConfig:
    """Settings of the environment that are neither data nor retriever; see `AgenticRAGEnv`.

    Attributes:
        prompt: "bare": the question alone. "search_r1": the protocol is explained first, which a model needs that was
            not trained here.
        max_turns: Turns that may search.
        top_k: Passages of a search.
        final_turn: What follows these turns. "no_search": one more, in which an answer counts; "forced": one more that
            begins with the answer's tag; "none": nothing.
        max_observation_chars: Most characters of an observation; None: no limit. Only one of both limits can be set.
        max_observation_tokens: Most tokens of an observation; None: no limit.
    """

    prompt: str = "bare"
    max_turns: int = 4
    top_k: int = 3
    final_turn: str = "no_search"
    max_observation_chars: int | None = None
    max_observation_tokens: int | None = 500


@ENVS.register("agentic_rag", AgenticRAGConfig)
def make_agentic_rag(config: AgenticRAGConfig, num_envs: int, **parts: Any) -> AgenticRAGVectorEnv:
    """The environments of a training run.

    Args:
        config: The rules.
        num_envs: Number of rows.
        **parts: `dataset`, `retriever`, `reward`, `tokenizer` and `autoreset_mode`.
    """
    return AgenticRAGVectorEnv(num_envs, **vars(config), **parts)
