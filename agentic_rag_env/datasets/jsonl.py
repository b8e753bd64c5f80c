"""Reads questions and passages from the user's own files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentic_rag_env.corpus import read_corpus
from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.datasets.rows import dataset_name, read_questions
from agentic_rag_env.datasets.selection import sample, share
from agentic_rag_env.errors import DataError
from agentic_rag_env.registry import DATASETS
from agentic_rag_env.settings import check_settings, one_of
from agentic_rag_env.types import Question

SPLITS = ("all", "train", "dev", "test")


@dataclass
class JsonlConfig:
    """Which files to read, and which part of them to use.

    Attributes:
        questions: File of questions: JSON lines, plain, `.gz` or `.zst`; `.parquet` or `.arrow`.
        corpus: File of passages (see `agentic_rag_env.corpus.read_corpus`); None if the retriever brings its own.
        test_questions: File with the questions of the split `test`, where there is a separate one.
        split: `all` is the whole of `questions`. Otherwise the hash of its id puts each question into one of ten shares
            of about equal size: share 8 is `dev`, share 9 is `test`, the others are `train`. With `test_questions`,
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

    def __post_init__(self) -> None:
        check_settings(self, one_of(SPLITS), "split")


@DATASETS.register("jsonl", JsonlConfig)
def jsonl_dataset(config: JsonlConfig) -> QuestionSet:
    """Read a split of a file of questions, and the corpus that goes with it.

    The rows are FlashRAG's or Search-R1's, see `agentic_rag_env.datasets.rows.question_in`. A missing id becomes
    `<file>-<line>`. A row that does not name its dataset gets the name of the file, or of its folder if the file is
    called `train`, `dev`, `test` or the like.

    Splits of unchanged files share one corpus object within a process.

    Raises:
        ConfigurationError: The split is unknown, or smaller than the sample asked for.
        DataError: A file is missing or malformed, or the split is empty.
    """
    source = config.questions
    if config.split == "test" and config.test_questions is not None:
        source = config.test_questions
    questions = _select(read_questions(source), config)
    if not questions:
        raise DataError(
            f"{source}: split {config.split!r} is empty; the file has too few questions to be divided. "
            "Give more questions, or a file for each split: dataset=benchmark with path=<folder> reads train.jsonl, "
            "dev.jsonl and test.jsonl there."
        )
    chosen = sample(questions, config.num_questions, config.seed, f"split {config.split!r} of {source}")
    corpus = None if config.corpus is None else read_corpus(config.corpus)
    return QuestionSet(dataset_name(source), chosen, corpus)


def _select(questions: Sequence[Question], config: JsonlConfig) -> Sequence[Question]:
    if config.split == "all" or (config.split == "test" and config.test_questions is not None):
        return questions
    shares = {"train": set(range(8)), "dev": {8}, "test": {9}}
    if config.test_questions is not None:
        shares["train"].add(9)
    return tuple(question for question in questions if share(question.id, 10) in shares[config.split])
