"""Records episodes on the discrete view of the environment as trajectories of the language model's form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, SupportsInt, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from agentic_rag_env.env import AgenticRAGEnv
from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.types import StepInfo
from agentic_rag_env.vector import AgenticRAGVectorEnv
from agentic_rag_env.wrappers import DiscreteActions
from algorithms.learner.types import Trajectory, Turn
from algorithms.rollout.tokenization import encode_plain, encode_prompts
from algorithms.sb3.learner import OutsideLearner
from algorithms.training.build import RunEnvs


class Record:
    """Records an episode while it is played.

    Args:
        tokenizer: Turns the text into ids. The log-probability of an action, which is that of a whole turn, stands at
            the turn's first token; the other tokens have 0.
        prompt: Text that the episode begins with.
        group_id: Group of the trajectory.
        batch: Number of the batch of a `Sample` that the episode is begun for; kept as an attribute.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: str, group_id: int, batch: int = 0) -> None:
        self.batch = batch
        self._tokenizer, self._group_id, self._reward = tokenizer, group_id, 0.0
        self._prompt_ids = encode_prompts(tokenizer, [prompt])[0]
        self._turns: list[Turn] = []
        self._ended = False, False

    def add(
        self, text: str, log_prob: float, reply: str, reward: float, terminated: bool, truncated: bool, info: StepInfo
    ) -> None:
        """Add a turn: its text, the text's log-probability, and the environment's reply and reward."""
        action_ids, observation_ids = encode_plain(self._tokenizer, [text, reply])
        logprobs = np.zeros(len(action_ids), dtype=np.float32)
        logprobs[:1] = log_prob
        # A copy, because vector environments of other libraries write into what they hand on.
        self._turns.append(Turn(action_ids, logprobs, observation_ids, cast(StepInfo, dict(info))))
        self._reward += reward
        self._ended = terminated, truncated

    def trajectory(self) -> Trajectory:
        """Return the trajectory of an episode that has ended."""
        correct = self._turns[-1].info["correct"]
        return Trajectory(self._prompt_ids, self._turns, self._group_id, "policy", self._reward, correct, *self._ended)


class RecordedView(DiscreteActions):
    """A view that keeps the wanted episodes, whoever plays them.

    Args:
        *settings, **more: See `DiscreteActions`.
        player: Chooses the actions; it is asked again for their log-probabilities in episodes that are kept.
        sample: Says which episodes are wanted, and gets those that have ended.
    """

    def __init__(self, *settings: Any, player: OutsideLearner, sample: Sample, **more: Any) -> None:
        super().__init__(*settings, **more)
        self._player, self._sample = player, sample
        self._record: Record | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, StepInfo]:  # type: ignore[override]
        """See `DiscreteActions.reset`."""
        self._seen, info = super().reset(seed=seed, options=options)
        self._record = self._sample.begin(self.reply)
        return self._seen, info

    def step(self, action: SupportsInt) -> tuple[np.ndarray, float, bool, bool, StepInfo]:  # type: ignore[override]
        """See `DiscreteActions.step`."""
        if self._record is None:
            return super().step(action)
        log_prob = self._player.log_probs(self._seen, self.action_masks())[int(action)]
        text = self.text(self.meaning(int(action)))
        self._seen, reward, terminated, truncated, info = super().step(action)
        self._record.add(text, log_prob, self.reply, reward, terminated, truncated, info)
        if terminated or truncated:
            self._sample.keep(self._record)
        return self._seen, reward, terminated, truncated, info


class Sample:
    """Keeps some episodes of each wanted update. They are chosen when they begin, so short ones are not preferred.

    Args:
        size: Largest number of episodes of an update.
        tokenizer: Tokenizer of the trajectories.
        wanted: Whether to keep any episodes of the present update.
    """

    def __init__(self, size: int, tokenizer: PreTrainedTokenizerBase, wanted: Callable[[], bool]) -> None:
        self._size, self._tokenizer, self._wanted = size, tokenizer, wanted
        self._kept: list[Trajectory] = []
        self._begun, self._batch = 0, 0

    def begin(self, prompt: str) -> Record | None:
        """Record an episode that begins; None if it is not wanted."""
        if self._begun >= self._size or not self._wanted():
            return None
        self._begun += 1
        return Record(self._tokenizer, prompt, self._begun - 1, self._batch)

    def keep(self, record: Record) -> None:
        """Keep an episode that has ended; one that ends after its update is left out."""
        if record.batch == self._batch:
            self._kept.append(record.trajectory())

    def take(self) -> list[Trajectory]:
        """Return the kept episodes of the present update; the next update starts empty."""
        taken, self._kept, self._begun = self._kept, [], 0
        self._batch += 1
        return taken


def play(
    view: DiscreteActions,
    index: int,
    player: OutsideLearner,
    temperature: float,
    rng: np.random.Generator,
    tokenizer: PreTrainedTokenizerBase,
) -> Trajectory:
    """Play one episode.

    Args:
        view: The environment.
        index: Index of the question.
        player: Who plays.
        temperature: 0: the likeliest action; else actions are drawn from their distribution at this temperature.
        rng: Random generator for the draws.
        tokenizer: See `Record`.
    """
    observation, _ = view.reset(options={"question_index": index})
    record, ended = Record(tokenizer, view.reply, index), False
    while not ended:
        log_probs = player.log_probs(observation, view.action_masks())
        action = pick(log_probs, temperature, rng)
        text = view.text(view.meaning(action))
        observation, reward, terminated, truncated, info = view.step(action)
        record.add(text, log_probs[action], view.reply, reward, terminated, truncated, info)
        ended = terminated or truncated
    return record.trajectory()


def pick(log_probs: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    """Pick the likeliest action at temperature 0, else draw one.

    Args:
        log_probs: [actions] nats; minus infinity where an action is not possible.
        temperature: At least 0.
        rng: Random generator for the draw.
    """
    best = int(log_probs.argmax())
    if temperature == 0:
        return best
    weights = np.exp((log_probs.astype(np.float64) - log_probs[best]) / temperature)
    return int(rng.choice(len(weights), p=weights / weights.sum()))


def single(envs: RunEnvs) -> AgenticRAGEnv:
    """Make one environment with the questions, the retriever and the rules of a vector environment.

    Raises:
        ConfigurationError: They are of another class. That of a subclass may have rules of its own, which one
            environment would not follow.
    """
    if type(envs) is not AgenticRAGVectorEnv:
        raise ConfigurationError(f"An outside learner needs env=agentic_rag, got a {type(envs).__name__}.")
    return AgenticRAGEnv(dataset=envs.dataset, retriever=envs.retriever, top_k=envs.top_k, **envs.rules.settings())
