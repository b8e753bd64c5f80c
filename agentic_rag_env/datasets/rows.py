"""Reads questions from rows in the formats of the published benchmarks: FlashRAG's and Search-R1's."""

from __future__ import annotations

import ast
import io
import json
import logging
import tokenize
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from agentic_rag_env.corpus import checked_id, checked_text, file_version, json_type, read_rows, text_field
from agentic_rag_env.errors import DataError
from agentic_rag_env.types import Question

#: File names that only say which part of a dataset the file holds; then the folder's name is the name of the dataset.
GENERIC_STEMS = frozenset({"all", "train", "dev", "test", "val", "valid", "validation", "eval", "data", "questions"})
#: The text before the question in the prompts of Search-R1's files.
_PROMPT_MARKER = "Question:"
#: Most characters of a list of answers that is written as text; every published one is far shorter.
_LONGEST_LIST = 100_000
_BLANK_TOKENS = (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)

_logger = logging.getLogger(__name__)


def read_questions(path: str | Path, name: str | None = None) -> tuple[Question, ...]:
    """The questions of a file, in its order. A process reads a file once as long as it does not change.

    Args:
        path: A file of JSON lines (plain, `.gz` or `.zst`), `.parquet` or `.arrow`.
        name: The dataset of rows that name none; None: the name of the file, see `dataset_name`.

    Raises:
        DataError: The file is missing, malformed or empty.
    """
    return _read_questions(*file_version(path), name or dataset_name(path))


@lru_cache(maxsize=16)
def _read_questions(path: str, mtime_ns: int, size: int, name: str) -> tuple[Question, ...]:
    return collect(read_rows(path), path, name, file_stem(path))


def file_stem(path: str | Path) -> str:
    """The name of a file up to its first dot."""
    return Path(path).name.partition(".")[0]


def dataset_name(path: str | Path) -> str:
    """The name of a file without its endings, or of its folder if the file is called `train`, `test` or the like."""
    file = Path(path).expanduser().absolute()
    stem = file_stem(file)
    return file.parent.name if stem in GENERIC_STEMS and file.parent.name else stem


def collect(rows: Iterable[tuple[str, dict[str, Any]]], source: str, name: str, stem: str) -> tuple[Question, ...]:
    """The questions of some rows, in their order.

    A row whose answers are exploded (see `is_exploded`) is left out, and a warning counts such rows. Nobody can know
    which answer was meant, and one letter must not score as correct.

    Args:
        rows: The place of each row (source and line or row, for errors) and its content.
        source: Where the rows come from, for errors.
        name: The dataset of rows that name none.
        stem: Beginning of the ids of rows that have none; the number of the row follows.

    Raises:
        DataError: A row is malformed or repeats an id, or there is no usable row.
    """
    questions: list[Question] = []
    place_of: dict[str, str] = {}
    exploded: list[str] = []
    for where, row in rows:
        question = question_in(row, where, name, stem)
        place = where.rpartition(", ")[2]
        if is_exploded(question.golden_answers):
            exploded.append(place)
            continue
        if question.id in place_of:
            raise DataError(f"{where}: id {question.id!r} is already the id of {place_of[question.id]}.")
        place_of[question.id] = place
        questions.append(question)
    if exploded:
        _logger.warning(
            "%s: left out %d questions whose answer was exploded into single characters, the first at %s.",
            source,
            len(exploded),
            exploded[0],
        )
    if not questions:
        raise DataError(f"{source}: is empty; a dataset needs at least one question.")
    return tuple(questions)


def question_in(row: dict[str, Any], where: str, name: str, stem: str) -> Question:
    """The question of a row.

    FlashRAG's rows have `id`, `question`, `golden_answers` (a list of strings; a string counts as a list of one) and
    perhaps `metadata` (an object).

    Search-R1's rows have `data_source`, the name of the dataset. The answers are in `reward_model.ground_truth.target`,
    or, as verl writes them, in `reward_model.ground_truth` itself. A row without `question` has it after "Question:" in
    the last message of `prompt` that holds this marker. Search-R1's merged files number the questions of each source
    anew, so `data_source` precedes the id there.

    An `id` may be an integer, and so may the ids of gold passages in the metadata's `supporting`. They become text, as
    the ids of passages do.

    A list of answers that is written as text, such as `"['Rome', 'Roma']"`, counts as the list.

    The metadata's `context` is dropped. It holds the paragraphs that HotpotQA and others give with a question. They are
    most of the file, and here an agent has to find them.

    Args:
        row: The row; null counts as missing in `id`, `question` and `metadata`.
        where: Place of the row, for errors; it ends in the number of the row.
        name: The dataset, if the row names none.
        stem: Beginning of the id, if the row has none.

    Raises:
        DataError: A field is missing or malformed, or an answer is blank.
    """
    source = text_field(row, "data_source", where) if row.get("data_source") is not None else None
    if row.get("id") is None:
        identifier = f"{stem}-{where.rpartition(' ')[2]}"
    else:
        identifier = text_field(row, "id", where, checked_id)
        identifier = f"{source}/{identifier}" if source else identifier
    metadata = {} if row.get("metadata") is None else row["metadata"]
    if not isinstance(metadata, dict):
        raise DataError(f"{where}, field 'metadata': expected an object, got {json_type(metadata)}.")
    kept = {key: value for key, value in metadata.items() if value is not None and key != "context"}
    if "supporting" in kept:
        kept["supporting"] = _supporting(kept["supporting"], f"{where}, field 'metadata.supporting'")
    return Question(identifier, _text(row, where), _golden_answers(row, where), {"dataset": source or name, **kept})


