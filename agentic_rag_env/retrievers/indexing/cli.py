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
from typing import Any

from agentic_rag_env.corpus import open_corpus
from agentic_rag_env.registry import name_or_mapping
from agentic_rag_env.retrievers.bm25 import BM25Config
from agentic_rag_env.retrievers.indexing.builder import DenseIndexConfig, build_bm25, build_dense
from agentic_rag_env.retrievers.indexing.check import check
from agentic_rag_env.retrievers.indexing.progress import progress
from agentic_rag_env.terminal import command_parser, run_command


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
    settings = {name: getattr(options, name) for name in ("k1", "b", "stemmer", "stopwords", "tokenizer")}
    config = BM25Config(**settings)
    _report(options.folder, build_bm25(options.corpus, options.folder, config, progress))


def _build_dense(options: argparse.Namespace) -> None:
    config = DenseIndexConfig(
        encoder=options.encoder,
        index=options.index,
        dtype=options.dtype,
        shard_size=options.shard_size,
        seed=options.seed,
        threads=options.threads,
    )
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
        kind.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    bm25.add_argument("--k1", type=float, default=BM25Config.k1, help="saturation of the term frequency")
    bm25.add_argument("--b", type=float, default=BM25Config.b, help="strength of the length normalization")
    bm25.add_argument("--stemmer", help="language of the Snowball stemmer, such as english (needs PyStemmer)")
    bm25.add_argument("--stopwords", help="list of words that do not count, such as english")
    tokenizer_help = "words, or bigrams for Chinese and Japanese, which have no blanks between words"
    bm25.add_argument("--tokenizer", default=BM25Config.tokenizer, help=tokenizer_help)
    bm25.set_defaults(build=_build_bm25)
    defaults = DenseIndexConfig()
    encoder_help = "registered name, folder or hub id of a model, or a JSON object with 'name' or 'model' and settings"
    dense.add_argument("--encoder", type=name_or_mapping, default=defaults.encoder, help=encoder_help)
    dense.add_argument("--index", default=defaults.index, help="FAISS factory string, or auto: by the corpus size")
    dense.add_argument("--dtype", default=defaults.dtype, help="of the vectors on disk: float32 or float16")
    dense.add_argument("--shard-size", type=int, default=defaults.shard_size, help="passages between two savings")
    dense.add_argument("--seed", type=int, default=defaults.seed, help="of training vectors and recall queries")
    dense.add_argument("--threads", type=int, help="for building the index: all, but one for HNSW")
    dense.set_defaults(build=_build_dense)
    return parser


if __name__ == "__main__":
    sys.exit(main())
