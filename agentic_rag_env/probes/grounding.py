"""Probes of grounding: they tell whether an agent answers what it reads, or what it remembers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from agentic_rag_env.actions import Answer, parse_action
from agentic_rag_env.answers import answer_forms, holds_answer, words_of
from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.probes.figures import Figures
from agentic_rag_env.probes.gold import Gold, Identity, identity
from agentic_rag_env.probes.material import (
    DIRECTLY,
    Material,
    Prompt,
    cut,
    executed_searches,
    generated,
    of_search,
    play,
    worked,
)
from agentic_rag_env.prompts import render_prompt
from agentic_rag_env.registry import PROBES
from agentic_rag_env.retrievers.base import Retriever
from agentic_rag_env.rewards import exact_match, normalize_answer
from agentic_rag_env.settings import at_least, check_settings
from agentic_rag_env.types import Found, Passage, Question, StepInfo
from agentic_rag_env.unspaced import UNSPACED, UNSPACED_CHARS
from agentic_rag_env.vector import AgenticRAGVectorEnv

_MONTHS = "january february march april may june july august september october november december".split()
_NUMBERS = "one two three four five six seven eight nine ten eleven twelve hundred thousand million billion".split()
#: Number of environments that play together.
_NUM_ENVS = 64


@dataclass
class GroundingConfig:
    """Settings of the probes of grounding.

    Attributes:
        num_questions: Number of questions to play; the first ones that can be used are played.
    """

    num_questions: int = 200

    def __post_init__(self) -> None:
        check_settings(self, at_least(1), "num_questions")


@dataclass(frozen=True)
class Changed:
    """A question in a world in which its answer is another one.

    Attributes:
        number: Place of the question among the questions.
        answer: The answer that its gold passages give now.
        passages: These passages by the identity of the old ones. Retrievers may have other ids for them.
    """

    number: int
    answer: str
    passages: Mapping[Identity, Passage]


@PROBES.register("counterfactual", GroundingConfig)
@of_search
class Counterfactual:
    """Counterfactual passages: in the gold passages the golden answer is replaced by another question's answer.

    The new answer is of the same type: a date for a date, a number for a number, a name for a name. The metadata may
    name the type as `answer_type`. The agent plays whole episodes, and all passages that it finds show the new text. A
    question is left out if its answer can't be replaced. It is also left out if a passage that has to change is
    evidence of another question in its old form. The figures are over the other questions, i = 1..n:

    | figure | formula |
    | --- | --- |
    | `reads` | share of i that answer with the new text |
    | `remembers` | share of i that answer with the old text, though no passage that they were shown holds it |
    | `neither` | the rest |
    | `shown` | share of i that were shown a changed passage; the others had no new text to read |
    | `own_exact_match` | mean EM_i over the unchanged passages, over i whose search of these worked; needs `episodes` |
    | `left_out` | share of all questions that could not be changed |
    | `search_failed` | share of the played questions whose search failed, which are no i; left out if there is none |

    Args:
        config: How many questions to play.
    """

    def __init__(self, config: GroundingConfig) -> None:
        self.config = config

    def __call__(self, material: Material) -> Figures:
        """See the class."""
        changes = change(material)
        figures: Figures = {"left_out": material.share(_left_out(material, changes))}
        changes = changes[: self.config.num_questions]
        if not changes:
            return figures
        passages = {key: passage for one in changes for key, passage in one.passages.items()}
        questions = [replace(material.questions[one.number], golden_answers=(one.answer,)) for one in changes]
        places, episodes = _play(material, questions, Overlaid(_retriever(material), passages))
        figures |= material.search_failed(places, len(changes))
        changes = [changes[place] for place in places]
        if not changes:
            return figures
        old = [material.questions[one.number].golden_answers for one in changes]
        reads = _correct(episodes)
        remembers = [_remembers(episode, golden) for episode, golden in zip(episodes, old, strict=True)]
        neither = [not (read or remembered) for read, remembered in zip(reads, remembers, strict=True)]
        figures |= {
            "reads": material.share(reads, "high"),
            "remembers": material.share(remembers, "low"),
            "neither": material.share(neither),
            "shown": material.share([_shown(*pair) for pair in zip(episodes, changes, strict=True)], "high"),
        }
        return figures | _own_exact_match(material, [one.number for one in changes])


@PROBES.register("shuffled", GroundingConfig)
@of_search
class Shuffled:
    """Shuffled passages: every search brings the passages that another question would have found.

    An agent that reads falls to the level that it reaches without any passage (closed book). The figures are over the
    first questions, i = 1..n:

    | figure | formula |
    | --- | --- |
    | `exact_match` | mean EM_i with passages of other questions |
    | `closed_book_exact_match` | mean EM_i of answers given at once, without a search; needs `generate` |
    | `own_exact_match` | mean EM_i with the question's own passages, where that search worked; needs `episodes` |
    | `search_failed` | share of the first questions whose search failed, which are no i; left out if there is none |

    Args:
        config: How many questions to play.
    """

    def __init__(self, config: GroundingConfig) -> None:
        self.config = config

    def __call__(self, material: Material) -> Figures:
        """See the class."""
        questions = list(material.questions[: self.config.num_questions])
        places, episodes = _play(material, questions, Misplaced(_retriever(material), questions, material.seed))
        figures = material.search_failed(places, len(questions))
        if not places:
            return figures
        questions = [questions[place] for place in places]
        prompts = [Prompt(render_prompt(material.prompt, question.text), "", DIRECTLY) for question in questions]
        answers = [parse_action(cut(DIRECTLY + (text or ""))) for text in generated(material.generate, prompts)]
        closed = [
            isinstance(action, Answer) and exact_match(action.text, question.golden_answers) == 1
            for action, question in zip(answers, questions, strict=True)
        ]
        figures |= {
            "exact_match": material.share(_correct(episodes)),
            "closed_book_exact_match": material.share(closed),
        }
        return figures | _own_exact_match(material, places)


class Overlaid:
    """A retriever whose results show other texts in the place of some passages.

    Args:
        retriever: The retriever that searches, by the old texts.
        passages: The new passages by the identity of the old ones.
    """

    def __init__(self, retriever: Retriever, passages: Mapping[Identity, Passage]) -> None:
        self._retriever, self._passages = retriever, passages

    def search(self, queries: Sequence[str], top_k: int) -> list[Found]:
        """See `Retriever.search`."""
        return [
            found
            if isinstance(found, RetrieverError)
            else [replace(one, contents=self._passages.get(identity(one), one).contents) for one in found]
            for found in self._retriever.search(queries, top_k)
        ]


class Misplaced:
    """A retriever that answers each query with the passages that another question would have found.

    Args:
        retriever: The retriever that searches.
        questions: The questions, at least two.
        seed: Seed and query decide together which question is searched.
    """

    def __init__(self, retriever: Retriever, questions: Sequence[Question], seed: int) -> None:
        if len(questions) < 2:
            raise ConfigurationError(f"Shuffled passages need at least 2 questions, got {len(questions)}.")
        self._retriever, self._questions, self._seed = retriever, questions, seed

    def search(self, queries: Sequence[str], top_k: int) -> Sequence[Found]:
        """See `Retriever.search`."""
        return self._retriever.search([self._other(query) for query in queries], top_k)

    def _other(self, query: str) -> str:
        digest = hashlib.sha256(f"{self._seed} {query}".encode("utf-8", "backslashreplace")).digest()
        words = set(words_of(query))
        start = int.from_bytes(digest[:8], "big") % len(self._questions)
        texts = (self._questions[(start + step) % len(self._questions)].text for step in range(len(self._questions)))
        # This is the first question that shares no word with the query, else the one that shares the fewest.
        return min(texts, key=lambda text: len(words.intersection(words_of(text))))


def change(material: Material) -> list[Changed]:
    """The questions whose answers can be replaced in their gold passages, without harm to each other.

    Args:
        material: The material; its seed decides which answer takes the place of which.
    """
    kinds = [answer_kind(question) for question in material.questions]
    pools: dict[str, list[str]] = {}
    for number in material.draw(0, 7).permutation(len(material.questions)).tolist():
        if (kind := kinds[number]) is not None:
            pools.setdefault(kind, []).append(material.questions[number].golden_answers[0])
    chosen: dict[tuple[str, str], str] = {}
    altered: dict[Identity, Passage] = {}
    used: set[Identity] = set()
    changes = []
    for number, (question, gold) in enumerate(zip(material.questions, material.gold, strict=True)):
        if (kind := kinds[number]) is None or not gold.passages:
            continue
        old = normalize_answer(question.golden_answers[0])
        same = chosen.get((kind, old))  # questions with one answer agree, for they may share a passage
        new = _another(pools[kind] if same is None else [same], question, gold)
        passages = None if new is None else _rewritten(question, gold, new)
        if new is None or passages is None or not _fits(gold, passages, altered, used):
            continue
        chosen[kind, old] = new
        altered |= passages
        used |= {key for key in map(identity, gold.passages) if key not in passages}
        changes.append(Changed(number, new, passages))
    return changes


def answer_kind(question: Question) -> str | None:
    """The type of an answer: `answer_type` of the metadata, the last link of a chain, or a type told from the text.

    Returns:
        A word; only answers with the same word replace each other. None for yes and no, which can't be replaced.
    """
    if (named := question.metadata.get("answer_type")) is not None:
        return str(named)
    if chain := question.metadata.get("chain"):
        return str(chain[-1])
    words = normalize_answer(question.golden_answers[0]).split()
    if not words or words in (["yes"], ["no"]):
        return None
    if any(month in words for month in _MONTHS) and any(word[0].isdigit() for word in words):
        return "date"
    if len(words) == 1 and re.fullmatch(r"1\d\d\d|20\d\d", words[0]):
        return "year"
    if words[0][0].isdigit() or any(word in _NUMBERS for word in words):
        return "number"
    return "name"


def _another(pool: Sequence[str], question: Question, gold: Gold) -> str | None:
    """The first answer of a pool that is unlike the question's answers and stands in neither its text nor evidence."""
    known = [question.text, *question.golden_answers, *(passage.contents for passage in gold.passages)]
    start = pool.index(question.golden_answers[0]) + 1 if question.golden_answers[0] in pool else 0
    for candidate in [*pool[start:], *pool[:start]]:
        mutual = any(holds_answer(candidate, [answer]) for answer in question.golden_answers)
        if normalize_answer(candidate) and not mutual and not any(holds_answer(text, [candidate]) for text in known):
            return candidate
    return None


