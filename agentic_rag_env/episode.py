"""One episode as a state machine without input or output, which the single and the vector environment share.

The search happens outside, between `Episode.act` and `Episode.observe`, so that many episodes can share one search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from agentic_rag_env.actions import ANSWER_OPEN, Action, Answer, Malformed, Search, parse_action
from agentic_rag_env.budget import Budget
from agentic_rag_env.errors import ConfigurationError, ResetNeededError, RetrieverError
from agentic_rag_env.prompts import MALFORMED_HINT, information_block, render_prompt
from agentic_rag_env.retrievers.base import Retriever
from agentic_rag_env.rewards import Outcome, Reward, check_reward, exact_match, f1_score
from agentic_rag_env.settings import COUNT, Allowed, at_least, check_settings, one_of, or_none
from agentic_rag_env.types import Ending, Found, Passage, Question, StepInfo, blank_info

#: What happens after the last turn that may search; `Rules` explains them.
FinalTurn: TypeAlias = Literal["none", "no_search", "forced"]
FINAL_TURNS: tuple[str, ...] = get_args(FinalTurn)


class StepResult(NamedTuple):
    """What `step` returns, in Gymnasium's order."""

    observation: str
    reward: float
    terminated: bool
    truncated: bool
    info: StepInfo


@dataclass(frozen=True)
class Rules:
    """The settings of an episode.

    Attributes:
        reward: Scores an episode that has ended.
        prompt: Name of a template, or a template with `{question}`.
        max_turns: Number of turns that may search, malformed ones included.
        final_turn: "none": the episode is truncated after these turns. "no_search": one more turn follows, in which an
            answer counts and a search is not executed. "forced": the same, but the last observation ends with
            `<answer>`, and the agent's text is read as its continuation.
        max_observation_chars: Bound of a passage block, tags included; None: unbounded.
        max_observation_tokens: The same in tokens of the tokenizer; None: unbounded.
        tokenizer: An object with `encode(text, add_special_tokens=False)`, used only with `max_observation_tokens`.

    Raises:
        ConfigurationError: A setting is out of range, or leaves no room for the empty block.
    """

    reward: Reward
    prompt: str
    max_turns: int
    final_turn: FinalTurn
    max_observation_chars: int | None
    max_observation_tokens: int | None
    tokenizer: Any

    def __post_init__(self) -> None:
        check_reward(self.reward)
        render_prompt(self.prompt, "")
        check_settings(self, COUNT, "max_turns")
        check_settings(self, one_of(FINAL_TURNS), "final_turn")
        check_settings(self, or_none(COUNT, "no bound"), "max_observation_chars", "max_observation_tokens")
        self._check_budget()

    def settings(self) -> dict[str, Any]:
        """Return the settings by name, as the environments take them."""
        return {setting.name: getattr(self, setting.name) for setting in fields(self)}

    def _check_budget(self) -> None:
        if self.max_observation_chars is not None and self.max_observation_tokens is not None:
            raise ConfigurationError(
                f"max_observation_chars={self.max_observation_chars} and max_observation_tokens="
                f"{self.max_observation_tokens} are both set; set one of them."
            )
        if self.max_observation_tokens is not None and self.tokenizer is None:
            raise ConfigurationError(
                f"max_observation_tokens={self.max_observation_tokens} needs a tokenizer to count with; pass "
                "tokenizer=..., or use max_observation_chars."
            )
        if self.max_observation_tokens is not None and not hasattr(self.tokenizer, "encode"):
            raise ConfigurationError(
                f"tokenizer must have encode(text, add_special_tokens=False), got {self.tokenizer!r}."
            )
        empty = information_block("") + (ANSWER_OPEN if self.final_turn == "forced" else "")
        for name in ("max_observation_chars", "max_observation_tokens"):
            if getattr(self, name) is not None:
                least = self.budget.length(empty)
                words = f"at least {least}, the length of an observation without passages"
                check_settings(self, Allowed(words, at_least(least).test), name)

    @property
    def num_calls(self) -> int:
        """Most turns of an episode, the final one included."""
        return self.max_turns + (self.final_turn != "none")

    def parse(self, text: str, turn: int) -> Action:
        """The action in the text of a turn, counted from 1; the text may repeat a forced `<answer>` tag."""
        action = parse_action(text)
        if isinstance(action, Malformed) and self.final_turn == "forced" and turn == self.num_calls:
            return parse_action(ANSWER_OPEN + text)
        return action

    def reply(self, passages: Sequence[Passage] | None, turn: int) -> str:
        """The observation after a turn that did not end the episode.

        Args:
            passages: The passages that the search found; None after a malformed turn.
            turn: Number of the turn, counted from 1.

        Returns:
            The passages in their tags, with their text cut to the budget, or the hint. `<answer>` follows where an
            answer is forced next.
        """
        suffix = ANSWER_OPEN if self.final_turn == "forced" and turn == self.max_turns else ""
        if passages is None:
            return MALFORMED_HINT + suffix
        return self.budget.observation(passages, suffix)

    @property
    def budget(self) -> Budget:
        """The bound of a passage block."""
        return Budget(self.max_observation_chars, self.max_observation_tokens, self.tokenizer)


