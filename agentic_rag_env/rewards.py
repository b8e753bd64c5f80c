"""Rewards: functions that say what an episode earns.

A reward is a function of an `Outcome`, a whole episode that has ended, with or without an answer. `answer_reward` makes
one from a score, a function of an answer and the golden answers; see `answers`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from agentic_rag_env.actions import CLOSING_TAGS
from agentic_rag_env.answers import exact_match, f1_score, normalize_answer, sub_exact_match
from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.prompts import INFORMATION_CLOSE, INFORMATION_OPEN
from agentic_rag_env.registry import REWARDS
from agentic_rag_env.settings import FRACTION, check_settings
from agentic_rag_env.types import Question


@dataclass(frozen=True, slots=True)
class Outcome:
    """An episode that has ended, as a reward sees it.

    Attributes:
        question: The question, with its golden answers.
        answer: The parsed answer; None where the episode ended without one.
        prompt: The first observation.
        turns: The model's text and the environment's reply for each turn; the reply to the last one is "".
    """

    question: Question
    answer: str | None
    prompt: str
    turns: tuple[tuple[str, str], ...]


Reward: TypeAlias = Callable[[Outcome], float]


def answer_reward(score: Callable[[str | None, tuple[str, ...]], float]) -> Reward:
    """The reward that looks at nothing but the answer.

    Args:
        score: Function of the answer (None if there is none) and the golden answers, such as `f1_score`.
    """
    return _AnswerReward(score)


class _AnswerReward:
    """See `answer_reward`. It is a class and no closure, so that environments can be pickled."""

    def __init__(self, score: Callable[[str | None, tuple[str, ...]], float]) -> None:
        self.score = score
        # So that the registry tells it from the rewards made of other functions, and knows what module it depends on.
        self.__module__ = getattr(score, "__module__", type(self).__module__)
        self.__qualname__ = f"answer_reward({getattr(score, '__qualname__', repr(score))})"

    def __call__(self, outcome: Outcome) -> float:
        """The score of the answer."""
        return self.score(outcome.answer, outcome.question.golden_answers)

    def __repr__(self) -> str:
        return self.__qualname__


def check_reward(reward: Any) -> None:
    """Refuse a reward that can't be called with an `Outcome`.

    Raises:
        ConfigurationError: The reward can't be called so; the message says what a reward is.
    """
    try:
        inspect.signature(reward).bind(None)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"reward must be a name, or a function of one agentic_rag_env.rewards.Outcome, got {reward!r}. From a "
            "function of (answer, golden_answers), agentic_rag_env.rewards.answer_reward makes one."
        ) from error


REWARDS.register("exact_match")(answer_reward(exact_match))
REWARDS.register("sub_exact_match")(answer_reward(sub_exact_match))
REWARDS.register("f1")(answer_reward(f1_score))

_NO_TAG = r"(?:(?!</?(?:think|search|information|answer)>).)*"
_WELL_FORMED_TURN = re.compile(
    rf"\s*<think>{_NO_TAG}</think>\s*<(?P<action>search|answer)>{_NO_TAG}</(?P=action)>", re.DOTALL
)


def is_well_formed(outcome: Outcome) -> bool:
    """Whether each turn is just a thought and one action: executed searches, then an answer.

    Only the model's turns are read, each up to the tag that closes its action. The text of a passage has no effect. A
    forced answer has no thought before it and is not well-formed.
    """
    return (
        outcome.answer is not None
        and all(_WELL_FORMED_TURN.match(text) for text, _ in outcome.turns)
        and all(reply.startswith(INFORMATION_OPEN) for _, reply in outcome.turns[:-1])
    )


@dataclass
class FormatAwareConfig:
    """Weights of `FormatAware`, each in [0, 1], with the names and numbers of Search-R1 v0.3.

    Attributes:
        structure_format_score: Reward of a well-formed episode without the right answer; it is taken off the reward of
            a right answer in an episode that is not well-formed.
        final_format_score: Reward of a wrong answer in an episode that is not well-formed.
        retrieval_score: Reward added where a well-formed episode has retrieved a golden answer but not given it.
    """

    structure_format_score: float = 0.2
    final_format_score: float = 0.1
    retrieval_score: float = 0.0

    def __post_init__(self) -> None:
        check_settings(self, FRACTION, *vars(self))


@REWARDS.register("format_aware", FormatAwareConfig)
class FormatAware:
    """Exact match, and a smaller reward for the right form (Jin et al., arXiv:2505.15117; weights of Search-R1 v0.3).

    With w: the episode is well-formed (`is_well_formed`), m: exact match, g: a golden answer stands in the text of a
    retrieved passage block after normalization::

        m and w:              1
        m and not w:          1 - structure_format_score
        w and not m:          structure_format_score + retrieval_score * g
        neither, an answer:   final_format_score
        no answer:            0

    It differs from Search-R1 in three ways. There, tags in passages count as the model's, and a chat template is a
    condition of w. An episode without an answer earns final_format_score there, because an answer is found in its
    prompt.
    """

    def __init__(self, config: FormatAwareConfig) -> None:
        self.config = config

    def __call__(self, outcome: Outcome) -> float:
        """The reward of an episode."""
        config, well_formed = self.config, is_well_formed(outcome)
        if exact_match(outcome.answer, outcome.question.golden_answers):
            return 1.0 if well_formed else 1.0 - config.structure_format_score
        if well_formed:
            return config.structure_format_score + config.retrieval_score * _found_an_answer(outcome)
        return 0.0 if outcome.answer is None else config.final_format_score


def _found_an_answer(outcome: Outcome) -> bool:
    """Whether a well-formed episode has retrieved a golden answer."""
    blocks = [reply for _, reply in outcome.turns[:-1]]
    passages = [block.removeprefix(INFORMATION_OPEN).removesuffix(INFORMATION_CLOSE) for block in blocks]
    return any(sub_exact_match(passage, outcome.question.golden_answers) for passage in passages)


_ANSWER_SPAN = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@REWARDS.register("search_r1")
def search_r1(outcome: Outcome) -> float:
    """Exact match as the scorer of Search-R1 and DGPO finds it, mistakes included; for comparing with their numbers.

    That scorer reads prompt and response as one text. It takes the last complete answer span if there are at least two;
    this guard was meant to skip the example in the prompt. But their prompt holds two spans, "and" and "Beijing". So an
    episode without an answer has answered "Beijing", or "and" if a hint about an invalid action came last. Passages can
    answer too. A turn is cut as theirs: after its first `</search>` or, if it has none, after its first `</answer>`.

    Their cuts of long contexts, and the changes by re-tokenization, are not reproduced.

    Raises:
        ConfigurationError: The prompt holds no span, so that the guard would leave an episode's only answer unread.
    """
    if not _ANSWER_SPAN.search(outcome.prompt):
        raise ConfigurationError(
            "reward 'search_r1' takes the first answer span for the prompt's example, and this prompt has no "
            "<answer> ... </answer>; set prompt='search_r1' (env.prompt=search_r1), or choose another reward."
        )
    spans = _ANSWER_SPAN.findall(outcome.prompt + "".join(_cut(text) + reply for text, reply in outcome.turns))
    # As theirs and not `exact_match`: an answer that normalization empties matches a golden one that it empties.
    golden = [normalize_answer(alias) for alias in outcome.question.golden_answers]
    return float(len(spans) > 1 and normalize_answer(spans[-1]) in golden)


def _cut(text: str) -> str:
    for tag in CLOSING_TAGS:  # </search> first, wherever it stands
        head, closing, _ = text.partition(tag)
        if closing:
            return head + closing
    return text
