"""The records of training. B trajectories, T tokens, N model-written tokens, V vocabulary.

Column t always describes token t itself. `old_logprobs[b, t]` is the log-probability of `written_ids[b, t]` given
everything before it, and `values[b, t]` is the value of the state just before it. The shift between a token and the
position that predicts it happens only in `collate.predicting_positions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from agentic_rag_env.types import Ending, StepInfo

if TYPE_CHECKING:
    from torch import Tensor

#: A tensor, or None unless it was asked for. The type is not `Tensor | None`, because a hook reads only what its
#: algorithm needs, and should not have to assert it.
OnDemand: TypeAlias = "Tensor | Any"


@dataclass(slots=True)
class Turn:
    """One action of the model and the reply of the environment.

    Attributes:
        action_ids: [n] int64, exactly as sampled.
        action_logprobs: [n] float32, nats, under the full distribution at the sampling temperature.
        observation_ids: [m] int64, the environment's reply, tokenized once; empty at the end of an episode.
        info: The environment's report of this step.
        end_unread: The last token of the action is an end of text that no later token has before it: as in Search-R1,
            the reply follows the words, and so stays inside the model's message. That the model ended here is still an
            action of its own, and is trained like any other. (If it were not, nothing would ever make it rarer.)
    """

    action_ids: np.ndarray
    action_logprobs: np.ndarray
    observation_ids: np.ndarray
    info: StepInfo
    end_unread: bool = False

    @property
    def read_ids(self) -> np.ndarray:
        """What later tokens have before them: action and observation, without an end of text that is not read."""
        return np.concatenate((self.action_ids[: len(self.action_ids) - self.end_unread], self.observation_ids))

    @property
    def num_read(self) -> int:
        """Length of `read_ids`."""
        return len(self.action_ids) - self.end_unread + len(self.observation_ids)


@dataclass(slots=True)
class Trajectory:
    """The record of one whole episode. It is append-only: each turn extends the last.

    Attributes:
        prompt_ids: [p] int64.
        turns: At least one turn.
        group_id: Equal for trajectories of the same prompt instance, unique otherwise.
        source: Who wrote the actions: "policy" or "teacher".
        reward: Sum of the environment's rewards.
        correct: The answer matched exactly.
        terminated: The agent answered.
        truncated: The episode ran out of turns or tokens, or the retriever failed.
        prompt: The first observation as text, from which a model with another chat template makes a prompt of its own.
    """

    prompt_ids: np.ndarray
    turns: list[Turn]
    group_id: int
    source: str
    reward: float
    correct: bool
    terminated: bool
    truncated: bool
    prompt: str = ""

    @property
    def ending(self) -> Ending | None:
        """Why the episode is over; None if an old file does not say it, see `Ending.of`."""
        return Ending.of(self.turns[-1].info)

    @property
    def error(self) -> str | None:
        """Message of the failed search that ended the episode; None if none did."""
        return self.turns[-1].info["error"] if self.ending is Ending.SEARCH_FAILED else None

    @property
    def num_action_tokens(self) -> int:
        """Model-written tokens of all turns."""
        return sum(len(turn.action_ids) for turn in self.turns)

    @property
    def num_tokens(self) -> int:
        """Length of the episode as a model reads it: prompt, actions and observations."""
        return len(self.prompt_ids) + sum(turn.num_read for turn in self.turns)


@dataclass(slots=True)
class Batch:
    """Trajectories side by side, padded on the right.

    Attributes:
        input_ids: [B, T] int64.
        attention_mask: [B, T] bool, False on padding; never inferred from ids.
        response_mask: [B, T] bool, True where the acting model wrote.
        old_logprobs: [B, T] float32, nats, of the policy that sampled; 0 elsewhere. As sampled, unless the learner has
            scored them anew (see `Learner.score`).
        rewards: [B] float32, episode return.
        correct: [B] bool, exact match.
        group_ids: [B] int64, same number for the same prompt instance.
        num_shared: Leading tokens that are the same in all trajectories, such as the instructions of the prompt.
        written_ids: [B, T] int64, what it wrote there; not read elsewhere. It differs from `input_ids` where the model
            ended its text and a reply took the place of that end (see `Turn.end_unread`). If it is not given, it is
            `input_ids`.
        sampled_logprobs: [B, T] float32, nats, as sampled, where `old_logprobs` were scored anew; else None.
        values: [B, T] float32, critic's value before token t; None unless "values" is needed.
        ref_logprobs: [B, T] float32, nats; None unless "ref_logprobs" is needed.
        ref_kl: [B, T] float32, nats, KL(sampling policy || reference) over the vocabulary; None unless needed.
        teacher_logprobs: [B, T] float32, nats; None unless "teacher_logprobs" is needed.
        teacher_kl: [B, T] float32, nats, KL(sampling policy || teacher) over the vocabulary; None unless needed.
        read_by_teacher: The same trajectories behind the prompts of the teacher's own chat template, with the same
            model-written tokens in the same order; None if the teacher reads prompts as the policy does.
        first_states: [B] int64, where `TeacherStates` keeps what the teacher has computed; None if it computes it anew.
        token_rewards: [B, T] float32, filled by `Algorithm.shape_rewards`.
        advantages: [B, T] float32, filled by `Algorithm.estimate_advantages`.
        returns: [B, T] float32, the critic's target; filled by `Algorithm.estimate_advantages`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    old_logprobs: Tensor
    rewards: Tensor
    correct: Tensor
    group_ids: Tensor
    num_shared: int = 0
    written_ids: OnDemand = None
    sampled_logprobs: OnDemand = None
    values: OnDemand = None
    ref_logprobs: OnDemand = None
    ref_kl: OnDemand = None
    teacher_logprobs: OnDemand = None
    teacher_kl: OnDemand = None
    read_by_teacher: Batch | None = None
    first_states: OnDemand = None
    token_rewards: OnDemand = None
    advantages: OnDemand = None
    returns: OnDemand = None

    def __post_init__(self) -> None:
        if self.written_ids is None:
            self.written_ids = self.input_ids

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def select(self, rows: Tensor | Sequence[int], length: int | None = None) -> Batch:
        """Take the given trajectories, and cut off padding that none of them needs.

        Args:
            rows: Row indices.
            length: Tokens of the longest of them, for callers who know it; None: the masks are read.
        """
        rows = self.group_ids.new_tensor(list(rows)) if isinstance(rows, Sequence) else rows.to(self.group_ids.device)
        if length is None:
            length = int(self.attention_mask[rows].sum(dim=1).max())
        picked: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, Batch):
                value = value.select(rows)
            elif value is not None and not isinstance(value, int):
                value = value[rows] if value.dim() == 1 else value[rows, :length]
            picked[name] = value
        return Batch(**picked)


