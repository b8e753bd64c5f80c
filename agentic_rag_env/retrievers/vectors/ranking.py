"""Ranks the proposals of an approximate or rounding search exactly, the same for every way of searching."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from agentic_rag_env.retrievers.base import Ranking

#: Scores are compared after rounding to this many decimals: a text encoded in another batch differs by some 1e-7.
SCORE_DECIMALS = 5
#: Candidates fetched beyond `top_k`, so that most ties are decided without a second look.
MARGIN = 8
#: Most numbers in the vectors of the candidates held at a time.
_MAX_NUMBERS = 2**26


class Candidates(NamedTuple):
    """What a search proposes for n queries.

    Attributes:
        scores: [n, m], as computed by the search, descending.
        rows: [n, m], places in the corpus; -1 where there are no more, and the scores there mean nothing.
        vectors: [n, m, dim], the embeddings of the rows.
    """

    scores: NDArray[np.float32]
    rows: NDArray[np.int64]
    vectors: NDArray[np.float32]


class VectorSearch(Protocol):
    """Proposes candidates.

    Attributes:
        num_rows: Number of rows.
        dim: Width of the vectors.
        tolerance: Most by which a proposed score may differ from the inner product of the vectors.
    """

    num_rows: int
    dim: int
    tolerance: float

    def propose(self, queries: NDArray[np.float32], count: int) -> Candidates:
        """Propose the `count` best rows for queries [n, dim], as far as the search can tell."""
        ...


def nearest(search: VectorSearch, queries: NDArray[np.float32], top_k: int) -> list[Ranking]:
    """Rank rows by their inner products with queries; equal scores are in the order of the rows.

    The proposed rows are scored again, so that a result depends neither on the size of a batch nor on the way of
    computing. If a row that was not proposed could score as high as the last of the best, more rows are asked for.

    Args:
        search: The search that proposes rows.
        queries: [n, dim].
        top_k: Number of rows to return, at least 1.
    """
    best: list[Ranking] = [[] for _ in queries]
    pending = np.arange(len(queries))
    count = min(top_k + MARGIN, search.num_rows)
    while len(pending):
        unsettled: list[int] = []
        span = max(1, _MAX_NUMBERS // (count * search.dim))
        for first in range(0, len(pending), span):
            places = pending[first : first + span]
            for place, scores, rows, vectors in zip(places, *search.propose(queries[places], count), strict=True):
                best[place] = _rank(queries[place], rows, vectors, top_k)
                complete = count == search.num_rows or rows[-1] < 0
                if not complete and best[place][-1][1] <= scores[-1] + search.tolerance:
                    unsettled.append(place)
        pending = np.array(unsettled, np.int64)
        count = min(4 * count, search.num_rows)
    return best


def _rank(query: NDArray[np.float32], rows: NDArray[np.int64], vectors: NDArray[np.float32], top_k: int) -> Ranking:
    """The best of some rows [m] with vectors [m, dim], by inner products that do not depend on the size of a batch."""
    known = rows >= 0
    rows, vectors = rows[known], vectors[known]
    scores = np.round((vectors.astype(np.float64) * query).sum(axis=1), SCORE_DECIMALS)
    best = np.lexsort((rows, -scores))[:top_k]
    return [(int(rows[place]), float(scores[place])) for place in best]
