"""Searching without language: a controller picks, from numbered spans, what to search for and what to answer."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, SupportsInt

import gymnasium
import numpy as np
from gymnasium import spaces

from agentic_rag_env.actions import Action, Answer, Malformed, Search
from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.settings import COUNT, check_value
from agentic_rag_env.types import Passage, StepInfo
from agentic_rag_env.wrappers.spans import common_words, find_spans, words
from agentic_rag_env.wrappers.view import View

#: Number of passages in which the default words are counted; more would only take longer.
_COUNTED_PASSAGES = 20_000
_NUM_HASHES = 16
_NUM_STATE_FEATURES = 3
_NUM_CANDIDATE_FEATURES = 12


@dataclass(slots=True)
class _Candidate:
    """A span that was read, and where it was read last.

    Attributes:
        text: The span.
        words: Its words in lower case.
        in_question: The question contains it.
        num_passages: Passages read that contain it.
        searched: Whether it was searched for.
        search: Number of the search that brought it last; 0: none did.
        rank: Rank of the best passage of that search that contains it, from 1.
        position: Share of that passage's words before it.
        in_title: It stands in that passage's title.
        passage: Words of that passage.
    """

    text: str
    words: frozenset[str]
    in_question: bool = False
    num_passages: int = 0
    searched: bool = False
    search: int = 0
    rank: int = 1
    position: float = 0.0
    in_title: bool = False
    passage: frozenset[str] = frozenset()


class DiscreteActions(View[np.ndarray, np.integer]):
    """A view of `AgenticRAGEnv` with numbered actions and numeric observations, for learners that know no text.

    ## Description
    The view reads questions and passages for the agent and keeps a list of *candidates*: spans of words that are not
    common, such as names. Candidates of the question come first, then those of the latest search in their order, then
    earlier ones. If the list is too long, its last candidates are left out. An action picks a candidate. The agent
    can't think, and it can't say a word that it has not read, except for the query words.

    ## Action Space
    `Discrete(1 + C * (2 + W) + C)` with C candidates and W query words:

    | action | meaning |
    | --- | --- |
    | 0 | search the question itself |
    | 1 + c * (2 + W) | search candidate c |
    | 2 + c * (2 + W) | search candidate c, followed by the common words of the question |
    | 3 + c * (2 + W) + w | search candidate c, followed by query word w |
    | 1 + C * (2 + W) + c | answer candidate c |

    `action_masks()` tells which of them are possible: candidates that exist, and no search in a last turn that does not
    execute it. Any other action of the space is a malformed turn; one outside of it is refused.

    ## Observation Space
    `Box(0, 1, float32)`, flat: features of the state, then those of each candidate, 0 where there is none.

    State: share of the turns taken; only an answer is possible; share of the candidates in use; which question words
    the question contains; which query words the queries so far contained.

    Candidate: 1 for existing; in the question; in the latest result; 1 / rank of its passage; position in it; in its
    title; passages that contain it (of 8); searched before; in the last query; share of the last query's words in its
    passage; share of the question's words in its passage; length (of 4 words); which query words its passage contains;
    which of 16 buckets its letter trigrams fall into. "Its passage" is the best one of the latest search that found it.

    ## Starting State, Rewards, Episode End, Information
    Those of the environment. Passages are read uncut from `info["passages"]`.

    ## Arguments
    ```python
    env = DiscreteActions(gymnasium.make("AgenticRAG-v0"))
    observation, info = env.reset(seed=0)
    action = env.action_space.sample(env.action_masks().astype("int8"))
    observation, reward, terminated, truncated, info = env.step(action)
    ```

    Args:
        env: The environment to view.
        max_candidates: C, at least 1.
        question_words: Common words of questions, in lower case; by default those of the environment's dataset.
        query_words: Words that a query may add, in lower case; by default the common words of the dataset's corpus,
            none where it has no corpus. A controller plays other questions with the words that it was trained with.

    Raises:
        ConfigurationError: The environment is another one, or a setting can't work.

    Attributes:
        reply: The text behind the observation: the prompt, or what the environment wrote last.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        max_candidates: int = 12,
        question_words: Sequence[str] | None = None,
        query_words: Sequence[str] | None = None,
    ) -> None:
        super().__init__(env)
        check_value("max_candidates", max_candidates, COUNT)
        dataset = self.env.dataset
        if question_words is None:
            question_words = common_words(question.text for question in dataset)
        if query_words is None:
            corpus: Iterable[Passage] = itertools.islice(dataset.corpus or (), _COUNTED_PASSAGES)
            query_words = common_words(passage.contents for passage in corpus)
        self.max_candidates = max_candidates
        self.question_words, self.query_words = tuple(question_words), tuple(query_words)
        self._common = frozenset(self.question_words) | frozenset(self.query_words)
        self._query_columns = {word: column for column, word in enumerate(self.query_words)}
        self._searches_per_candidate = 2 + len(self.query_words)
        self._first_answer = 1 + max_candidates * self._searches_per_candidate
        self.num_state_features = _NUM_STATE_FEATURES + len(self.question_words) + len(self.query_words)
        self.num_candidate_features = _NUM_CANDIDATE_FEATURES + len(self.query_words) + _NUM_HASHES
        self._width = self.num_state_features + max_candidates * self.num_candidate_features
        self.action_space = spaces.Discrete(self._first_answer + max_candidates)
        self.observation_space = spaces.Box(0.0, 1.0, (self._width,), np.float32)
        self._read: dict[str, _Candidate] = {}
        self._candidates: list[_Candidate] = []
        self._question = self._searched_question = self._question_tail = self.reply = ""
        self._question_set: frozenset[str] = frozenset()
        self._turn, self._num_searches = 0, 0
        self._query: frozenset[str] = frozenset()
        self._queried_words: set[str] = set()

    @property
    def candidates(self) -> tuple[str, ...]:
        """The spans that actions refer to at the moment, at most `max_candidates`."""
        return tuple(candidate.text for candidate in self._candidates)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, StepInfo]:  # type: ignore[override]
        """Begin an episode; see `AgenticRAGEnv.reset`."""
        super().reset(seed=seed)
        self.reply, info = self.env.reset(seed=seed, options=options)
        assert self.env.question is not None
        self._question = self.env.question.text
        # What is written may spell no tag of the protocol, whatever the question says.
        self._searched_question = re.sub(r"\s*[<>]+\s*", " ", self._question).strip()
        self._question_set = frozenset(words(self._question))
        self._question_tail = " ".join(word for word in words(self._question) if word in self._common)
        self._read, self._turn, self._num_searches = {}, 0, 0
        self._query, self._queried_words = frozenset(), set()
        # A question of common words alone leaves nothing to pick, so it is picked from as a whole.
        found = [span.text for span in find_spans(self._question, self._common)] or [" ".join(words(self._question))]
        for text in found:
            self._read[text.casefold()] = _Candidate(text, frozenset(words(text)), in_question=True)
        self._rank_candidates()
        return self._observe(), info

    def step(self, action: SupportsInt) -> tuple[np.ndarray, float, bool, bool, StepInfo]:  # type: ignore[override]
        """Take one turn; see the table of actions.

        Raises:
            ResetNeededError: No episode is running.
            ConfigurationError: There is no such action.
        """
        meaning = self.meaning(int(action))
        self.reply, reward, terminated, truncated, info = self.env.step(self.text(meaning))
        self._turn = info["turn"]
        if info["action"] == "search":
            assert info["query"] is not None
            self._note_query(info["query"])
            self._note_passages(info["passages"])
        self._rank_candidates()
        return self._observe(), reward, terminated, truncated, info

    def action_masks(self) -> np.ndarray:
        """Which actions are possible now, [actions] bool; the name is the one that sb3-contrib asks for."""
        mask = np.zeros(int(self.action_space.n), dtype=np.bool_)  # type: ignore[attr-defined]
        num = len(self._candidates)
        mask[: 1 + num * self._searches_per_candidate] = not self._answer_only
        mask[self._first_answer : self._first_answer + num] = True
        return mask

    def meaning(self, action: int) -> Action:
        """What an action stands for at the moment; `Malformed` where the mask forbids it.

        Raises:
            ConfigurationError: There is no such action.
        """
        mask = self.action_masks()
        if not 0 <= action < len(mask):
            raise ConfigurationError(
                f"action must be one of the {len(mask)} of action_space, 0 to {len(mask) - 1}, got {action}; "
                "action_masks() tells which are possible now."
            )
        if not mask[action]:
            return Malformed("not possible now")
        if action >= self._first_answer:
            return Answer(self._candidates[action - self._first_answer].text)
        if action == 0:
            return Search(self._searched_question)
        candidate, kind = divmod(action - 1, self._searches_per_candidate)
        tail = ("", self._question_tail, *self.query_words)[kind]
        return Search(f"{self._candidates[candidate].text} {tail}".strip())

    def text(self, meaning: Action) -> str:
        """The turn that is written for the environment."""
        if isinstance(meaning, Search):
            return f"<search> {meaning.query} </search>"
        if isinstance(meaning, Malformed):
            return ""
        forced = self.env.rules.final_turn == "forced" and self._turn == self.env.rules.max_turns
        return f"{'' if forced else '<answer>'} {meaning.text} </answer>"

    # --- reading -----------------------------------------------------------------------------------------------------

    @property
    def _answer_only(self) -> bool:
        """Whether the next turn is one in which a search is not executed."""
        return self._turn >= self.env.rules.max_turns

    def _note_query(self, query: str) -> None:
        self._query = frozenset(words(query))
        self._queried_words |= self._query
        for candidate in self._read.values():
            candidate.searched |= candidate.words <= self._query

    def _note_passages(self, passages: Sequence[Passage]) -> None:
        self._num_searches += 1
        for rank, passage in enumerate(passages, 1):
            contained = words(passage.contents)
            distinct = frozenset(contained)
            in_title = len(words(passage.title))
            seen: set[str] = set()
            for span in find_spans(passage.contents, self._common):
                key = span.text.casefold()
                candidate = self._read.setdefault(key, _Candidate(span.text, frozenset(words(span.text))))
                candidate.num_passages += key not in seen
                if candidate.search < self._num_searches:
                    candidate.search, candidate.rank = self._num_searches, rank
                    candidate.position = span.position / len(contained)
                    candidate.in_title = span.position < in_title
                    candidate.passage = distinct
                seen.add(key)

    def _rank_candidates(self) -> None:
        ranked = sorted(self._read.values(), key=lambda each: (not each.in_question, -each.search, each.rank))
        self._candidates = ranked[: self.max_candidates]

    # --- observing ---------------------------------------------------------------------------------------------------

    def _observe(self) -> np.ndarray:
        observation = np.zeros(self._width, dtype=np.float32)
        state = observation[: self.num_state_features]
        state[0] = min(1.0, self._turn / self.env.rules.num_calls)
        state[1] = self._answer_only
        state[2] = len(self._candidates) / self.max_candidates
        contained = [word in self._question_set for word in self.question_words]
        contained += [word in self._queried_words for word in self.query_words]
        state[_NUM_STATE_FEATURES:] = contained
        rows = observation[self.num_state_features :].reshape(self.max_candidates, self.num_candidate_features)
        for row, candidate in zip(rows, self._candidates, strict=False):
            self._describe(candidate, row)
        return observation

    def _describe(self, candidate: _Candidate, row: np.ndarray) -> None:
        passage = candidate.passage
        row[:_NUM_CANDIDATE_FEATURES] = (
            1.0,
            candidate.in_question,
            candidate.search == self._num_searches > 0,
            1 / candidate.rank if passage else 0.0,
            candidate.position,
            candidate.in_title,
            min(1.0, candidate.num_passages / 8),
            candidate.searched,
            bool(self._query) and candidate.words <= self._query,
            _overlap(self._query, passage),
            _overlap(self._question_set, passage),
            min(1.0, len(candidate.text.split()) / 4),
        )
        for word in passage:
            if (column := self._query_columns.get(word)) is not None:
                row[_NUM_CANDIDATE_FEATURES + column] = 1.0
        row[-_NUM_HASHES:] = _hashed_trigrams(candidate.text)


def _overlap(wanted: frozenset[str], contained: frozenset[str]) -> float:
    """Share of the wanted words that are contained, in [0, 1]."""
    return len(wanted & contained) / len(wanted) if wanted else 0.0


@lru_cache(maxsize=65536)
def _hashed_trigrams(text: str) -> np.ndarray:
    """Which buckets the letter trigrams of a text fall into, [16] float32; the same on every machine."""
    padded = f"  {text.lower()} "
    grams = [padded[start : start + 3].encode("utf-8", "surrogatepass") for start in range(len(padded) - 2)]
    buckets = [zlib.crc32(gram) % _NUM_HASHES for gram in grams]
    row = np.zeros(_NUM_HASHES, dtype=np.float32)
    row[buckets] = 1.0
    return row
