"""The published question-answering benchmarks, from a folder or from the Hugging Face hub."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from agentic_rag_env.corpus import read_corpus
from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.datasets.rows import collect, file_stem, read_questions
from agentic_rag_env.datasets.selection import sample, share
from agentic_rag_env.errors import ConfigurationError, DataError, required_library
from agentic_rag_env.registry import DATASETS
from agentic_rag_env.settings import check_settings, check_value, one_of
from agentic_rag_env.types import Question

SPLITS = ("train", "dev", "test")
ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow")
#: Where `train` and `dev` are the same published split, `dev` is one of this many shares of it.
_SHARES = 100

_logger = logging.getLogger(__name__)


@dataclass
class BenchmarkConfig:
    """Which benchmark, and where it is.

    `conf/dataset/` holds one preset for each of the seven: `nq`, `triviaqa`, `popqa`, `hotpotqa`, `2wikimultihopqa`,
    `musique` and `bamboogle`.

    Attributes:
        subset: Name of the benchmark: the configuration on the hub, the folder below `path`, and the name under which
            scores are reported. None: the hub's only configuration, or `path` itself.
        path: Folder with a file per published split (`test.jsonl`, `dev.parquet`, ...), or with a folder `<subset>` of
            such files. It may also be one such file; then only that split is read. None: the hub is read.
        hub: Repository on the hub, or a local copy of one; used without `path`.
        splits: The published split behind each of `train`, `dev` and `test`, if it has another name; None: there is
            none. Where `train` and `dev` are the same one, a hash of the ids picks a hundredth of it as `dev`, and the
            rest is `train`.
        sizes: Number of questions in each published split, where known; another number causes a warning.
        corpus: File of passages (see `agentic_rag_env.corpus.read_corpus`); None if the retriever brings its own.
        split: `train`, `dev` or `test`.
        num_questions: Keep a random sample of this size of the split, in its order; None keeps all.
        seed: Decides the sample; the same seed draws the same one, and a larger sample contains the smaller.
    """

    subset: str | None = None
    path: str | None = None
    hub: str = "RUC-NLPIR/FlashRAG_datasets"
    splits: dict[str, str | None] = field(default_factory=lambda: {split: split for split in SPLITS})
    sizes: dict[str, int] = field(default_factory=dict)
    corpus: str | None = None
    split: str = "train"
    num_questions: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, one_of(SPLITS), "split")
        for name in self.splits:
            check_value("a name in splits", name, one_of(SPLITS))


@DATASETS.register("benchmark", BenchmarkConfig)
def benchmark(config: BenchmarkConfig) -> QuestionSet:
    """Read a split of a benchmark, and the corpus that goes with it.

    The rows are FlashRAG's or Search-R1's, see `agentic_rag_env.datasets.rows.question_in`.

    Raises:
        ConfigurationError: The split is unknown or the benchmark lacks it, test questions would also be trained on,
            the split is smaller than the sample asked for, or the library for the hub is missing.
        DataError: The files are missing, cannot be downloaded or are malformed.
    """
    published, divided = _published_split(config)
    source, name = _source(config, published)
    questions: Sequence[Question]
    if config.path is None:
        questions = _hub_questions(config.hub, config.subset, published, name)
    else:
        questions = read_questions(source, name)
    _compare_size(config, published, source, len(questions))
    if divided:
        questions = tuple(q for q in questions if (share(q.id, _SHARES) == 0) == (config.split == "dev"))
        if not questions:
            raise DataError(f"{source}: is too small for a hundredth of it to be the split {config.split!r}.")
    chosen = sample(questions, config.num_questions, config.seed, f"split {config.split!r} of {name}")
    return QuestionSet(name, chosen, None if config.corpus is None else read_corpus(config.corpus))


def _published_split(config: BenchmarkConfig) -> tuple[str, bool]:
    """The published split behind the one asked for, and whether `train` and `dev` share it."""
    behind = {split: published for split in SPLITS if (published := config.splits.get(split, split)) is not None}
    if config.split not in behind:
        raise ConfigurationError(
            f"{config.subset or 'benchmark'} has no split {config.split!r}, only {', '.join(behind) or 'none'}. Train "
            "on another dataset, such as dataset=nq_hotpotqa, and give this one to algorithms.evaluate."
        )
    for split in ("train", "dev"):
        if split in behind and behind[split] == behind.get("test"):
            raise ConfigurationError(
                f"{config.subset or 'benchmark'}: {split} and test are both the published split {behind[split]!r}, but "
                f"test questions must not be looked at in training. Set splits.{split} to another one, such as train, "
                "or to null."
            )
    return behind[config.split], behind.get("train") == behind.get("dev") and config.split != "test"


def _source(config: BenchmarkConfig, published: str) -> tuple[str, str]:
    """The place of a published split, and the name of the benchmark."""
    if config.path is None:
        name = config.subset or config.hub.rpartition("/")[2]
        return f"{config.hub}{f' ({config.subset})' if config.subset else ''}, split {published}", name
    path = Path(config.path).expanduser()
    if path.is_file():
        if file_stem(path) != published:
            raise DataError(
                f"{path}: split {config.split!r} needs the published split {published!r}, whose file would be called "
                f"{published}{path.name[len(file_stem(path)) :]}. Give the folder of both, ask for the split that "
                "this file is, or use dataset=jsonl for a file by another name."
            )
        return str(path), config.subset or path.absolute().parent.name
    folder = path / config.subset if config.subset and (path / config.subset).is_dir() else path
    for ending in ENDINGS:
        if (file := folder / f"{published}{ending}").is_file():
            return str(file), config.subset or folder.absolute().name
    found = sorted(entry.name for entry in folder.iterdir())[:8] if folder.is_dir() else []
    raise DataError(
        f"{folder}: has no file {published}{{{','.join(ENDINGS)}}}, needed for split {config.split!r}; found: "
        f"{', '.join(found) or 'nothing'}. Another published split can stand in: splits.{config.split}=..."
    )


@lru_cache(maxsize=16)
def _hub_questions(repository: str, subset: str | None, split: str, name: str) -> tuple[Question, ...]:
    with required_library(
        f"{repository} is on the hub, and reading it needs the library datasets: pip install 'agentic-rag-env[hub]'; "
        "or give dataset.path=<folder> with files that you have."
    ):
        from datasets import load_dataset
    place = f"{repository}{f' ({subset})' if subset else ''}, split {split}"
    try:
        table = load_dataset(repository, subset, split=split)
    except Exception as error:  # of the libraries below, which raise their own kinds
        raise DataError(
            f"{place}: can't be loaded from the hub: {type(error).__name__}: {error} Check the name and the "
            "connection, or download the files and give dataset.path=<folder>."
        ) from error
    rows = ((f"{place}, row {number}", row) for number, row in enumerate(table, 1))
    return collect(rows, place, name, split)


def _compare_size(config: BenchmarkConfig, published: str, source: str, count: int) -> None:
    expected = config.sizes.get(published)
    if expected is not None and count != expected:
        _logger.warning(
            "%s: has %d questions, but the published split %s of %s has %d; figures can't be compared with published "
            "ones.",
            source,
            count,
            published,
            config.subset,
            expected,
        )
