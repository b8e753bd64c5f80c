"""What a source of demonstrations is, and how texts become episodes of the run's own environments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from agentic_rag_env.actions import THINK_CLOSE, THINK_OPEN
from agentic_rag_env.probes.material import cut
from agentic_rag_env.registry import Registry
from agentic_rag_env.types import Question
from algorithms.learner import ranks
from algorithms.learner.config import DemonstrationsConfig
from algorithms.learner.types import RolloutStats, Trajectory
from algorithms.rollout.config import RolloutConfig
from algorithms.rollout.engine import Action
from algorithms.rollout.tokenization import decode, encode_plain, opened_thought
from algorithms.training.build import Networks

#: Sources of demonstrations by their names in `algo.demonstrations.source`; plug-ins may register more.
DEMONSTRATION_SOURCES = Registry("demonstrations")

#: A trajectory for each item; for each, why the source itself would drop it, or None; and the costs.
Played: TypeAlias = tuple[list[Trajectory], list[str | None], RolloutStats]


class Source(ABC):
    """Plays training questions. Its trajectories are filtered afterwards.

    Args:
        config: The settings.
        networks: The models of the run.
        envs: The training environments.
        rollout: How the run writes.

    Attributes:
        by_model: Whether a model of the run writes. The files must then be made anew when that model changes.
        num_items: Number of items to play, each a question or a line of a file; they are numbered from 0.
        counts: How many items were dropped before they were played, by reason.
        costs: What was spent elsewhere so far, by name.
    """

    by_model = False

    def __init__(self, config: DemonstrationsConfig, networks: Networks, envs: Any, rollout: RolloutConfig) -> None:
        self.config, self.networks, self.envs, self.rollout = config, networks, envs, rollout
        self.num_items = len(envs.dataset)
        self.counts: dict[str, float] = {}
        self.costs: dict[str, float] = {}

    @property
    def fingerprint(self) -> Any:
        """Plain data on which the demonstrations depend, beside the run's own settings; never a secret."""
        return None

    @abstractmethod
    def play(self, items: Sequence[int], seed: tuple[int, ...]) -> Played:
        """Play some of the items."""


@dataclass
class Dialogue:
    """An episode as its author sees it.

    Attributes:
        item: Number of the item that is played.
        question: The question.
        prompt: What the environment observed when the episode began.
        actions, observations: What was written so far and what came back, in order and equally many.
        dropped: Why the author gave up; None if it did not.
    """

    item: int
    question: Question
    prompt: str = ""
    actions: list[str] = field(default_factory=list)
    observations: list[str] = field(default_factory=list)
    dropped: str | None = None


class Authored(Source):
    """A source that writes text, turn by turn. Only `write` must be defined."""

    @abstractmethod
    def write(self, dialogues: Sequence[Dialogue]) -> list[str]:
        """Write the next turn of each episode. Where there is none, say why in `dropped` and return ""."""

    def question_index(self, item: int) -> int:
        """Which question of the environments an item is about."""
        return item

    def check(self, dialogue: Dialogue, trajectory: Trajectory) -> str | None:
        """Return a reason to drop an episode that has ended, or None."""
        return dialogue.dropped

    def play(self, items: Sequence[int], seed: tuple[int, ...]) -> Played:
        """See `Source`. The first process plays alone, because an author may be a server that bills, or keep notes."""
        return ranks.decided(lambda: self._play(items, seed))

    def _play(self, items: Sequence[int], seed: tuple[int, ...]) -> Played:
        indices = [self.question_index(item) for item in items]
        questions = [self.envs.dataset[index] for index in indices]
        dialogues = [Dialogue(item, question) for item, question in zip(items, questions, strict=True)]
        envs = _Observed(self.envs)
        engine = _TextEngine(self, envs, dialogues)
        played, stats = self.networks.player_of(engine, envs).rollout(indices, seed=seed, source="teacher")
        reasons = [self.check(*each) for each in zip(dialogues, played, strict=True)]
        return played, reasons, stats


