"""Search in a LanceDB table, by embeddings, by words or by both; the table lies in a folder or in object storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agentic_rag_env.cache_folder import kept
from agentic_rag_env.corpus import fingerprint
from agentic_rag_env.errors import ConfigurationError, DataError, RetrieverError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import (
    OUTSIDE,
    Retriever,
    encodable,
    hash_of,
    require_corpus,
    search_once,
)
from agentic_rag_env.retrievers.vectors.encoders import StoredEncoder, build_encoder, encode_queries, stored
from agentic_rag_env.retrievers.vectors.lance_tables import (
    INDEXES,
    LANGUAGES,
    TABLE_NAME,
    connect,
    facts_of,
    import_lancedb,
    is_whole,
    make_table,
    maker_of,
    table_names,
)
from agentic_rag_env.retrievers.vectors.ranking import MARGIN, SCORE_DECIMALS
from agentic_rag_env.settings import COUNT, TEXT, check_settings, one_of, or_none
from agentic_rag_env.types import Found, Passage

SEARCHES = ("dense", "text", "hybrid")
#: Most words of a query for a search by words.
_MAX_WORDS = 128


@dataclass
class LanceDBConfig:
    """Settings of a LanceDB table and its search.

    Attributes:
        uri: Folder of the database, or its place in object storage (`s3://bucket/folder`). If it lacks the table, the
            table is made there from the corpus. None: the table is made once for all processes, in the cache folder.
        table: Name of the table, with columns `id`, `contents` and, for embeddings, `vector`.
        search: `dense` by embeddings, `text` by words (BM25), `hybrid` by both, fused by ranks.
        encoder: As for `dense`. None: the encoder that the table was made with, or `hashed_ngram` for a new one.
        index: Kind of the index over embeddings in a new table: `IVF_FLAT`, `IVF_PQ` or `IVF_HNSW_SQ`. None: no index;
            the search is exact and reads all vectors.
        nprobes: Number of lists that an index looks into; more find more and take longer. None: LanceDB's number.
        language: Language of stems and stop words in a new table, such as `English`. None: every word as it is.
        storage_options: Options of the object storage, such as `{endpoint: ..., region: ...}`. Keep keys out of here,
            since settings are saved; the storage reads them from the environment (`AWS_ACCESS_KEY_ID` and so on).
    """

    uri: str | None = field(default=None, metadata={OUTSIDE: True})
    table: str = "passages"
    search: str = "dense"
    encoder: Any = None
    index: str | None = None
    nprobes: int | None = None
    language: str | None = "English"
    storage_options: dict[str, str] | None = field(default=None, metadata={OUTSIDE: True})

    def __post_init__(self) -> None:
        check_settings(self, one_of(SEARCHES), "search")
        check_settings(self, or_none(one_of(INDEXES)), "index")
        check_settings(self, or_none(COUNT), "nprobes")
        check_settings(self, or_none(TEXT), "uri")
        check_settings(self, TABLE_NAME, "table")
        check_settings(self, or_none(one_of(LANGUAGES)), "language")


class _Row(NamedTuple):
    """A proposed passage with its place in the table."""

    place: int
    score: float
    passage: Passage


class _Part(NamedTuple):
    """One of the two searches of a hybrid one."""

    search: Callable[[Sequence[str], int], Sequence[Found]]


@RETRIEVERS.register("lancedb", LanceDBConfig)
class LanceDBRetriever:
    """Searches a table. Equal scores are in the order of the table, which is that of the corpus.

    Embeddings are scored by inner products, again after LanceDB's search, so that a result does not depend on the other
    queries. Without an index it is the ranking of `dense`. BM25 is LanceDB's own, with k1 = 1.2 and b = 0.75. A process
    that was forked after the table was opened must open it anew.

    Args:
        config: The settings.
        corpus: The passages of a new table. With a table that was made here, they must be those of the table.

    Raises:
        ConfigurationError: The library is missing, or there is neither a table nor a corpus to make it of.
        DataError: The table is incomplete and there is no corpus to make it of, rows were added to it, or it was made
            of another corpus or with another encoder.
    """

    def __init__(self, config: LanceDBConfig, corpus: Sequence[Passage] | None = None) -> None:
        self._config, self._given = config, corpus
        self._encoder = None if config.search == "text" else self._asked_encoder()
        uri = config.uri or self._in_cache()
        self._place = f"lancedb table {config.table!r} at {uri}"
        database = connect(uri, config.storage_options)
        if not self._is_there(database):
            with maker_of(uri, config.table):
                if not self._is_there(database):  # another process has made it meanwhile
                    self._make(database, require_corpus("lancedb", corpus))
        self._table = database.open_table(config.table)
        self._num_rows, self._version = self._table.count_rows(), self._table.version
        self._facts = facts_of(database, config.table)
        self._check()
        if config.search == "hybrid":
            parts = [_Part(self._by_vectors), _Part(self._by_words)]
            self._hybrid: Retriever = RETRIEVERS.build({"name": "hybrid", "retrievers": parts}, corpus=None)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy opens the table itself.
        return LanceDBRetriever, (self._config, self._given)

    @property
    def scores_by(self) -> str:
        """See `base.scores_by`."""
        return "passage" if self._config.search == "dense" else "corpus"

    @property
    def fingerprint(self) -> str | None:
        """Hash of all that results depend on, later changes of the table included; None if it was not made here."""
        if not self._facts:
            return None
        made = {key: value for key, value in self._facts.items() if key != "state"}
        return hash_of(["lancedb", self._config.search, self._config.nprobes, made, self._version])

    def search(self, queries: Sequence[str], top_k: int) -> Sequence[Found]:
        """See `Retriever.search`. A query that occurs more than once is searched once."""
        if self._config.search == "hybrid":
            return self._hybrid.search(queries, top_k)
        find = self._by_words if self._config.search == "text" else self._by_vectors
        return search_once(queries, top_k, lambda distinct: find(distinct, top_k))

    def _by_words(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        match: Any = import_lancedb().query.MatchQuery

        def propose(query: str, count: int) -> list[_Row]:
            words = " ".join(encodable(query).split()[:_MAX_WORDS])
            search = self._table.search(match(words, "contents"), query_type="fts")
            return _rows(self._read(search.select(["id", "contents", "_score"]).limit(count)), "_score")

        return [self._best(partial(propose, query), top_k) for query in queries]

    def _by_vectors(self, queries: Sequence[str], top_k: int) -> list[Found]:
        assert self._encoder is not None
        vectors, failed = encode_queries(self._encoder, queries)

        def propose(vector: NDArray[np.float32], count: int) -> list[_Row]:
            search = self._table.search(vector, vector_column_name="vector").distance_type("dot")
            if self._config.nprobes:
                search = search.nprobes(self._config.nprobes)
            found = self._read(search.select(["id", "contents", "vector", "_distance"]).limit(count))
            return _rows(found, "_distance", vector)

        return [
            self._best(partial(propose, vector), top_k) if vector.any() else failed.get(place, [])
            for place, vector in enumerate(vectors)
        ]

    def _best(self, propose: Callable[[int], list[_Row]], top_k: int) -> list[Passage]:
        """The best of the proposed rows. More are asked for while one that was not proposed could score as high."""
        count = top_k + MARGIN
        while True:
            rows = propose(count)
            best = sorted(rows, key=lambda row: (-row.score, row.place))[:top_k]
            lowest = min((row.score for row in rows), default=0.0)
            if len(rows) < count or count >= self._num_rows or best[-1].score > lowest + 10.0**-SCORE_DECIMALS:
                return [row.passage for row in best]
            count *= 4

    def _read(self, search: Any) -> Any:
        try:
            return search.with_row_id(True).to_arrow()
        except (RuntimeError, OSError, ValueError) as error:
            raise RetrieverError(f"{self._place} cannot be searched: {error}") from error

    def _asked_encoder(self) -> StoredEncoder | None:
        """The encoder that is asked for; None: that of the table."""
        if self._config.encoder is None and self._config.uri is not None and self._given is None:
            return None
        return stored(build_encoder(self._config.encoder or "hashed_ngram"), "be kept in a table")

    def _in_cache(self) -> str:
        """The folder of the cache that holds the table of the corpus."""
        import_lancedb()
        corpus, config = require_corpus("lancedb", self._given), self._config
        encoder = self._encoder and self._encoder.fingerprint
        made_of = [fingerprint(corpus), encoder, config.table, config.index, config.language]
        key = hash_of([*made_of, version("lancedb")])

        def make(folder: Path) -> None:
            self._make(connect(str(folder), None), corpus)

        return str(kept("lancedb", key, make, f"a LanceDB table of {len(corpus):,} passages"))

    def _is_there(self, database: Any) -> bool:
        """Whether the table is there and whole. A table of other passages is never taken for an unfinished one.

        Raises:
            DataError: It holds other passages than those given, or is incomplete and there are none to make it of.
        """
        name = self._config.table
        if name not in table_names(database):
            return False
        if not (facts := facts_of(database, name)):
            return True
        opened = database.open_table(name)
        num_rows, whole = opened.count_rows(), is_whole(opened, facts)
        if self._given is None:
            if not whole:
                raise DataError(
                    f"{self._place} is incomplete: it has {num_rows} of {facts['num_passages']} passages, or lacks an "
                    f"index over {' or '.join(facts['indexed'])}. Give the corpus, and it is made again."
                )
            return True
        if (found := fingerprint(self._given)) != facts["corpus"]:
            raise DataError(f"{self._place} was made of the corpus {facts['corpus']}, but the corpus given is {found}.")
        if num_rows > facts["num_passages"]:
            raise DataError(
                f"{self._place} was made of {facts['num_passages']} passages and now has {num_rows}. Open it without a "
                "corpus, take the added rows out, or give another table=<name>."
            )
        return whole

    def _make(self, database: Any, corpus: Sequence[Passage]) -> None:
        config = self._config
        make_table(database, config.table, corpus, self._encoder, index=config.index, language=config.language)

    def _check(self) -> None:
        """Compare the table with what is asked for, and take over what its encoder has learned."""
        columns, searches = set(self._table.schema.names), self._config.search
        if lacking := {"id", "contents", *(["vector"] if searches != "text" else [])} - columns:
            raise DataError(f"{self._place} lacks the columns {', '.join(sorted(lacking))}; it has {sorted(columns)}.")
        if searches != "dense" and not any(index.index_type == "FTS" for index in self._table.list_indices()):
            raise DataError(f"{self._place} has no index over words (FTS on 'contents'); make one, or search=dense.")
        if searches == "text":
            return
        facts = self._facts
        if not facts:
            if self._config.encoder is None:
                raise ConfigurationError(f"{self._place} does not say which encoder made its vectors; give encoder=...")
            return
        asked = self._config.encoder is not None and self._encoder
        self._encoder = asked or stored(build_encoder(facts["encoder"]), "be kept in a table")
        self._encoder.load_state(facts["state"])
        if self._encoder.fingerprint != facts["encoder_fingerprint"]:
            raise DataError(
                f"{self._place} was made with the encoder {facts['encoder']}, but the encoder given is "
                f"{self._encoder.settings()}, or has other weights; give that encoder, or make another table."
            )


def _rows(found: Any, column: str, query: NDArray[np.float32] | None = None) -> list[_Row]:
    """The rows of a reply, with scores that do not depend on the way of searching."""
    if query is None:
        scores = np.array(found.column(column).to_pylist(), np.float64)
    else:
        vectors = np.array(found.column("vector").to_pylist(), np.float64).reshape(-1, len(query))
        scores = (vectors * query).sum(axis=1)
    texts = zip(found.column("id").to_pylist(), found.column("contents").to_pylist(), strict=True)
    places = found.column("_rowid").to_pylist()
    return [
        _Row(place, score, Passage(str(name), contents, score))
        for place, score, (name, contents) in zip(places, np.round(scores, SCORE_DECIMALS).tolist(), texts, strict=True)
    ]