class Episode:
    """One episode, from the prompt to its ending; the object can begin any number of episodes in a row.

    Args:
        rules: The settings.

    Attributes:
        question: The question that is asked; None before the first one.
        running: Whether `act` may be called.
        turn: Number of turns taken.
        transcript: All texts so far: prompt, model, environment, model, ...
    """

    def __init__(self, rules: Rules) -> None:
        self.question: Question | None = None
        self.running = False
        self.turn = 0
        self.transcript: list[str] = []
        self._rules = rules
        self._num_searches = 0
        self._action: Action | None = None
        self._info: StepInfo | None = None

    def begin(self, question: Question) -> str:
        """Start over with a question, and return the prompt."""
        prompt = render_prompt(self._rules.prompt, question.text)
        self.question = question
        self.running = True
        self.turn = 0
        self.transcript = [prompt]
        self._num_searches = 0
        self._action = None
        return prompt

    def act(self, text: str) -> str | None:
        """Read the model's turn.

        Args:
            text: What the model wrote.

        Returns:
            The query to search for; None where there is nothing to search. In both cases, call `observe` next.

        Raises:
            ResetNeededError: No episode is running.
            TypeError: The text is no string.
        """
        if not isinstance(text, str):
            raise TypeError(f"An action is the text of one turn (str), got {type(text).__name__}: {text!r}")
        if not self.running:
            state = "was called before reset" if self.question is None else "was called after the end of the episode"
            raise ResetNeededError(f"step {state}; call reset to begin an episode.")
        self.running = False  # until `observe`: an episode whose search raised can't go on
        self.turn += 1
        self.transcript.append(text)
        self._action = self._rules.parse(text, self.turn)
        if isinstance(self._action, Search) and self.turn <= self._rules.max_turns:
            return self._action.query
        return None

    def observe(self, found: Found | None) -> StepResult:
        """Complete the turn that `act` began.

        Args:
            found: The result of the search, or its failure; None where `act` asked for no search.
        """
        action = self._action
        assert action is not None, "observe comes after act"
        self._action = None
        if isinstance(action, Answer):
            return self._answer(action.text)
        if isinstance(action, Malformed):
            return self._continue(None, self.report(action="malformed"))
        if isinstance(found, RetrieverError):
            message = str(found) or type(found).__name__
            return self._end(Ending.SEARCH_FAILED, self.report(action="search", query=action.query, error=message))
        self._num_searches += found is not None
        passages = tuple(found or ())
        return self._continue(passages, self.report(action="search", query=action.query, passages=passages))

    def cut_off(self) -> StepResult:
        """End an episode that its player has no room to go on with.

        The last observation is taken back, because nobody reads it.

        Returns:
            The last step in its new form: an empty observation, the reward of an episode without an answer, truncated,
            and the same info with the ending "out_of_tokens".

        Raises:
            ResetNeededError: No episode is running, or it has not yet had a turn.
        """
        if not self.running or not self.turn:
            raise ResetNeededError("cut_off ends an episode between two turns, and none is there; call reset and step.")
        self.running = False
        self.transcript.pop()
        assert self._info is not None
        return self._end(Ending.OUT_OF_TOKENS, self._info)

    def report(self, **changes: Any) -> StepInfo:
        """The info of a turn; a key that is not given has the value of a turn in which nothing of its kind happened."""
        assert self.question is not None
        info = blank_info(self.question.id, self.turn)
        info["num_searches"] = self._num_searches
        info.update(changes)  # type: ignore[typeddict-item]
        return info

    def _continue(self, passages: Sequence[Passage] | None, info: StepInfo) -> StepResult:
        if self.turn == self._rules.num_calls:
            return self._end(Ending.OUT_OF_TURNS, info)
        observation = self._rules.reply(passages, self.turn)
        self.transcript.append(observation)
        self.running = True
        self._info = info
        return StepResult(observation, 0.0, False, False, info)

    def _answer(self, answer: str) -> StepResult:
        assert self.question is not None
        golden_answers = self.question.golden_answers
        match = exact_match(answer, golden_answers)
        info = self.report(
            action="answer", answer=answer, exact_match=match, f1=f1_score(answer, golden_answers), correct=match == 1.0
        )
        return self._end(Ending.ANSWERED, info)

    def _end(self, ending: Ending, info: StepInfo) -> StepResult:
        """The last step of the episode. A failed search is not the agent's fault, so it earns 0 whatever the reward."""
        reward = 0.0 if ending is Ending.SEARCH_FAILED else self._earned(info["answer"])
        answered = ending is Ending.ANSWERED
        return StepResult("", reward, answered, not answered, info | {"ending": ending})

    def _earned(self, answer: str | None) -> float:
        """The reward of the episode, which ends here."""
        assert self.question is not None
        prompt, *texts = self.transcript
        turns = tuple(zip_longest(texts[::2], texts[1::2], fillvalue=""))
        try:
            reward = float(self._rules.reward(Outcome(self.question, answer, prompt, turns)))
        except Exception as error:
            error.add_note(f"While scoring the answer to question {self.question.id!r}: {answer!r}")
            raise
        if not math.isfinite(reward):
            raise ConfigurationError(
                f"A reward must be a finite number, got {reward} for the answer {answer!r} to question "
                f"{self.question.id!r}."
            )
        return reward


def search(retriever: Retriever, queries: Sequence[str], top_k: int, question_ids: Sequence[str]) -> Sequence[Found]:
    """Search for the queries of one or more episodes at once.

    Args:
        retriever: Where to search.
        queries: The queries, at least one.
        top_k: Most passages per query.
        question_ids: Ids of the episodes' questions, for error messages.

    Returns:
        The passages for each query, or a `RetrieverError` in their place. If the whole search failed, every query has
        the same `RetrieverError`.

    Raises:
        ValueError: The retriever broke its contract.
        Exception: Whatever else the retriever raises, with a note naming the questions.
    """
    try:
        found = retriever.search(queries, top_k)
        if len(found) != len(queries):
            raise ValueError(
                f"{type(retriever).__name__}.search returned {len(found)} results for {len(queries)} queries; it must "
                "return one list of passages per query."
            )
    except RetrieverError as error:
        return [error] * len(queries)
    except Exception as error:
        error.add_note(f"While searching for question {', '.join(map(repr, question_ids))}: {list(queries)!r}")
        raise
    return found