@dataclass(slots=True)
class Tokens:
    """A block of n model-written tokens, as an algorithm's losses see it.

    Attributes:
        ids: [n] int64.
        sequence_ids: [n] int64, row of the trajectory in the batch.
        correct: [n] bool, whether the trajectory's answer matches exactly.
        old_logprobs: [n] float32, nats, from the policy that sampled.
        sampled_logprobs: [n] float32, nats, see `Batch`.
        logprobs: [n] float32, nats, from the policy being trained; carries gradient.
        values: [n] float32, the critic's values now; carries gradient; only in `value_loss`.
        old_values: [n] float32, the critic's values before the update.
        advantages, returns: [n] float32.
        ref_logprobs, teacher_logprobs: [n] float32, nats.
        entropy: [n] float32, nats, entropy of the policy's distribution; carries gradient; if needed.
        logits, teacher_logits: [n, V] float32, over the shared vocabulary, temperature applied; if needed.
    """

    ids: Tensor
    sequence_ids: Tensor
    correct: Tensor
    old_logprobs: Tensor
    sampled_logprobs: OnDemand = None
    logprobs: OnDemand = None
    values: OnDemand = None
    old_values: OnDemand = None
    advantages: OnDemand = None
    returns: OnDemand = None
    ref_logprobs: OnDemand = None
    teacher_logprobs: OnDemand = None
    entropy: OnDemand = None
    logits: OnDemand = None
    teacher_logits: OnDemand = None


@dataclass(slots=True)
class RolloutStats:
    """What one rollout cost.

    Attributes:
        seconds: Wall-clock time.
        sampled_tokens: Model-written tokens.
        computed_tokens: Tokens that went through the network, prompt and observations included, each once.
        retriever_errors: Episodes ended by a failed search.
        cache_hits, cache_misses: Queries that a caching retriever knew, and those that it did not; 0 without one.
    """

    seconds: float = 0.0
    sampled_tokens: int = 0
    computed_tokens: int = 0
    retriever_errors: int = 0
    cache_hits: int = 0
    cache_misses: int = 0

    @classmethod
    def of_all(cls, parts: Sequence[RolloutStats]) -> RolloutStats:
        """What a rollout cost that several processes have shared: the longest time, and the sums of the rest."""
        sums = {field.name: sum(getattr(part, field.name) for part in parts) for field in fields(cls)}
        return cls(**{**sums, "seconds": max(part.seconds for part in parts)})