def format_of(row: dict[str, Any]) -> str:
    """The name of the published format that a row has, for `check`."""
    if is_passage(row):
        return "passages"
    if row.get("reward_model") is not None:
        return "Search-R1"
    return "FlashRAG" if "golden_answers" in row else "unknown"


def is_passage(row: dict[str, Any]) -> bool:
    """Whether a row is a passage of a corpus."""
    return not {"question", "prompt"} & row.keys() and ("contents" in row or {"title", "text"} <= row.keys())


def has_lists_in_text(row: dict[str, Any]) -> bool:
    """Whether an answer of a sound row is a list that is written as text."""
    return any(answers_in_text(answer) for answer in _given_answers(row, "")[0])


def is_exploded(golden_answers: Sequence[str]) -> bool:
    """Whether a list of answers is one string that was taken for a list, so that each character became an answer.

    Such a list has three or more answers, all of one character, and one is a lower-case letter or the bracket of a
    list. Digits, capitals and other signs alone may be meant as answers.
    """
    return (
        len(golden_answers) > 2
        and all(len(answer) == 1 for answer in golden_answers)
        and any(answer.islower() or answer == "[" for answer in golden_answers)
    )


def _supporting(given: Any, place: str) -> list[str]:
    """The ids of gold passages, as their corpus has them."""
    if not isinstance(given, list):
        raise DataError(f"{place}: expected a list of passage ids, got {json_type(given)}.")
    return [checked_id(identifier, f"{place}[{index}]") for index, identifier in enumerate(given)]


def _text(row: dict[str, Any], where: str) -> str:
    if row.get("question") is None and row.get("prompt") is not None:
        return _question_of_prompt(row["prompt"], f"{where}, field 'prompt'")
    text = text_field(row, "question", where)
    if not text.strip():
        raise DataError(f"{where}, field 'question': is empty.")
    return text


def _question_of_prompt(prompt: Any, place: str) -> str:
    """The text after the marker in the last message that holds it; messages of a system or an assistant don't count."""
    if not isinstance(prompt, list) or not prompt or not all(isinstance(message, dict) for message in prompt):
        raise DataError(f"{place}: expected a list of messages, got {json_type(prompt)}; a field 'question' would do.")
    for message in reversed(prompt):
        if message.get("role") not in ("system", "assistant"):
            question = text_field(message, "content", place).partition(_PROMPT_MARKER)[2].strip()
            if question:
                return question
    raise DataError(f"{place}: has no question after {_PROMPT_MARKER!r}; put it into a field 'question'.")


def _golden_answers(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The accepted answers of a row; a list that is written as text counts as the list."""
    given, place = _given_answers(row, where)
    answers = [answer for text in given for answer in answers_in_text(text) or [text]]
    for index, answer in enumerate(answers):
        if not checked_text(answer, f"{place}[{index}]").strip():
            raise DataError(f"{place}[{index}]: is blank; no answer can match it.")
    return tuple(answers)


def _given_answers(row: dict[str, Any], where: str) -> tuple[list[str], str]:
    """The answers exactly as a row holds them, in one of the two possible places, and that place."""
    field, answers = "golden_answers", row.get("golden_answers")
    if answers is None and (row.get("reward_model") is not None or "golden_answers" not in row):
        field, answers = "reward_model.ground_truth", row
        for key in ("reward_model", "ground_truth"):
            answers = answers.get(key) if isinstance(answers, dict) else None
        if isinstance(answers, dict):  # a row of Search-R1; verl's own rows hold the answer right here
            field, answers = f"{field}.target", answers.get("target")
        if answers is None:
            nor = "reward_model.ground_truth.target"
            raise DataError(f"{where}: no field 'golden_answers' (nor {nor!r}); the row has {', '.join(row)}.")
    place = f"{where}, field {field!r}"
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list):
        raise DataError(f"{place}: expected a string or a list of strings, got {json_type(answers)}.")
    if not answers:
        raise DataError(f"{place}: is empty; a question needs at least one accepted answer.")
    for index, answer in enumerate(answers):
        checked_text(answer, f"{place}[{index}]")
    return answers, place


def answers_in_text(text: str) -> list[str] | None:
    """The members of a list of strings that is written as text, as JSON, Python or NumPy do; None for other text.

    PopQA is published in one of the first two forms, and copies of it in the other. NumPy, and so a table of pandas
    that was saved as text, puts no commas between the members.
    """
    text = text.strip()
    if not text.startswith(("['", '["')) or not text.endswith(("']", '"]')) or len(text) > _LONGEST_LIST:
        return None
    for read in (json.loads, _listed_literals):  # neither of them runs anything
        try:
            found = read(text)
        except (ValueError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and all(isinstance(member, str) for member in found):
            return found
    return None


def _listed_literals(text: str) -> list[Any]:
    """The literals of a flat list with commas between all of them or none; Python would join them where none is."""
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    members = [ast.literal_eval(token.string) for token in tokens if token.type == tokenize.STRING]
    signs = "".join(token.string for token in tokens if token.type == tokenize.OP)
    others = [token for token in tokens if token.type not in (tokenize.STRING, tokenize.OP, *_BLANK_TOKENS)]
    gaps = len(members) - 1
    if others or signs not in ("[]", f"[{',' * gaps}]"):
        raise ValueError("no flat list of strings")
    return members
