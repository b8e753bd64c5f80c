"""Make the files of `nq_mini` and `hotpot_mini` from normalized copies of the benchmarks, and print what is in them.

    python -m agentic_rag_env.datasets.mini.make SOURCES [--out DIR]

SOURCES has the folders `nq` and `hotpotqa`, each with questions in `train.jsonl` (and `dev.jsonl`) and passages in
`corpus.jsonl.gz`. A question's metadata names its gold passages (`supporting`) and its published `split`. The same
sources give the same rows, and with the same version of pyarrow the same bytes. Needs PyStemmer and takes two minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from agentic_rag_env.answers import holds_answer
from agentic_rag_env.corpus import read_corpus
from agentic_rag_env.datasets.mini import ENDING, FOLDER
from agentic_rag_env.datasets.mini.recipe import STEMMED_BM25, Miniature, draw, is_yes_no
from agentic_rag_env.datasets.rows import read_questions
from agentic_rag_env.files import written_whole
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.terminal import command_parser, run_command
from agentic_rag_env.types import Passage, Question

#: Number of passages in each set, and the level of the compression.
NUM_PASSAGES, _LEVEL = 10_000, 19
_RETRIEVERS = {"words": {"name": "bm25"}, "stems": STEMMED_BM25}


class Source(NamedTuple):
    """Where a set comes from: a folder, and the published splits that are taken from it."""

    folder: str
    published: tuple[str, ...]


#: NQ's published dev set stays untouched: it is the test set of NQ-open, which everybody reports.
SOURCES = {"nq_mini": Source("nq", ("train",)), "hotpot_mini": Source("hotpotqa", ("train", "dev"))}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for.

    Args:
        arguments: Arguments of the command line; None: those of the process.

    Returns:
        Exit status: 0, or 2 where the sources can't be used.
    """
    return run_command(lambda: _make_all(_parser().parse_args(arguments)))


def _make_all(options: argparse.Namespace) -> None:
    _print([row for name, source in SOURCES.items() for row in _make(name, source, options.sources, options.out)])


def _make(name: str, source: Source, sources: Path, out: Path) -> list[dict[str, str]]:
    folder = sources / source.folder
    corpus = read_corpus(folder / "corpus.jsonl.gz")
    questions = [question for split in source.published for question in read_questions(folder / f"{split}.jsonl")]
    miniature = draw(name, questions, corpus, NUM_PASSAGES)
    return statistics(name, miniature, corpus, write(miniature, out / name))


def write(miniature: Miniature, folder: Path) -> int:
    """Write the files of a set.

    Returns:
        The size of the files [bytes].
    """
    folder.mkdir(parents=True, exist_ok=True)
    passages = ({"id": passage.id, "contents": passage.contents} for passage in miniature.corpus)
    size = _write_rows(folder / f"corpus{ENDING}", passages)
    for split, questions in miniature.splits.items():
        size += _write_rows(folder / f"{split}{ENDING}", map(_row, questions))
    return size


def _row(question: Question) -> dict[str, Any]:
    answers = list(question.golden_answers)
    return {"id": question.id, "question": question.text, "golden_answers": answers, "metadata": question.metadata}


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    import pyarrow as pa

    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    compressed = pa.Codec("zstd", compression_level=_LEVEL).compress(text, asbytes=True)
    with written_whole(path) as partial:
        partial.write_bytes(compressed)
    return len(compressed)


def statistics(name: str, miniature: Miniature, source: Sequence[Passage], size: int) -> list[dict[str, str]]:
    """What is in a set, as one row for each way of searching.

    Args:
        name: Name of the set.
        miniature: The set.
        source: All passages of the source; figures over these follow in brackets.
        size: Size of its files [bytes].
    """
    test = miniature.splits["test"]
    num_new = sum(not question.metadata["answer_in_training"] for question in test)
    what = {
        "set": name,
        "train, dev, test": ", ".join(f"{len(questions):,}" for questions in miniature.splits.values()),
        "new answers": f"{num_new:,}",
        "passages": f"{len(miniature.corpus):,} ({len(source):,})",
        "gold": f"{miniature.num_gold / len(miniature.corpus):.1%}",
        "MB": f"{size / 1e6:.2f}",
    }
    rows = []
    for words, retriever in _RETRIEVERS.items():
        here, there = (hits(test, RETRIEVERS.build(retriever, corpus=of)) for of in (miniature.corpus, source))
        shares = {f"hit@{k}": f"{here[k]:.3f} ({there[k]:.3f})" for k in here}
        rows.append({**what, "BM25 over": words, **shares})
    return rows


def hits(questions: Sequence[Question], retriever: Any) -> dict[int, float]:
    """Share of questions with a golden answer in the best passage (1), and in one of the best three passages (3).

    The query is the question itself. Questions whose answer is yes or no are left out.
    """
    asked = [question for question in questions if not is_yes_no(question.golden_answers)]
    held = [
        [holds_answer(passage.contents, question.golden_answers) for passage in passages]
        for question, passages in zip(asked, retriever.search([question.text for question in asked], 3), strict=True)
    ]
    return {k: sum(any(of[:k]) for of in held) / len(held) for k in (1, 3)}


def _print(rows: Sequence[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0], caption="In brackets: the whole source. New answers: of test questions, not in training.")
    for row in rows:
        table.add_row(*row.values())
    Console(highlight=False, width=140).print(table)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python -m agentic_rag_env.datasets.mini.make", __doc__)
    parser.add_argument("sources", type=Path, help="folder with the benchmarks")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write into; default: that of the package")
    return parser


if __name__ == "__main__":
    sys.exit(main())
