"""Draws a small set from a benchmark: its questions, their splits, and its passages."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agentic_rag_env.answers import normalize_answer
from agentic_rag_env.datasets.selection import share
from agentic_rag_env.errors import DataError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.types import Passage, Question

#: Most words of an answer, as in NQ-open (Lee et al., 2019), and most characters of a passage.
MAX_ANSWER_WORDS, MAX_PASSAGE_CHARS = 5, 2000
#: The pages are divided into ten shares; these are the shares of each split.
SHARES = {"train": range(7), "dev": range(7, 8), "test": range(8, 10)}
#: Settings of the search for hard distractors, and how deep it goes.
STEMMED_BM25 = {"name": "bm25", "stemmer": "english", "stopwords": "english"}
_NEIGHBOURS = 20
#: Facts about a question that are kept from the source.
_KEPT = ("hops", "supporting", "supporting_mode", "type", "source_id")


@dataclass(frozen=True)
class Miniature:
    """A small set.

    Attributes:
        splits: Questions by split, each list sorted by id.
        corpus: The passages for all of them, sorted by title.
        num_gold: Number of these passages that are gold for some question.
    """

    splits: Mapping[str, Sequence[Question]]
    corpus: Sequence[Passage]
    num_gold: int


def draw(name: str, questions: Sequence[Question], corpus: Sequence[Passage], num_passages: int) -> Miniature:
    """Draw a small set.

    Args:
        name: Name of the set.
        questions: Questions whose metadata holds `supporting`, the ids of passages, and `split`, the published one.
        corpus: All passages of the source.
        num_passages: Size of the corpus to be drawn; at least half of it will be gold for no question.

    Raises:
        DataError: The source has too few passages, or too many of them would be gold.
    """
    short = {passage.id: passage for passage in corpus if len(passage.contents) <= MAX_PASSAGE_CHARS}
    kept = usable(questions, short)
    gold = {identifier: short[identifier] for question in kept for identifier in question.metadata["supporting"]}
    if 2 * len(gold) > num_passages:
        raise DataError(f"{name}: {len(gold)} gold passages are more than half of {num_passages}; draw more passages.")
    others = hard_distractors(kept, gold, list(short.values()), num_passages - len(gold))
    splits = split_by_page(kept, gold)
    trained_on = {answer for question in splits["train"] for answer in map(normalize_answer, question.golden_answers)}
    return Miniature(
        {split: [_described(question, name, split, trained_on) for question in of] for split, of in splits.items()},
        sorted([*gold.values(), *others], key=lambda passage: (passage.title, passage.id)),
        len(gold),
    )


def usable(questions: Sequence[Question], passages: Mapping[str, Passage]) -> list[Question]:
    """The questions that a reader of short passages can answer word for word, sorted by id.

    The gold passages of each are among those given. Each has an answer of at most `MAX_ANSWER_WORDS` words which,
    unless it is yes or no, stands in a gold passage. A text that is asked more than once is left out, because the
    source does not say which of the answers is meant. Answers that normalization empties are removed.
    """
    asked = Counter(normalize_answer(question.text) for question in questions)
    kept = []
    for question in sorted(questions, key=lambda question: question.id):
        answers = tuple(filter(normalize_answer, question.golden_answers))
        gold = [passages.get(identifier) for identifier in question.metadata["supporting"]]
        texts = [passage.contents for passage in gold if passage is not None]
        if len(texts) == len(gold) and asked[normalize_answer(question.text)] == 1 and _answerable(answers, texts):
            kept.append(dataclasses.replace(question, golden_answers=answers))
    return kept


def _answerable(answers: Sequence[str], texts: Sequence[str]) -> bool:
    if not any(len(normalize_answer(answer).split()) <= MAX_ANSWER_WORDS for answer in answers):
        return False
    return is_yes_no(answers) or any(_stands_in(text, answers) for text in texts)


def _stands_in(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in a text between blanks.

    This rule is stricter than `holds_answer`, because "Ptolemy's" is one word here. The files were drawn by it.
    """
    return any(f" {normalize_answer(answer)} " in f" {normalize_answer(text)} " for answer in answers)


def is_yes_no(answers: Sequence[str]) -> bool:
    """Whether the answer to a question is yes or no, so that no passage holds it."""
    return not {"yes", "no"}.isdisjoint(map(normalize_answer, answers))


def split_by_page(questions: Sequence[Question], gold: Mapping[str, Passage]) -> dict[str, list[Question]]:
    """Divide questions so that no page is evidence in two splits.

    A two-hop question ties two pages together. Pages that are tied, directly or through others, go to the same split.
    So no question straddles splits. A hash of the alphabetically first of their titles decides which split it is.
    """
    tied_to: dict[str, str] = {}

    def first_of(title: str) -> str:
        while tied_to.setdefault(title, title) != title:
            title = tied_to[title]
        return title

    pages = [[gold[identifier].title.casefold() for identifier in q.metadata["supporting"]] for q in questions]
    for of_question in pages:
        for title in of_question[1:]:
            one, other = sorted((first_of(of_question[0]), first_of(title)))
            tied_to[other] = one
    splits: dict[str, list[Question]] = {split: [] for split in SHARES}
    for question, of_question in zip(questions, pages, strict=True):
        number = share(first_of(of_question[0]), 10)
        splits[next(split for split, shares in SHARES.items() if number in shares)].append(question)
    return splits


def hard_distractors(
    questions: Sequence[Question], gold: Mapping[str, Passage], corpus: Sequence[Passage], count: int
) -> list[Passage]:
    """Passages that are gold for no question and look most like the gold ones.

    All best matches of a question or a gold passage by BM25 come first, then all second best ones, and so on.

    Raises:
        DataError: The source has fewer such passages than are asked for.
    """
    retriever = RETRIEVERS.build(STEMMED_BM25, corpus=corpus)
    queries = [question.text for question in questions] + [gold[identifier].contents for identifier in sorted(gold)]
    rankings = retriever.search(queries, _NEIGHBOURS)
    found: dict[str, Passage] = {}
    for rank in range(_NEIGHBOURS):
        for passages in rankings:
            for passage in passages[rank : rank + 1]:
                if passage.id not in gold:
                    found.setdefault(passage.id, dataclasses.replace(passage, score=0.0))
    if len(found) < count:
        raise DataError(f"{count} distractors are wanted, but only {len(found)} are near a question; draw fewer.")
    return list(found.values())[:count]


def _described(question: Question, name: str, split: str, trained_on: set[str]) -> Question:
    """The question with the metadata of the small set."""
    kept = {field: question.metadata[field] for field in _KEPT if field in question.metadata}
    metadata = {"dataset": name, "split": split, "published_split": question.metadata["split"], **kept}
    if split != "train":
        metadata["answer_in_training"] = not trained_on.isdisjoint(map(normalize_answer, question.golden_answers))
    return dataclasses.replace(question, metadata=metadata)
