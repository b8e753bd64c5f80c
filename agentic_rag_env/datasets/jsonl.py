"""Questions and passages from JSON-lines files of one's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from agentic_rag_env.corpus import checked_text, file_version, json_type, read_corpus, read_jsonl, text_field
from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.errors import ConfigurationError, DataError
from agentic_rag_env.registry import DATASETS, did_you_mean
from agentic_rag_env.types import Question

SPLITS = ("all", "train", "dev", "test")
#: File names that say which part of a dataset they hold, so that the folder's name is the better name for it.
GENERIC_STEMS = frozenset({"all", "train", "dev", "test", "val", "valid", "validation", "eval", "data", "questions"})


@dataclass
class JsonlConfig:
    """Files and the part of them to use.

    Attributes:
        questions: File of questions, JSON lines, plain or `.gz`.
        corpus: File of passages (see `agentic_rag_env.corpus.read_corpus`); None if the retriever brings its own.
        test_questions: File with the questions of the split `test`, where there is a separate one.
        split: `all` is the whole of `questions`. Otherwise a hash of its id gives each question one of ten shares of
            about equal size: share 8 is `dev`, share 9 is `test`, the others are `train`. With `test_questions`,
            `test` is that file and share 9 belongs to `train`.
        num_questions: Keep a random sample of this size of the split, in the order of the file; None keeps all.
        seed: Decides the sample; the same seed draws the same one, and a larger sample contains the smaller.
    """

    questions: str
    corpus: str | None = None
    test_questions: str | None = None
    split: str = "all"
    num_questions: int | None = None
    seed: int = 0


@DATASETS.register("jsonl", JsonlConfig)
def jsonl_dataset(config: JsonlConfig) -> QuestionSet:
    """Read a split of a file of questions, and the corpus that goes with it.

    A row has `question`, `golden_answers` (a string or a list of strings) and perhaps `id` and `metadata` (an
    object). The answers may also stand where Search-R1 puts them, in `reward_model.ground_truth.target`. A missing id
    becomes `<file>-<line>`. Unless the metadata names a `dataset`, it is the `data_source` of the row, else the name of
    the file, or of its folder if the file is called `train`, `dev`, `test` or the like.

    Splits of unchanged files share one corpus object within a process.

    Raises:
        ConfigurationError: An unknown split, or a sample size that the split cannot give.
        DataError: A file is missing or malformed, or the split is empty.
    """
    if config.split not in SPLITS:
        raise ConfigurationError(f"jsonl has no split {config.split!r}.{did_you_mean(config.split, SPLITS)}")
    source = config.questions
    if config.split == "test" and config.test_questions is not None:
        source = config.test_questions
    questions = _select(_read_questions(*file_version(source)), config)
    if not questions:
        raise DataError(
            f"{source}: split {config.split!r} is empty; the file has too few questions to be divided. "
            "Use split=all with a file of its own for each split."
        )
    corpus = None if config.corpus is None else read_corpus(config.corpus)
    return QuestionSet(_dataset_name(source), _sample(questions, config, source), corpus)


def _select(questions: Sequence[Question], config: JsonlConfig) -> Sequence[Question]:
    if config.split == "all" or (config.split == "test" and config.test_questions is not None):
        return questions
    shares = {"train": set(range(8)), "dev": {8}, "test": {9}}
    if config.test_questions is not None:
        shares["train"].add(9)
    return tuple(question for question in questions if _share(question.id) in shares[config.split])


def _share(question_id: str) -> int:
    """A number from 0 to 9 that depends on nothing but the id: the same in every file, process and version."""
    digest = hashlib.blake2b(question_id.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 10


def _sample(questions: Sequence[Question], config: JsonlConfig, source: str) -> Sequence[Question]:
    if config.num_questions is None:
        return questions
    if not 1 <= config.num_questions <= len(questions):
        raise ConfigurationError(
            f"num_questions={config.num_questions}, but split {config.split!r} of {source} has {len(questions)}; "
            f"give 1 to {len(questions)}, or None for all."
        )
    chosen = np.random.default_rng(config.seed).permutation(len(questions))[: config.num_questions]
    return tuple(questions[index] for index in sorted(chosen))


def _dataset_name(path: str) -> str:
    file = Path(path).expanduser().absolute()
    stem = file.name.partition(".")[0]
    return file.parent.name if stem in GENERIC_STEMS and file.parent.name else stem


@lru_cache(maxsize=8)
def _read_questions(path: str, mtime_ns: int, size: int) -> tuple[Question, ...]:
    name, stem = _dataset_name(path), Path(path).name.partition(".")[0]
    questions = []
    line_of: dict[str, int] = {}
    for number, row in read_jsonl(path):
        question = _question(row, f"{path}, line {number}", default_id=f"{stem}-{number}", default_name=name)
        if question.id in line_of:
            raise DataError(
                f"{path}, line {number}: id {question.id!r} is already the id of line {line_of[question.id]}."
            )
        line_of[question.id] = number
        questions.append(question)
    if not questions:
        raise DataError(f"{path}: is empty; a dataset needs at least one question.")
    return tuple(questions)


def _question(row: dict[str, Any], where: str, *, default_id: str, default_name: str) -> Question:
    text = text_field(row, "question", where)
    if not text.strip():
        raise DataError(f"{where}, field 'question': is empty.")
    identifier = text_field(row, "id", where) if "id" in row else default_id
    metadata = row.get("metadata", {})
    if not isinstance(metadata, dict):
        raise DataError(f"{where}, field 'metadata': expected an object, got {json_type(metadata)}.")
    if "data_source" in row:
        default_name = text_field(row, "data_source", where)
    return Question(identifier, text, _golden_answers(row, where), {"dataset": default_name, **metadata})


def _golden_answers(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The accepted answers of a row, from either of the two places where they may stand."""
    field, answers = "golden_answers", row.get("golden_answers")
    if "golden_answers" not in row:
        field, answers = "reward_model.ground_truth.target", row
        for key in field.split("."):
            answers = answers.get(key) if isinstance(answers, dict) else None
        if answers is None:
            raise DataError(f"{where}: no field 'golden_answers' (nor {field!r}); the row has {', '.join(row)}.")
    place = f"{where}, field {field!r}"
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list):
        raise DataError(f"{place}: expected a string or a list of strings, got {json_type(answers)}.")
    if not answers:
        raise DataError(f"{place}: is empty; a question needs at least one accepted answer.")
    for index, answer in enumerate(answers):
        if not checked_text(answer, f"{place}[{index}]").strip():
            raise DataError(f"{place}[{index}]: is blank; an empty answer would score as correct.")
    return tuple(answers)
