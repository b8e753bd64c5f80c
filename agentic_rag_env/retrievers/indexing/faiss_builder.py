"""Builds FAISS indexes: chooses the kind of index, trains it, fills it and measures its recall."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.retrievers.indexing.progress import Phase
from agentic_rag_env.retrievers.vectors.encoders import Encoder
from agentic_rag_env.retrievers.vectors.faiss_search import FaissSearch, import_faiss, set_parameter
from agentic_rag_env.retrievers.vectors.ranking import nearest
from agentic_rag_env.retrievers.vectors.torch_search import TorchSearch

#: Most passages for which `auto` is exact, and most for which it keeps whole vectors.
MAX_FLAT, MAX_WHOLE = 200_000, 2_000_000
#: How an index searches unless a retriever says otherwise: lists of an IVF index, candidates of an HNSW graph.
NPROBE, EF_SEARCH = 64, 128
#: FAISS wants 39 training vectors for each list, and for each of the 256 codes of a quantizer.
_TRAINING_PER_LIST, _TRAINING_LEAST = 64, 65_536
_BLOCK_ROWS = 16_384
_RECALL_QUERIES, _RECALL_WORDS, _RECALL_AT = 256, 8, (3, 10)


def default_index(num_passages: int) -> str:
    """The factory string behind `auto`.

    Up to 200,000 passages it is `Flat`, which is exact. Up to 2,000,000 it is `IVF<lists>,Flat`, which keeps whole
    vectors; a search sees a share of them. Beyond that it is `IVF<lists>,SQ8`, with one byte per number: 21 million
    passages with vectors of width 768 take 16 GB. The number of lists is the power of two nearest to four times the
    square root of the number of passages.
    """
    lists = 2 ** round(math.log2(4 * math.sqrt(num_passages)))
    if num_passages <= MAX_FLAT:
        return "Flat"
    return f"IVF{lists},Flat" if num_passages <= MAX_WHOLE else f"IVF{lists},SQ8"


def build_index(
    vectors: NDArray[np.floating],
    factory: str,
    seed: int,
    threads: int | None,
    phase: Phase,
) -> Any:
    """Train a FAISS index of inner products and fill it.

    Args:
        vectors: [n, dim], may be memory-mapped.
        factory: The factory string of FAISS.
        seed: Seed that draws the training vectors.
        threads: See `DenseIndexConfig.threads`.
        phase: Shows progress.

    Raises:
        ConfigurationError: The library is missing, or FAISS cannot build such an index of these vectors.
    """
    faiss = import_faiss("agentic-rag-index dense")
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        with _threads(1 if threads is None and "HNSW" in factory else threads):
            if not index.is_trained:
                rows = _training_rows(index, len(vectors), seed)
                with phase(f"Training on {len(rows)} vectors", None):
                    index.train(np.asarray(vectors[rows], np.float32))
            with phase("Indexing", len(vectors)) as advance:
                for first in range(0, len(vectors), _BLOCK_ROWS):
                    block = np.asarray(vectors[first : first + _BLOCK_ROWS], np.float32)
                    index.add(np.ascontiguousarray(block))
                    advance(len(block))
    except RuntimeError as error:
        reason = str(error).partition("Error: ")[2] or str(error)
        raise ConfigurationError(
            f"FAISS cannot build index={factory!r} of {len(vectors)} vectors of {vectors.shape[1]} numbers: {reason}"
        ) from error
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        set_parameter(index, "nprobe", min(NPROBE, ivf.nlist))
    elif isinstance(index, faiss.IndexHNSW):
        set_parameter(index, "efSearch", EF_SEARCH)
    return index


def measure_recall(
    index: Any,
    vectors: NDArray[np.floating],
    texts: Sequence[str],
    encoder: Encoder,
    seed: int,
    phase: Phase,
) -> dict[str, float]:
    """The share of the truly nearest passages that an index finds as it stands.

    Args:
        index: The index of FAISS.
        vectors: [n, dim], the vectors that it was built from.
        texts: [n], the passages. A query is a run of eight words from one of them.
        encoder: The encoder of the queries.
        seed: Seed that draws passages and words.
        phase: Shows progress.

    Returns:
        `num_queries`, `recall@3` and `recall@10`.
    """
    queries = encoder.encode_queries(_sample_queries(texts, seed))
    queries = np.ascontiguousarray(queries[queries.any(axis=1)], np.float32)
    report: dict[str, float] = {"num_queries": len(queries)}
    if not len(queries):
        return report
    with phase(f"Measuring recall by {len(queries)} queries", None):
        most = max(_RECALL_AT)
        # On the CPU the vectors stay on disk; a GPU may be too small for all of them.
        exact, found = (nearest(search, queries, most) for search in (TorchSearch(vectors, "cpu"), FaissSearch(index)))
    for k in _RECALL_AT:
        shares = [
            len({row for row, _ in truth[:k]} & {row for row, _ in ranking[:k]}) / len(truth[:k])
            for truth, ranking in zip(exact, found, strict=True)
        ]
        report[f"recall@{k}"] = round(float(np.mean(shares)), 4)
    return report


def _training_rows(index: Any, num_rows: int, seed: int) -> NDArray[np.int64]:
    import faiss

    ivf = faiss.try_extract_index_ivf(index)
    wanted = max(_TRAINING_LEAST, _TRAINING_PER_LIST * ivf.nlist if ivf is not None else 0)
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(num_rows, min(wanted, num_rows), replace=False, shuffle=False))


def _sample_queries(texts: Sequence[str], seed: int) -> list[str]:
    rng = np.random.default_rng([seed, 1])
    queries = []
    for row in rng.choice(len(texts), min(_RECALL_QUERIES, len(texts)), replace=False):
        words = texts[int(row)].split()
        first = int(rng.integers(max(1, len(words) - _RECALL_WORDS + 1)))
        queries.append(" ".join(words[first : first + _RECALL_WORDS]))
    return queries


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(number or before)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
