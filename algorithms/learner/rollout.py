"""The policy plays the vector environment: questions in, trajectories out, every token computed once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.retrievers.cache import stats_of
from agentic_rag_env.types import StepInfo
from agentic_rag_env.vector import AgenticRAGVectorEnv, info_at
from algorithms.learner.codec import encode_plain, encode_prompts
from algorithms.learner.kv_cache import EpisodeCache, check_cache
from algorithms.learner.models import autocast, lm_logits, logit_width, pad_id
from algorithms.learner.sampling import ActionEnd, RolloutConfig, sample
from algorithms.learner.seeding import rng
from algorithms.learner.types import RolloutStats, Trajectory, Turn

__all__ = ["RolloutConfig", "RolloutEngine"]

#: Called with the number of finished episodes and of all episodes.
Progress = Callable[[int, int], None]

_MAX_PREFILL_TOKENS = 16_384


class RolloutEngine:
    """Plays episodes with a policy.

    Each environment has a row in a key-value cache that lives as long as the episode: prompt, actions and observations
    are appended and never computed again. Rows write independently of each other; as soon as half of them have ended
    their actions, these take one step of the environment together, with one call of the retriever, while the others
    pause. A finished episode's row goes to the next question.

    Args:
        model: The policy, with full attention in every layer.
        tokenizer: Its tokenizer. If it has a chat template, the prompt becomes the message of a user.
        envs: Environments with `AutoresetMode.DISABLED`; their number bounds the episodes played at once.
        config: How to write.
        vocab_size: Only ids below it are sampled, and probabilities are normalized over them; None: all.
        precision: Of the computation, see `models.autocast`.
        max_retriever_error_fraction: Share of a rollout's episodes that a failed search may end.

    Raises:
        ConfigurationError: The environments reset themselves, the model's context is too short, or the model's family
            cannot be computed token by token with this cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        envs: AgenticRAGVectorEnv,
        config: RolloutConfig,
        vocab_size: int | None = None,
        precision: str = "float32",
        max_retriever_error_fraction: float = 1.0,
    ) -> None:
        if (mode := envs.metadata.get("autoreset_mode")) != AutoresetMode.DISABLED:
            raise ConfigurationError(
                f"RolloutEngine decides itself which question comes next, but the environments have autoreset_mode "
                f"{mode}; make them with autoreset_mode=AutoresetMode.DISABLED."
            )
        _check_context(model, config)
        check_cache(model)
        self.model = model
        self.backbone: Any = model.base_model
        self.tokenizer = tokenizer
        self.envs = envs
        self.config = config
        self.precision = precision
        self.max_retriever_error_fraction = max_retriever_error_fraction
        self.vocab_size = vocab_size or logit_width(model)
        self.action_end = ActionEnd(model, tokenizer, self.vocab_size)
        self.pad_id = pad_id(tokenizer)

    def rollout(
        self,
        question_indices: Sequence[int],
        *,
        seed: tuple[int, ...],
        group_ids: Sequence[int] | None = None,
        source: str = "policy",
        progress: Progress | None = None,
    ) -> tuple[list[Trajectory], RolloutStats]:
        """Play one episode per question.

        Args:
            question_indices: Questions of the environments' dataset; may repeat.
            seed: With the position of an episode in `question_indices` it decides the draws of that episode, whatever
                is played beside it.
            group_ids: One per question; None: a group of its own for each.
            source: Who plays, recorded in the trajectories.
            progress: Called whenever episodes have finished.

        Returns:
            The trajectories in the order of the questions, and what they cost.

        Raises:
            ConfigurationError: A prompt leaves no room for an action within `max_tokens`.
            RetrieverError: Too many searches fail.
        """
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), autocast(self.model.device, self.precision):
                return _Rollout(self, question_indices, seed, group_ids, source, progress).run()
        finally:
            self.model.train(was_training)


@dataclass(slots=True)
class _Episode:
    """An episode being played: its place in the order asked, its draws, and what has been recorded."""

    number: int
    rng: np.random.Generator
    prompt_ids: np.ndarray
    turns: list[Turn] = field(default_factory=list)
    reward: float = 0.0


