"""Finds what is wrong with files of questions before a run trains on them or is measured by them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from agentic_rag_env.answers import answer_forms, normalize_answer, word_forms
from agentic_rag_env.corpus import read_rows
from agentic_rag_env.datasets.rows import (
    dataset_name,
    file_stem,
    format_of,
    has_lists_in_text,
    is_exploded,
    is_passage,
    question_in,
)
from agentic_rag_env.errors import DataError
from agentic_rag_env.prompts import ends_with_question_mark
from agentic_rag_env.types import Passage, Question

#: Number of words in the longest answer that a model can be expected to give word for word.
LONG_ANSWER = 20
#: Answers that say nothing about what a passage must contain.
_YES_NO = frozenset({"yes", "no"})


class Finding(NamedTuple):
    """Something in a file that is wrong or may be wrong.

    Attributes:
        is_error: Whether a run refuses the file, leaves the rows out, or scores them wrongly.
        number: Number of rows or questions concerned.
        what: The trouble, as a predicate of these rows or questions.
        example: The first of them, with its place.
        advice: What the user can do.
    """

    is_error: bool
    number: int
    what: str
    example: str
    advice: str


@dataclass
class FileReport:
    """A file and what was found in it.

    Attributes:
        path: The file.
        num_rows: Number of rows read.
        formats: Number of rows in each published format.
        questions: Questions of the rows that a run can use.
        findings: The findings, errors first, otherwise in the order in which they were met.
    """

    path: str
    num_rows: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    questions: list[Question] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def num_errors(self) -> int:
        """The number of findings that are errors."""
        return sum(finding.is_error for finding in self.findings)


def check_file(path: str | Path) -> FileReport:
    """Read every row of a file of questions and look at it.

    Args:
        path: A file that a dataset can read: JSON lines (plain, `.gz` or `.zst`), `.parquet` or `.arrow`.
    """
    report = FileReport(str(path))
    found: list[Finding] = []
    name, stem = dataset_name(path), file_stem(path)
    place_of_id: dict[str, str] = {}
    asked: dict[str, tuple[str, Question]] = {}
    try:
        for where, row in read_rows(path):
            report.num_rows += 1
            report.formats[format_of(row)] += 1
            place = where.rpartition(", ")[2]
            if is_passage(row):
                found.append(_error("passage and no question", place, "Give a file of passages with --corpus."))
                continue
            try:
                question = question_in(row, where, name, stem)
            except DataError as error:
                found.append(_malformed(str(error), where, place))
                continue
            if is_exploded(question.golden_answers):
                found.append(
                    _error(
                        "answer exploded into single characters",
                        _quoted(question, question.golden_answers, place),
                        "A run leaves them out, as the answer can't be restored; take the file from its publisher "
                        "instead.",
                    )
                )
                continue
            report.questions.append(question)
            if has_lists_in_text(row):
                advice = "A run takes the members of the list as the answers; write them as a list to be sure."
                quoted = _quoted(question, question.golden_answers, place)
                found.append(_warning("list of answers written as text", quoted, advice))
            found += _look_at_answers(question, place)
            found += _look_at_question(question, place, place_of_id, asked)
    except DataError as error:
        found.append(_unreadable(Path(path), str(error)))
    else:
        if not report.questions and not report.formats["passages"]:
            advice = "A row needs question and golden_answers (FlashRAG), or prompt and reward_model (Search-R1)."
            found.append(_error("no row that is a question", f"{report.num_rows} rows", advice))
    report.findings = _gathered(found)
    return report


def _error(what: str, example: str, advice: str) -> Finding:
    return Finding(True, 1, what, example, advice)


def _warning(what: str, example: str, advice: str) -> Finding:
    return Finding(False, 1, what, example, advice)


def _unreadable(path: Path, message: str) -> Finding:
    if not path.expanduser().is_file():
        return _error("no such file", message, "Give the path of a file of questions.")
    if re.search(r", line \d+: ", message):
        advice = "Mend the line; if it is the last one, the file was cut off: fetch or write it anew."
        return _error("line that can't be read; those after it are left out", message, advice)
    return _error("broken off: the rest of the file can't be read", message, "Fetch or write the file anew.")


def _gathered(found: Sequence[Finding]) -> list[Finding]:
    """Findings of the same kind as one, with the first example; errors come first."""
    counts = Counter((one.is_error, one.what, one.advice) for one in found)
    firsts = {(one.is_error, one.what, one.advice): one for one in reversed(found)}
    gathered = [firsts[kind]._replace(number=count) for kind, count in counts.items()]
    return sorted(gathered, key=lambda finding: not finding.is_error)


def _malformed(message: str, where: str, place: str) -> Finding:
    # Place and indices are left out, so that rows with the same fault count together.
    fault = re.sub(r"\[\d+\]", "[...]", message.removeprefix(where).lstrip(",: "))
    what = fault.partition("; ")[0].rstrip(".")
    return _error(what, place, "The file is refused as it is; mend these rows or remove them.")


def _look_at_answers(question: Question, place: str) -> Iterator[Finding]:
    answers = question.golden_answers
    empty = [answer for answer in answers if not normalize_answer(answer)]
    if empty:
        yield _warning(
            f"{'every answer' if len(empty) == len(answers) else 'an answer among others'} is empty once normalized",
            _quoted(question, empty, place),
            "Only the same articles or punctuation marks match it, in published scorers any of them; spell it out.",
        )
    if min(_num_words(answer) for answer in answers) > LONG_ANSWER:
        yield _warning(
            f"no answer of {LONG_ANSWER} words or fewer",
            _quoted(question, answers, place),
            "Hardly ever matched exactly; add a short answer, or use F1 as the reward.",
        )


def _look_at_question(
    question: Question, place: str, place_of_id: dict[str, str], asked: dict[str, tuple[str, Question]]
) -> Iterator[Finding]:
    if (first := place_of_id.setdefault(question.id, place)) != place:
        yield _error(
            "id used before",
            f"{place}: {question.id!r}, also at {first}",
            "The file is refused as it is; number the rows anew, or drop the ids: the line number will do.",
        )
    if not ends_with_question_mark(question.text):
        yield _warning(
            "no question mark at the end",
            f"{place}: {question.text!r}",
            "No harm where the environment writes the prompt: it adds one.",
        )
    first, other = asked.setdefault(normalize_answer(question.text), (place, question))
    if other is not question:
        same = set(map(normalize_answer, other.golden_answers)) & set(map(normalize_answer, question.golden_answers))
        yield _warning(
            "question asked before" if same else "question asked before, with none of the same answers",
            f"{place}: {question.text!r}, also at {first}",
            "It counts twice; remove one." if same else "At most one is right; merge the answers or remove one.",
        )


def overlaps(reports: Sequence[FileReport]) -> list[Finding]:
    """Questions that two files share, by their normalized text.

    A shared question is an error if just one of the two files is for training; otherwise it is a warning. A file is for
    training if its name contains the word "train".
    """
    texts = [{normalize_answer(question.text): question for question in report.questions} for report in reports]
    findings = []
    for (one, ours), (other, theirs) in combinations(zip(reports, texts, strict=True), 2):
        if shared := [question for text, question in ours.items() if text in theirs]:
            leaks = ("train" in file_stem(one.path)) != ("train" in file_stem(other.path))
            advice = "Remove them from the training file." if leaks else "Harmless unless one is trained on."
            example = f"{shared[0].text!r} ({shared[0].id})"
            findings.append(
                Finding(leaks, len(shared), f"question in both {one.path} and {other.path}", example, advice)
            )
    return findings


@dataclass
class Coverage:
    """How much of a file a corpus can answer.

    Attributes:
        num_questions: Number of questions with an answer other than yes or no.
        num_answerable: Number of these that have an answer word for word in some passage, after normalization.
        missing_gold: Ids of gold passages (`supporting` in the metadata) that the corpus does not have, with the
            question's id.
    """

    num_questions: int
    num_answerable: int
    missing_gold: list[tuple[str, str]]


def coverages(reports: Sequence[FileReport], corpus: Iterable[Passage]) -> list[Coverage]:
    """Look for the answers and gold passages of files in a corpus, which is read once.

    Args:
        reports: Reports on the files.
        corpus: The passages.

    Returns:
        One coverage for each file.
    """
    wanted = {answer for report in reports for question in report.questions for answer in _as_words(question)}
    occurring, ids = _occurring(wanted, corpus)
    return [_coverage(report.questions, occurring, ids) for report in reports]


def _coverage(questions: Sequence[Question], occurring: set[tuple[str, ...]], ids: set[str]) -> Coverage:
    answers = [words for question in questions if (words := _as_words(question))]
    missing = [
        (passage_id, question.id)
        for question in questions
        for passage_id in question.metadata.get("supporting", ())
        if passage_id not in ids
    ]
    return Coverage(len(answers), sum(not occurring.isdisjoint(of_one) for of_one in answers), missing)


def _as_words(question: Question) -> set[tuple[str, ...]]:
    """The answers as words, in every form that counts; the set is empty if one of them is yes or no."""
    texts = {form for answer in question.golden_answers for form in answer_forms(answer)}
    return set() if texts & _YES_NO else {tuple(text.split()) for text in texts}


def _occurring(wanted: set[tuple[str, ...]], corpus: Iterable[Passage]) -> tuple[set[tuple[str, ...]], set[str]]:
    """Those wanted sequences of words that occur in a passage, and the ids of all passages."""
    by_first: dict[str, set[tuple[str, ...]]] = {}
    for answer in wanted:
        by_first.setdefault(answer[0], set()).add(answer)
    found: set[tuple[str, ...]] = set()
    ids = set()
    for passage in corpus:
        ids.add(passage.id)
        for words in map(str.split, word_forms(passage.contents)):
            for start, word in enumerate(words):
                if candidates := by_first.get(word):
                    here = {answer for answer in candidates if tuple(words[start : start + len(answer)]) == answer}
                    found |= here
                    candidates -= here
    return found, ids


def _num_words(answer: str) -> int:
    return len(normalize_answer(answer).split())


def answer_lengths(report: FileReport) -> list[int]:
    """The number of words in each question's first answer after normalization, sorted."""
    return sorted(_num_words(question.golden_answers[0]) for question in report.questions)


def _quoted(question: Question, answers: Sequence[str], place: str) -> str:
    text = repr(list(answers))
    return f"{place}: {question.text!r}: {text if len(text) <= 80 else f'{text[:77]}...'}"
