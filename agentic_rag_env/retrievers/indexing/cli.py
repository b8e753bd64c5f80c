"""Build and check the files that retrievers open at once: a store of passages, a BM25 index or a dense index.

agentic-rag-index store wiki-18.jsonl wiki-18.arrow
agentic-rag-index bm25 wiki-18.arrow wiki-bm25 --stemmer english --stopwords english
agentic-rag-index dense wiki-18.arrow wiki-e5 --encoder intfloat/e5-base-v2 --dtype float16
agentic-rag-index dense wiki-18.arrow wiki-bge --index HNSW32 --encoder '{"model": "bge-folder", "preset": "bge"}'
agentic-rag-index check wiki-e5

A corpus is a store or a file of passages: JSON lines, plain or compressed (.gz, .zst), Parquet or Arrow. After a kill,
give the same command again: it goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from agentic_rag_env.corpus import open_corpus
from agentic_rag_env.retrievers.bm25 import BM25Config
from agentic_rag_env.retrievers.indexing.builder import DenseIndexConfig, build_bm25, build_dense
from agentic_rag_env.retrievers.indexing.check import check
from agentic_rag_env.retrievers.indexing.progress import progress
from agentic_rag_env.terminal import add_settings, command_parser, run_command

#: The settings of BM25 that decide an index.
_OF_BM25 = ("k1", "b", "stemmer", "stopwords", "tokenizer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Build what the command line asks for.

    Args:
        arguments: Arguments of the command line; None: those of the process.

    Returns:
        Exit status: 0, or 2 where a setting or a file can't work.
    """
    try:
        return run_command(lambda: _build(_parser().parse_args(arguments)))
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.", file=sys.stderr)
        return 130


def _build(options: argparse.Namespace) -> None:
    options.build(options)


def _build_store(options: argparse.Namespace) -> None:
    with progress("Reading passages", None) as advance:
        store = open_corpus(options.corpus, options.store, advance)
    print(f"{store.path}: {len(store)} passages, fingerprint {store.fingerprint}")


def _build_bm25(options: argparse.Namespace) -> None:
    config = BM25Config(**{name: getattr(options, name) for name in _OF_BM25})
    _report(options.folder, build_bm25(options.corpus, options.folder, config, progress))


def _build_dense(options: argparse.Namespace) -> None:
    config = DenseIndexConfig(**{setting.name: getattr(options, setting.name) for setting in fields(DenseIndexConfig)})
    _report(options.folder, build_dense(options.corpus, options.folder, config, progress))


def _check(options: argparse.Namespace) -> None:
    print(f"{options.path}: {check(options.path, progress)}")


def _report(folder: str, manifest: dict[str, Any]) -> None:
    shown = {**manifest["index"], **manifest.get("recall", {})}
    print(f"{folder}: {manifest['corpus']['num_passages']} passages, {manifest['kind']}, ", end="")
    print(", ".join(f"{name} {value}" for name, value in shown.items()))


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("agentic-rag-index", __doc__)
    kinds = parser.add_subparsers(required=True, metavar="store | bm25 | dense | check")
    store = kinds.add_parser("store", help="write a store of passages")
    store.add_argument("corpus", help="file of passages")
    store.add_argument("store", help="the store, a name in .arrow")
    store.set_defaults(build=_build_store)
    checked = kinds.add_parser("check", help="read a corpus or an index whole and look for damage")
    checked.add_argument("path", help="file of passages, store, or folder of an index")
    checked.set_defaults(build=_check)
    bm25 = kinds.add_parser("bm25", help="build a BM25 index")
    dense = kinds.add_parser("dense", help="build a dense index")
    for kind in (bm25, dense):
        kind.add_argument("corpus", help="store or file of passages")
        kind.add_argument("folder", help="folder of the index")
    add_settings(bm25, BM25Config, *_OF_BM25)
    bm25.set_defaults(build=_build_bm25)
    add_settings(dense, DenseIndexConfig)
    dense.set_defaults(build=_build_dense)
    return parser


if __name__ == "__main__":
    sys.exit(main())