def _rewritten(question: Question, gold: Gold, new: str) -> dict[Identity, Passage] | None:
    """The gold passages that change, by identity; None if none of them holds the answer, or it can't be taken out."""
    aliases = sorted(filter(answer_forms, question.golden_answers), key=len, reverse=True)
    pattern = re.compile("|".join(map(_as_words, aliases)), re.IGNORECASE)
    passages = {}
    for passage in gold.passages:
        if holds_answer(passage.contents, question.golden_answers):
            changed = replace(passage, contents=pattern.sub(lambda _: new, passage.contents))
            if holds_answer(changed.contents, question.golden_answers):
                return None
            passages[identity(passage)] = changed
    return passages or None


def _as_words(answer: str) -> str:
    """A pattern of an answer that is not within a longer word or number."""
    word = rf"[^\W{UNSPACED_CHARS}]"
    before = "" if UNSPACED.match(answer) else rf"(?<!{word})(?!(?<=\d[.,:])\d)"
    after = "" if UNSPACED.match(answer[-1]) else rf"(?!{word})(?!(?<=\d)[.,:]\d)"
    return before + re.escape(answer) + after


def _fits(
    gold: Gold, passages: Mapping[Identity, Passage], altered: Mapping[Identity, Passage], used: set[Identity]
) -> bool:
    """Whether a question's new passages, and those that it needs unchanged, agree with those of the other questions."""
    if any(key in used or identity(altered.get(key, new)) != identity(new) for key, new in passages.items()):
        return False
    return not any(key in altered for key in map(identity, gold.passages) if key not in passages)


