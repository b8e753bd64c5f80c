"""Demonstrations from a file of turns as text, whoever wrote it. The run's environments answer the turns anew.

JSON lines, plain or `.gz`. Two forms, also mixed:

- `{"question_id": "q7", "turns": ["<think>..</think><search>..</search>", "<think>..</think><answer>..</answer>"]}`;
  `question`, the text of the question, may stand in place of `question_id`.
- a line of a trajectory file of a run, whose `turns` are objects with `action` and `observation`. Where such an action
  ends with the policy's token for the end of a text, that token is no part of the text.

An observation in the file is compared with what the environment answers, and never used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agentic_rag_env.answers import normalize_answer
from agentic_rag_env.corpus import read_jsonl
from agentic_rag_env.errors import ConfigurationError, DataError
from agentic_rag_env.files import sha256
from agentic_rag_env.retrievers.base import encodable
from algorithms.learner.config import DemonstrationsConfig
from algorithms.learner.types import Trajectory
from algorithms.rollout.tokenization import control_tokens, decode, encode_plain
from algorithms.training.demonstrations.source import DEMONSTRATION_SOURCES, Authored, Dialogue


class Script(NamedTuple):
    """A line of the file: what is written in each turn, and what came back where that was recorded (None: not told)."""

    question_index: int
    actions: list[str]
    observations: list[str | None]


@DEMONSTRATION_SOURCES.register("file", DemonstrationsConfig)
class File(Authored):
    """The turns of a file.

    Raises:
        ConfigurationError: No path is given, or none of the questions is a training question.
        DataError: A line has another form; the message names the line.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.config.path is None:
            raise ConfigurationError("demonstrations.source=file needs demonstrations.path, a file of JSON lines.")
        path = Path(self.config.path).expanduser()
        if not path.is_file():
            raise ConfigurationError(f"demonstrations.path={self.config.path} is no file.")
        self._hash = sha256(path)
        by_id = {question.id: index for index, question in enumerate(self.envs.dataset)}
        texts = [normalize_answer(question.text) for question in self.envs.dataset]
        by_text = {text: index for index, text in enumerate(texts) if text}
        self.scripts: list[Script] = []
        unknown, tokens = 0, tuple(control_tokens(self.networks.tokenizer))
        for number, row in read_jsonl(path):
            place = f"{path}, line {number}"
            index = _question_index(row, by_id, by_text, texts, place)
            if index is None:
                unknown += 1
            else:
                self.scripts.append(Script(index, *_turns(row, place, tokens)))
        self.num_items = len(self.scripts)
        self.counts = {"unknown_question": unknown}
        if not self.scripts:
            raise ConfigurationError(
                f"{path.name} has demonstrations of {unknown} questions, none of which is a training question of this "
                "run; check dataset, or name the questions by the ids or texts that it has."
            )

    @property
    def fingerprint(self) -> Any:
        """The content of the file, wherever it lies."""
        return self._hash

    def question_index(self, item: int) -> int:
        """See `Authored`."""
        return self.scripts[item].question_index

    def write(self, dialogues: Sequence[Dialogue]) -> list[str]:
        """The next turn of each script."""
        texts = []
        for dialogue in dialogues:
            script, turn = self.scripts[dialogue.item], len(dialogue.actions)
            if turn and not self._is_same(script.observations[turn - 1], dialogue.observations[-1]):
                dialogue.dropped = "environment_differs"
            elif turn == len(script.actions):
                dialogue.dropped = "unfinished"
            texts.append("" if dialogue.dropped else script.actions[turn])
        return texts

    def check(self, dialogue: Dialogue, trajectory: Trajectory) -> str | None:
        """Drop an episode that ended before its turns did: another environment answered the later ones."""
        told = len(self.scripts[dialogue.item].actions)
        ended_early = dialogue.dropped is None and trajectory.terminated and len(trajectory.turns) < told
        return "environment_differs" if ended_early else dialogue.dropped

    def _is_same(self, told: str | None, observed: str) -> bool:
        tokenizer = self.networks.tokenizer
        if told is None:
            return True
        # Both as the tokenizer gives them back: one with unknown tokens does not give back every text.
        return decode(tokenizer, encode_plain(tokenizer, [told])[0].tolist()).strip() == observed.strip()


def _question_index(
    row: dict[str, Any], by_id: dict[str, int], by_text: dict[str, int], texts: Sequence[str], place: str
) -> int | None:
    """The training question that a row names; None if there is none. An id counts unless the row's text denies it."""
    identifier, text = row.get("question_id"), row.get("question")
    if isinstance(text, dict):  # as our own trajectory files have it
        text = text.get("text")
    if not isinstance(identifier, str) and not isinstance(text, str):
        raise DataError(f"{place}: needs 'question_id' or 'question', a string; the row has {', '.join(row)}.")
    index = by_id.get(identifier) if isinstance(identifier, str) else None
    if not isinstance(text, str):
        return index
    asked = normalize_answer(text)
    return index if index is not None and texts[index] == asked else by_text.get(asked)


def _turns(row: dict[str, Any], place: str, control_tokens: tuple[str, ...]) -> tuple[list[str], list[str | None]]:
    """Read the text of each turn and its observation; the observation is None if the row has none."""
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{place}, field 'turns': expected a list of texts, got {turns!r:.80}.")
    objects = [turn if isinstance(turn, dict) else {"action": turn} for turn in turns]
    actions = [turn.get("action") for turn in objects]
    observations = [turn.get("observation") for turn in objects]
    for number, (action, observation) in enumerate(zip(actions, observations, strict=True), 1):
        if not isinstance(action, str) or not isinstance(observation, (str, type(None))):
            raise DataError(
                f"{place}, turn {number}: expected a text, or an object with the text 'action' and perhaps "
                f"'observation', got {turns[number - 1]!r:.80}."
            )
        if action != encodable(action):
            raise DataError(
                f"{place}, turn {number}: holds half of a surrogate pair, which is no text: {action!r:.80}."
            )
    return [_text(turn, control_tokens) for turn in objects], observations


def _text(turn: Mapping[str, Any], control_tokens: tuple[str, ...]) -> str:
    """The text of an action. A run's own files have the token that ended it at its end."""
    action = str(turn["action"])
    ends = [token for token in control_tokens if action.endswith(token)] if "action_ids" in turn else []
    return action.removesuffix(max(ends, key=len, default=""))
