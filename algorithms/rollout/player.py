"""The policy plays a vector environment: questions in, trajectories out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from gymnasium.vector import AutoresetMode

from agentic_rag_env.episode import StepResult
from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.retrievers.base import stats_of
from agentic_rag_env.types import Ending, StepInfo
from agentic_rag_env.vector import info_at
from algorithms.learner import ranks
from algorithms.learner.seeding import rng
from algorithms.learner.types import RolloutStats, Trajectory, Turn
from algorithms.rollout.engine import Action, Engine
from algorithms.rollout.tokenization import encode_plain, encode_prompts, opened_thought

#: A function that is called with the number of finished episodes and of all episodes.
Progress = Callable[[int, int], None]


class TextEnvs(Protocol):
    """What the player needs of a vector environment: texts in and out, row by row.

    With `RolloutConfig.decode_during_search`, steps are taken in another thread than the rest. There are never two
    calls at once.

    Attributes:
        num_envs: Number of rows.
        metadata: `autoreset_mode` is `AutoresetMode.DISABLED`; `action_ends` are the texts that end an action.
    """

    num_envs: int
    metadata: dict[str, Any]

    def reset(self, *, options: Mapping[str, Any]) -> tuple[Sequence[str], dict[str, Any]]:
        """Begin the question `question_index` [N] in each row of `reset_mask` [N], and return prompts and infos."""
        ...

    def step(
        self, actions: Sequence[str | None]
    ) -> tuple[Sequence[str], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take a turn in each row that gets a text; infos have `correct`, `error` and `ending` at least."""
        ...

    def cut_off(self, row: int) -> StepResult:
        """End the episode of a row that has no more room, and return its last step as it is now."""
        ...


def check_failures(failed: int, num_episodes: int, allowed: float, message: str) -> None:
    """Stop a run in which too many searches fail.

    Args:
        failed: Episodes that a failed search has ended.
        num_episodes: Episodes of the whole rollout.
        allowed: The share of them that may fail.
        message: Message of the last failure.

    Raises:
        RetrieverError: More have failed than are allowed.
    """
    if failed > allowed * num_episodes:
        raise RetrieverError(
            f"{failed} of {num_episodes} episodes ended in a failed search, more than max_retriever_error_fraction="
            f"{allowed} allows; the last one: {message}"
        )


class Player:
    """Plays episodes with an engine.

    Each environment has a row of the engine. As soon as the engine returns some actions, these take one step of the
    environment together, with one call of the retriever. The other rows pause meanwhile, or write on as far as
    `RolloutConfig.decode_during_search` says; those whose actions end wait for the next step. The row of a finished
    episode goes to the next question.

    Args:
        engine: The engine that writes, with a row for each environment.
        envs: Environments with `AutoresetMode.DISABLED`; their number bounds the episodes played at once.
        max_retriever_error_fraction: Share of a rollout's episodes that a failed search may end.

    Raises:
        ConfigurationError: The environments reset themselves.
    """

    def __init__(self, engine: Engine, envs: TextEnvs, max_retriever_error_fraction: float = 1.0) -> None:
        if (mode := envs.metadata.get("autoreset_mode")) != AutoresetMode.DISABLED:
            raise ConfigurationError(
                f"The player decides itself which question comes next, but the environments have autoreset_mode "
                f"{mode}; make them with autoreset_mode=AutoresetMode.DISABLED."
            )
        assert engine.num_rows >= envs.num_envs
        # Any: those who made the environments know what they have beyond `TextEnvs`, such as a dataset.
        self.engine, self.envs = engine, envs
        self.opened_thought = opened_thought(engine.tokenizer)
        self.max_retriever_error_fraction = max_retriever_error_fraction

    def rollout(
        self,
        question_indices: Sequence[int],
        *,
        seed: tuple[int, ...],
        group_ids: Sequence[int] | None = None,
        source: str = "policy",
        progress: Progress | None = None,
    ) -> tuple[list[Trajectory], RolloutStats]:
        """Play one episode per question; each process plays its share, and all get all trajectories.

        Args:
            question_indices: Questions of the environments' dataset; may repeat.
            seed: Decides the draws of an episode, together with its position in `question_indices`. What is played
                beside it has no effect.
            group_ids: One group id per question; None: each episode is a group of its own.
            source: Who plays, recorded in the trajectories.
            progress: Called whenever episodes of this process have finished, with their number as if all processes had
                finished as many.

        Returns:
            The trajectories in the order of the questions, and what they cost in all processes.

        Raises:
            ConfigurationError: A prompt leaves no room for an action within `max_tokens`.
            RetrieverError: Too many searches fail.
        """
        rollout = _Rollout(self, question_indices, seed, group_ids, source, progress)
        try:
            own, stats = rollout.run()
        finally:
            self.engine.close(list(rollout.episodes))
        stats = RolloutStats.of_all(ranks.gathered(stats))
        played = ranks.in_order(own)
        if failures := [error for one in played if (error := one.error) is not None]:
            rollout.check_failures(len(failures), failures[-1])
        return played, stats


