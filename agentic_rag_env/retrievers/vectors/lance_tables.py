"""Makes and opens tables of LanceDB: passages with their vectors, an index over words, and what was made of what."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from agentic_rag_env.corpus import Texts, fingerprint
from agentic_rag_env.errors import DataError, required_library
from agentic_rag_env.retrievers.vectors.encoders import StoredEncoder, first_not_finite
from agentic_rag_env.settings import Allowed
from agentic_rag_env.types import Passage

#: Kinds of an index over embeddings, with the names of the library's classes.
INDEXES = {"IVF_FLAT": "IvfFlat", "IVF_PQ": "IvfPq", "IVF_HNSW_SQ": "HnswSq"}
#: Languages of the stems and stop words of the library.
LANGUAGES = (
    *("Arabic", "Danish", "Dutch", "English", "Finnish", "French", "German", "Greek", "Hungarian", "Italian"),
    *("Norwegian", "Portuguese", "Romanian", "Russian", "Spanish", "Swedish", "Tamil", "Turkish"),
)
#: What the library takes for the name of a table.
TABLE_NAME = Allowed(
    "a name of ASCII letters, digits, underscores, hyphens and periods",
    lambda value: re.fullmatch(r"[\w.-]+", value, re.ASCII) is not None,
)
#: What is noted beside every table, and beside one with vectors.
_FACTS = {"corpus", "num_passages", "indexed"}
_FACTS_OF_ENCODER = {"encoder", "encoder_fingerprint", "state"}
#: Passages encoded and written at a time.
_SPAN = 4096


def import_lancedb() -> Any:
    """Import the library.

    Raises:
        ConfigurationError: It is missing.
    """
    with required_library("retriever 'lancedb' needs the library lancedb: pip install 'agentic-rag-env[lancedb]'."):
        import lancedb
    return lancedb


def connect(uri: str, options: Mapping[str, str] | None) -> Any:
    """Open a database.

    Args:
        uri: Folder, or address in object storage.
        options: See `LanceDBConfig.storage_options`.

    Raises:
        ConfigurationError: The library is missing.
        DataError: The place cannot be opened.
    """
    library = import_lancedb()
    try:
        return library.connect(
            uri if "://" in uri else str(Path(uri).expanduser()),
            storage_options=None if options is None else dict(options),
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"lancedb cannot open {uri}: {error}") from error


def table_names(database: Any) -> list[str]:
    """The names of the tables in a database."""
    return list(database.list_tables(limit=10_000).tables)


def facts_of(database: Any, table: str) -> dict[str, Any]:
    """What is noted beside a table that was made here; empty for another one.

    Raises:
        DataError: The notes are damaged.
    """
    name = f"{table}_facts"
    if name not in table_names(database):
        return {}
    try:
        facts = json.loads(database.open_table(name).to_arrow().column("facts")[0].as_py())
        if isinstance(facts, dict) and facts.pop("num_indexes", None) is not None:  # as versions before noted it
            facts.setdefault("indexed", [])
        needed = _FACTS | (_FACTS_OF_ENCODER if "encoder" in facts else set())
        if not isinstance(facts, dict) or not needed <= facts.keys():
            raise ValueError(f"it lacks one of {', '.join(sorted(needed))}")
        return facts
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError, RecursionError) as error:
        raise DataError(f"lancedb table {name!r} is damaged ({error}); make the table again.") from error


def is_whole(opened: Any, facts: Mapping[str, Any]) -> bool:
    """Whether an open table has all the rows and indexes that are noted beside it; more of them do no harm."""
    indexed = {column for index in opened.list_indices() for column in index.columns}
    return opened.count_rows() >= facts["num_passages"] and indexed >= set(facts["indexed"])


@contextmanager
def maker_of(uri: str, table: str) -> Iterator[None]:
    """Let one process at a time make a table. In object storage nothing can be locked.

    Raises:
        DataError: The folder cannot be written.
    """
    from filelock import FileLock

    if "://" in uri:
        yield
        return
    folder = Path(uri).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        locked = FileLock(folder / f".{table}.lock").acquire()
    except (OSError, NotImplementedError) as error:
        raise DataError(f"lancedb cannot make table {table!r} at {uri}: {error}; choose a local folder.") from error
    with locked:
        yield


def make_table(
    database: Any,
    name: str,
    corpus: Sequence[Passage],
    encoder: StoredEncoder | None,
    *,
    index: str | None,
    language: str | None,
) -> None:
    """Write passages, vectors and indexes. What is noted comes first, so that an unfinished table is known as one.

    Args:
        database: Where the table is made; one of that name is replaced.
        name: Name of the table.
        corpus: The passages.
        encoder: It makes the vectors; None: the table has none.
        index: See `LanceDBConfig`.
        language: See `LanceDBConfig`.

    Raises:
        DataError: The encoder gives numbers that are not finite.
    """
    import pyarrow as pa
    from lancedb import index as kinds

    facts: dict[str, Any] = {"corpus": fingerprint(corpus), "num_passages": len(corpus), "language": language}
    if encoder is not None:
        encoder.fit(Texts(corpus))
        facts |= {"encoder": encoder.settings(), "encoder_fingerprint": encoder.fingerprint, "state": encoder.state()}
    indexed = ["contents", *(["vector"] if encoder is not None and index else [])]
    # An index over embeddings is trained by chance, so two of the same passages rank differently.
    facts |= {"index": index, "indexed": indexed, "drawn": uuid4().hex if "vector" in indexed else None}
    noted = pa.table({"facts": pa.array([json.dumps(facts)], pa.large_string())})
    known = table_names(database)

    def write(called: str, content: Any, schema: Any) -> Any:
        return database.create_table(called, content, schema=schema, mode="overwrite" if called in known else "create")

    write(f"{name}_facts", noted, noted.schema)
    dim = encoder.encode_queries(["dimension"]).shape[1] if encoder else 0
    vectors = [("vector", pa.list_(pa.float32(), dim))] if dim else []
    schema = pa.schema([("id", pa.string()), ("contents", pa.large_string()), *vectors])
    table = write(name, _batches(corpus, encoder, schema), schema)
    usual = language is not None
    words = kinds.FTS(language=language or "English", stem=usual, remove_stop_words=usual, with_position=False)
    table.create_index("contents", config=words)
    if encoder is not None and index:
        table.create_index("vector", config=getattr(kinds, INDEXES[index])(distance_type="dot"))


def _batches(corpus: Sequence[Passage], encoder: StoredEncoder | None, schema: Any) -> Iterator[Any]:
    import pyarrow as pa

    for first in range(0, len(corpus), _SPAN):
        passages = [corpus[row] for row in range(first, min(first + _SPAN, len(corpus)))]
        columns = [pa.array([p.id for p in passages]), pa.array([p.contents for p in passages], pa.large_string())]
        if encoder is not None:
            encoded = np.ascontiguousarray(encoder.encode_passages([p.contents for p in passages]), np.float32)
            if (bad := first_not_finite(encoded)) is not None:
                raise DataError(f"the encoder gives NaN or infinity for passage {passages[bad].id!r}.")
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(encoded.ravel()), encoded.shape[1]))
        yield pa.record_batch(columns, schema=schema)