class _Rollout:
    """The state of one call of `RolloutEngine.rollout`.

    Arrays are indexed by environment. `envs_by_row` says which environment's episode a row of the cache holds; the rows
    are kept in the order running (in the middle of an action), waiting (action ended), idle (nothing left to play).
    """

    def __init__(
        self,
        engine: RolloutEngine,
        question_indices: Sequence[int],
        seed: tuple[int, ...],
        group_ids: Sequence[int] | None,
        source: str,
        progress: Progress | None,
    ) -> None:
        self.engine = engine
        self.questions = [int(index) for index in question_indices]
        self.group_ids = range(len(self.questions)) if group_ids is None else group_ids
        self.seed, self.source, self.progress = seed, source, progress
        num_envs, max_new_tokens = engine.envs.num_envs, engine.config.max_new_tokens
        self.cache = EpisodeCache(num_envs)
        self.envs_by_row = np.arange(num_envs)
        self.num_running = 0
        self.num_live = num_envs
        self.episodes: dict[int, _Episode] = {}
        self.num_started = 0
        self.num_finished = 0
        self.trajectories: list[Any] = [None] * len(self.questions)
        self.stats = RolloutStats()
        # Tokens in the cache, sampled so far in this action, and at most to be sampled in it.
        self.lengths = np.zeros(num_envs, dtype=np.int64)
        self.counts = np.zeros(num_envs, dtype=np.int64)
        self.limits = np.zeros(num_envs, dtype=np.int64)
        self.action_ids = np.zeros((num_envs, max_new_tokens), dtype=np.int64)
        self.action_logprobs = np.zeros((num_envs, max_new_tokens), dtype=np.float32)
        self.uniforms = np.zeros((num_envs, max_new_tokens))

    def run(self) -> tuple[list[Trajectory], RolloutStats]:
        """Play until every question has its trajectory."""
        start, before = time.perf_counter(), stats_of(self.engine.envs.retriever)
        if self.questions:
            self._tick()
        while self.num_live:
            if self.num_running > self.num_live // 2:
                self._decode()
            else:
                self._tick()
        self.stats.seconds = time.perf_counter() - start
        after = stats_of(self.engine.envs.retriever)
        for name in ("cache_hits", "cache_misses"):
            setattr(self.stats, name, after.get(name, 0) - before.get(name, 0))
        return self.trajectories, self.stats

    def _decode(self) -> None:
        """One more token for every running row."""
        envs = self.envs_by_row[: self.num_running]
        last = self.action_ids[envs, self.counts[envs] - 1]
        hidden = self._forward(last[:, None], self.lengths[envs][:, None], first_row=0)
        self.lengths[envs] += 1
        self.stats.computed_tokens += len(envs)
        self._sample(envs, hidden[:, 0])

    def _tick(self) -> None:
        """Let the waiting episodes take a step, fill the rows of finished ones, and start the next actions."""
        waiting = self.envs_by_row[self.num_running : self.num_live].tolist()
        pending = self._step([env for env in waiting if env in self.episodes])
        pending |= self._start([env for env in waiting if env not in self.episodes])
        goes_on = np.zeros(len(self.envs_by_row), dtype=bool)
        goes_on[list(pending)] = True
        self.num_live = self._to_front(goes_on, self.num_running, self.num_live)
        if pending:
            self._prefill(pending)

    def _step(self, envs: Sequence[int]) -> dict[int, np.ndarray]:
        """Send the ended actions of these environments and record what comes back.

        Returns:
            By environment, the tokens to append where the episode goes on.
        """
        if not envs:
            return {}
        actions: list[str | None] = [None] * self.engine.envs.num_envs
        for env in envs:
            actions[env] = self.engine.action_end.text(self.action_ids[env, : self.counts[env]])
        texts, rewards, terminations, truncations, infos = self.engine.envs.step(actions)
        observations = encode_plain(self.engine.tokenizer, [texts[env] for env in envs])
        pending = {}
        for env, observation in zip(envs, observations, strict=True):
            terminated, truncated = bool(terminations[env]), bool(truncations[env])
            # The last token of the action, the observation, and at least one token of the next action.
            reward, info = float(rewards[env]), info_at(infos, env)
            full = self.lengths[env] + len(observation) + 2 > self.engine.config.max_tokens
            if full and not (terminated or truncated):
                truncated = True
                cut = self.engine.envs.cut_off(env)
                reward, info = reward + cut.reward, cut.info
            ended = terminated or truncated
            turn = self._record_turn(env, observation[:0] if ended else observation, info)
            self.episodes[env].reward += reward
            if ended:
                self._finish(env, turn.info, terminated)
            else:
                pending[env] = np.concatenate((turn.action_ids[-1:], observation))
        if self.progress and len(pending) < len(envs):
            self.progress(self.num_finished, len(self.questions))
        return pending

    def _record_turn(self, env: int, observation_ids: np.ndarray, info: StepInfo) -> Turn:
        count = self.counts[env]
        turn = Turn(
            action_ids=self.action_ids[env, :count].copy(),
            action_logprobs=self.action_logprobs[env, :count].copy(),
            observation_ids=observation_ids,
            info=info,
        )
        self.episodes[env].turns.append(turn)
        self.stats.sampled_tokens += int(count)
        if info["error"] is not None:
            self._count_failed_search(info["error"])
        return turn

    def _count_failed_search(self, message: str) -> None:
        self.stats.retriever_errors += 1
        failed, asked = self.stats.retriever_errors, len(self.questions)
        allowed = self.engine.max_retriever_error_fraction
        if failed > allowed * asked:
            raise RetrieverError(
                f"{failed} of {asked} episodes ended in a failed search, more than max_retriever_error_fraction="
                f"{allowed} allows; the last one: {message}"
            )

    def _finish(self, env: int, info: StepInfo, terminated: bool) -> None:
        episode = self.episodes.pop(env)
        self.trajectories[episode.number] = Trajectory(
            prompt_ids=episode.prompt_ids,
            turns=episode.turns,
            group_id=int(self.group_ids[episode.number]),
            source=self.source,
            reward=episode.reward,
            correct=bool(info["correct"]),
            terminated=terminated,
            truncated=not terminated,
        )
        self.num_finished += 1

    def _start(self, envs: Sequence[int]) -> dict[int, np.ndarray]:
        """Give these environments the next questions, as far as there are any.

        Returns:
            The prompts by environment.
        """
        numbers = range(self.num_started, min(self.num_started + len(envs), len(self.questions)))
        envs = envs[: len(numbers)]
        if not envs:
            return {}
        mask = np.zeros(self.engine.envs.num_envs, dtype=bool)
        mask[envs] = True
        indices = np.full(self.engine.envs.num_envs, -1, dtype=np.int64)
        indices[envs] = [self.questions[number] for number in numbers]
        texts, infos = self.engine.envs.reset(options={"reset_mask": mask, "question_index": indices})
        prompts = encode_prompts(self.engine.tokenizer, [texts[env] for env in envs])
        for env, number, prompt in zip(envs, numbers, prompts, strict=True):
            if len(prompt) >= self.engine.config.max_tokens:
                raise ConfigurationError(
                    f"The prompt of question {info_at(infos, env)['question_id']!r} has {len(prompt)} tokens and "
                    f"leaves no room for an action; raise max_tokens, which is {self.engine.config.max_tokens}."
                )
            self.episodes[env] = _Episode(number, rng(*self.seed, "episode", number), prompt)
            self.lengths[env] = 0
        self.num_started += len(envs)
        return dict(zip(envs, prompts, strict=True))

    def _prefill(self, pending: dict[int, np.ndarray]) -> None:
        """Append tokens to all waiting rows and draw the first token of their actions."""
        config = self.engine.config
        longest = max(map(len, pending.values()))
        is_long = np.zeros(len(self.envs_by_row), dtype=bool)
        is_long[[env for env, ids in pending.items() if 2 * len(ids) > longest]] = True
        # A hint of few tokens is not padded to the length of a passage.
        middle = self._to_front(is_long, self.num_running, self.num_live)
        hidden = self._append(pending, self.num_running, middle)
        hidden += self._append(pending, middle, self.num_live)
        waiting = self.envs_by_row[self.num_running : self.num_live].copy()
        for env in waiting:
            self.uniforms[env] = self.episodes[env].rng.random(config.max_new_tokens)
        self.counts[waiting] = 0
        self.limits[waiting] = np.minimum(config.max_new_tokens, config.max_tokens - self.lengths[waiting])
        self.num_running = self.num_live
        self._sample(waiting, torch.cat(hidden))

    def _append(self, pending: dict[int, np.ndarray], start: int, stop: int) -> list[Tensor]:
        """Append tokens to the rows between `start` and `stop`.

        Returns:
            The hidden states of the last tokens, [n, d] for each portion of the rows.
        """
        hidden = []
        while start < stop:
            width = max(len(pending[env]) for env in self.envs_by_row[start:stop])
            envs = self.envs_by_row[start : min(stop, start + max(1, _MAX_PREFILL_TOKENS // width))]
            input_ids = np.full((len(envs), width), self.engine.pad_id, dtype=np.int64)
            for row, env in enumerate(envs):
                input_ids[row, : len(pending[env])] = pending[env]
            positions = self.lengths[envs][:, None] + np.arange(width)
            widths = np.array([len(pending[env]) for env in envs])
            states = self._forward(input_ids, positions, start)
            hidden.append(states[self._tensor(np.arange(len(envs))), self._tensor(widths - 1)])
            self.lengths[envs] += widths
            self.stats.computed_tokens += int(widths.sum())
            start += len(envs)
        return hidden

    def _sample(self, envs: np.ndarray, hidden: Tensor) -> None:
        """Draw a token for each of these running episodes, and set those aside whose action it ends."""
        engine, counts = self.engine, self.counts[envs]
        logits = lm_logits(engine.model, hidden, engine.vocab_size)
        ids, logprobs = sample(logits, self._tensor(self.uniforms[envs, counts]), engine.config)
        tokens = ids.cpu().numpy()
        self.action_ids[envs, counts] = tokens
        self.action_logprobs[envs, counts] = logprobs.cpu().numpy()
        self.counts[envs] = counts + 1
        end = engine.action_end
        ended = end.is_eos[tokens] | (counts + 1 >= self.limits[envs])
        for row in np.flatnonzero(end.may_close[tokens] & ~ended):
            ended[row] = end.closes(self.action_ids[envs[row], : counts[row] + 1])
        if ended.any():
            goes_on = np.ones(len(self.envs_by_row), dtype=bool)
            goes_on[envs[ended]] = False
            self.num_running = self._to_front(goes_on, 0, self.num_running)

    def _to_front(self, goes_on: np.ndarray, start: int, stop: int) -> int:
        """Swap rows between `start` and `stop` so that environments that go on come first; returns where they end."""
        flags = goes_on[self.envs_by_row[start:stop]]
        end = start + int(flags.sum())
        these = start + np.flatnonzero(~flags[: end - start])
        those = end + np.flatnonzero(flags[end - start :])
        if len(these):
            self.cache.swap(self._tensor(these), self._tensor(those), int(self.lengths.max()))
            self.envs_by_row[these], self.envs_by_row[those] = self.envs_by_row[those], self.envs_by_row[these]
        return end

    def _forward(self, input_ids: np.ndarray, positions: np.ndarray, first_row: int) -> Tensor:
        return self.cache.forward(self.engine.backbone, self._tensor(input_ids), self._tensor(positions), first_row)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.engine.model.device)


def _check_context(model: PreTrainedModel, config: RolloutConfig) -> None:
    settings = model.config.get_text_config()
    for name in ("max_position_embeddings", "sliding_window", "attention_chunk_size"):
        bound = getattr(settings, name, None)
        if bound is not None and config.max_tokens > bound:
            raise ConfigurationError(
                f"max_tokens is {config.max_tokens}, but the model's {name} is {bound}, and an episode is read whole. "
                f"Set max_tokens to at most {bound}, or choose a model with a longer context."
            )