@dataclass(slots=True)
class _Episode:
    """An episode being played: its place in the order asked, its draws, and what has been recorded."""

    number: int
    rng: np.random.Generator
    prompt: str
    prompt_ids: np.ndarray
    num_tokens: int
    turns: list[Turn] = field(default_factory=list)
    reward: float = 0.0


class _Rollout:
    """The state of one call of `Player.rollout`.

    `numbers` are the places, in the order asked, of the questions that this process plays; `episodes` holds the
    episodes being played, by environment.
    """

    def __init__(
        self,
        player: Player,
        question_indices: Sequence[int],
        seed: tuple[int, ...],
        group_ids: Sequence[int] | None,
        source: str,
        progress: Progress | None,
    ) -> None:
        self.player, self.engine, self.envs = player, player.engine, player.envs
        self.questions = [int(index) for index in question_indices]
        self.numbers = ranks.share(range(len(self.questions)))
        self.group_ids = range(len(self.questions)) if group_ids is None else group_ids
        self.seed, self.source, self.progress = seed, source, progress
        self.episodes: dict[int, _Episode] = {}
        self.num_started = 0
        self.num_finished = 0
        self.trajectories: dict[int, Trajectory] = {}
        self.stats = RolloutStats()

    def run(self) -> tuple[list[Trajectory], RolloutStats]:
        """Play until every question of this process has its trajectory."""
        retriever = getattr(self.envs, "retriever", None)
        start, before, computed = time.perf_counter(), stats_of(retriever), self.engine.computed_tokens
        with ThreadPoolExecutor(1, initializer=ranks.use_device) as self.worker:  # its thread begins with its work
            self._start(range(self.envs.num_envs))
            while actions := self.engine.write():
                self._step(actions)
                self._start([action.row for action in actions if action.row not in self.episodes])
        self.stats.seconds = time.perf_counter() - start
        self.stats.computed_tokens = self.engine.computed_tokens - computed
        after = stats_of(retriever)
        for name in ("cache_hits", "cache_misses"):
            setattr(self.stats, name, after.get(name, 0) - before.get(name, 0))
        return [self.trajectories[number] for number in self.numbers], self.stats

    def check_failures(self, failed: int, message: str) -> None:
        """See the function of that name."""
        check_failures(failed, len(self.questions), self.player.max_retriever_error_fraction, message)

    def _start(self, envs: Sequence[int]) -> None:
        """Give these environments the next questions, as far as there are any."""
        numbers = self.numbers[self.num_started : self.num_started + len(envs)]
        envs = list(envs[: len(numbers)])
        if not envs:
            return
        mask = np.zeros(self.envs.num_envs, dtype=bool)
        mask[envs] = True
        indices = np.full(self.envs.num_envs, -1, dtype=np.int64)
        indices[envs] = [self.questions[number] for number in numbers]
        texts, infos = self.envs.reset(options={"reset_mask": mask, "question_index": indices})
        prompts = encode_prompts(self.engine.tokenizer, [texts[env] for env in envs])
        max_tokens = self.engine.config.max_tokens
        for env, number, prompt in zip(envs, numbers, prompts, strict=True):
            if len(prompt) >= max_tokens:
                raise ConfigurationError(
                    f"The prompt of question {info_at(infos, env)['question_id']!r} has {len(prompt)} tokens and "
                    f"leaves no room for an action; raise max_tokens, which is {max_tokens}."
                )
            episode = _Episode(number, rng(*self.seed, "episode", number), texts[env], prompt, len(prompt))
            self.engine.open(env, prompt, self._draws(episode))
            self.episodes[env] = episode
        self.num_started += len(envs)

    def _draws(self, episode: _Episode) -> np.ndarray:
        return episode.rng.random(self.engine.config.max_new_tokens)

    def _step(self, actions: Sequence[Action]) -> None:
        """Send these actions, record what comes back, and continue the rows whose episodes go on."""
        sent: list[str | None] = [None] * self.envs.num_envs
        for action in actions:
            # Text that a chat template has begun for the model belongs to the model's first turn.
            begun = "" if self.episodes[action.row].turns else self.player.opened_thought
            sent[action.row] = begun + action.text
        texts, rewards, terminations, truncations, infos = self._answered(sent)
        observations = encode_plain(self.engine.tokenizer, [texts[action.row] for action in actions])
        for action, observation in zip(actions, observations, strict=True):
            env = action.row
            episode = self.episodes[env]
            # The reply follows the words; an end of text is read only if there is none.
            end_unread = action.ends_text and len(observation) > 0
            episode.num_tokens += len(action.ids) - end_unread
            terminated, truncated = bool(terminations[env]), bool(truncations[env])
            reward, info = float(rewards[env]), info_at(infos, env)
            # There must be room for the observation and at least one token of the next action.
            full = episode.num_tokens + len(observation) + 1 > self.engine.config.max_tokens
            if full and not (terminated or truncated):
                truncated = True
                cut = self.envs.cut_off(env)
                reward, info = reward + cut.reward, cut.info
            ended = terminated or truncated
            reply = observation[:0] if ended else observation
            self._record_turn(episode, Turn(action.ids, action.logprobs, reply, info, end_unread and not ended))
            episode.reward += reward
            if ended:
                self._finish(env, info, terminated)
            else:
                episode.num_tokens += len(observation)
                self.engine.append(env, observation, self._draws(episode))
        if self.progress and any(action.row not in self.episodes for action in actions):
            self.progress(min(self.num_finished * ranks.count(), len(self.questions)), len(self.questions))

    def _answered(self, sent: Sequence[str | None]) -> Any:
        """Let the environments take a step, and the rows that wait for none write on as far as the settings say."""
        max_steps = self.engine.config.decode_during_search
        if max_steps == 0:
            return self.envs.step(sent)
        step = self.worker.submit(self.envs.step, sent)
        try:
            self.engine.advance(max_steps)
        finally:
            answer = step.result()  # nobody touches the environments before this step is over
        return answer

    def _record_turn(self, episode: _Episode, turn: Turn) -> None:
        episode.turns.append(turn)
        self.stats.sampled_tokens += len(turn.action_ids)
        if turn.info["ending"] == Ending.SEARCH_FAILED:
            self.stats.retriever_errors += 1
            self.check_failures(self.stats.retriever_errors, str(turn.info["error"]))

    def _finish(self, env: int, info: StepInfo, terminated: bool) -> None:
        episode = self.episodes.pop(env)
        self.engine.close([env])
        self.trajectories[episode.number] = Trajectory(
            prompt_ids=episode.prompt_ids,
            turns=episode.turns,
            group_id=int(self.group_ids[episode.number]),
            source=self.source,
            reward=episode.reward,
            correct=bool(info["correct"]),
            terminated=terminated,
            truncated=not terminated,
            prompt=episode.prompt,
        )
        self.num_finished += 1