def _shown(episode: Sequence[StepInfo], change: Changed) -> bool:
    new = {identity(passage) for passage in change.passages.values()}
    return any(identity(passage) in new for info in executed_searches(episode) for passage in info["passages"])


def _remembers(episode: Sequence[StepInfo], golden_answers: Sequence[str]) -> bool:
    if not exact_match(episode[-1]["answer"], golden_answers):
        return False
    shown = (passage for info in executed_searches(episode) for passage in info["passages"])
    return not any(holds_answer(passage.contents, golden_answers) for passage in shown)


def _left_out(material: Material, changes: Sequence[Changed]) -> np.ndarray:
    left_out = np.ones(len(material.questions))
    left_out[[one.number for one in changes]] = 0
    return left_out


def _own_exact_match(material: Material, numbers: Sequence[int]) -> Figures:
    if material.episodes is None:
        return {}
    own = [material.episodes[number] for number in numbers]
    own = [own[place] for place in worked(own)]
    return {"own_exact_match": material.share(_correct(own), "high")} if own else {}


def _correct(episodes: Sequence[Sequence[StepInfo]]) -> list[bool]:
    return [bool(episode[-1]["correct"]) for episode in episodes]


def _retriever(material: Material) -> Retriever:
    if material.retriever is None:
        raise ConfigurationError("This probe lets the agent search, and the material has no 'retriever'.")
    return material.retriever


def _play(
    material: Material, questions: Sequence[Question], retriever: Retriever
) -> tuple[list[int], list[list[StepInfo]]]:
    """Play episodes on these questions by the rules of the material's environments.

    Returns:
        The places of the questions whose searches worked, and their episodes. The material counts the others.
    """
    if material.generate is None:
        raise ConfigurationError("This probe lets the model play, and the material has no 'generate'.")
    rules = {"prompt": material.prompt} if material.envs is None else material.envs.rules.settings()
    envs = AgenticRAGVectorEnv(
        min(_NUM_ENVS, len(questions)),
        dataset=QuestionSet("grounding", tuple(questions), ()),
        retriever=retriever,
        top_k=material.top_k,
        autoreset_mode="Disabled",
        **rules,
    )
    episodes = play(material.generate, envs)
    places = worked(episodes)
    material.num_failed_searches += len(episodes) - len(places)
    return places, [episodes[place] for place in places]