class _Observed:
    """The environments as an author plays them: their prompts can be read, and episodes that were given up end.

    Attributes:
        prompts: The last prompt of each row.
        given_up: Rows whose episode the next step ends.
    """

    def __init__(self, envs: Any) -> None:
        self._envs = envs
        self.prompts: Sequence[str] = ()
        self.given_up: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._envs, name)

    def reset(self, *, options: Mapping[str, Any]) -> Any:
        """See `TextEnvs`."""
        self.prompts, infos = self._envs.reset(options=options)
        return self.prompts, infos

    def step(self, actions: Sequence[str | None]) -> Any:
        """See `TextEnvs`."""
        observations, rewards, terminations, truncations, infos = self._envs.step(actions)
        for row in self.given_up:
            if not terminations[row] and not truncations[row]:
                self._envs.cut_off(row)
                truncations[row] = True
        self.given_up.clear()
        return observations, rewards, terminations, truncations, infos


class _TextEngine:
    """An engine whose actions are an author's texts. The player opens a row for each dialogue, in their order.

    A text is cut at the end of its first action, and encoded once. A text that ends no action gets the end-of-text
    token, as a model would have ended it. The policy's chat template may have opened the first thought, or not, and the
    author's text is fitted to it. The environment reads the text that the tokens give back, as it does of a model. An
    author who gives up writes nothing, and is not asked again.
    """

    def __init__(self, author: Authored, envs: _Observed, dialogues: Sequence[Dialogue]) -> None:
        self.author, self.config, self.envs = author, author.rollout, envs
        self.tokenizer = author.networks.tokenizer
        self._has_opened_thought = bool(opened_thought(self.tokenizer))
        self.num_rows, self.computed_tokens = author.envs.num_envs, 0
        self._action_ends = tuple(author.envs.metadata["action_ends"])
        self._coming = iter(dialogues)
        self._open: dict[int, Dialogue] = {}
        self._waiting: list[int] = []

    def set_weights(self, model: Any) -> None:
        """Do nothing: this engine has no weights."""
        raise NotImplementedError("an author has no weights")

    def open(self, row: int, ids: np.ndarray, uniforms: np.ndarray | None = None) -> None:
        """See `Engine`."""
        self._open[row] = next(self._coming)
        self._open[row].prompt = self.envs.prompts[row]
        self._waiting.append(row)

    def append(self, row: int, ids: np.ndarray, uniforms: np.ndarray | None = None) -> None:
        """See `Engine`."""
        self._open[row].observations.append(decode(self.tokenizer, ids.tolist()))
        self._waiting.append(row)

    def write(self) -> list[Action]:
        """See `Engine`."""
        rows, self._waiting = self._waiting, []
        dialogues = [self._open[row] for row in rows]
        texts = self.author.write(dialogues) if rows else []
        actions = []
        for row, dialogue, text in zip(rows, dialogues, texts, strict=True):
            if dialogue.dropped is not None:
                self.envs.given_up.add(row)
            text = cut(text if dialogue.dropped is None else "", self._action_ends)
            actions.append(self._action(row, text if dialogue.actions else self._behind_prompt(text)))
            dialogue.actions.append(text)
        return actions

    def _behind_prompt(self, text: str) -> str:
        """Fit the first turn to a prompt that has opened a thought, or has not."""
        thought, closes, _ = text.partition(THINK_CLOSE)
        if not self._has_opened_thought:
            return THINK_OPEN + text if closes and THINK_OPEN not in thought else text
        if text.lstrip().startswith(THINK_OPEN):
            return text.lstrip().removeprefix(THINK_OPEN)
        return THINK_CLOSE + text if text and not closes else text

    def advance(self, max_steps: int) -> None:
        """Do nothing: an author writes whole actions."""

    def close(self, rows: Iterable[int]) -> None:
        """See `Engine`."""
        for row in rows:
            self._open.pop(row, None)

    def _action(self, row: int, text: str) -> Action:
        (ids,) = encode_plain(self.tokenizer, [text])
        text = decode(self.tokenizer, ids.tolist())
        eos = self.tokenizer.eos_token_id
        adds_eos = eos is not None and not text.endswith(self._action_ends)
        if adds_eos:
            ids = np.append(ids, eos)
        return Action(row, ids, np.zeros(len(ids), dtype=np.float32), text, adds_eos)
