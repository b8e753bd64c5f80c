"""Reads files of passages, and holds millions of passages in a memory-mapped store."""

from agentic_rag_env.corpus.rows import (
    checked_id,
    checked_text,
    file_version,
    json_type,
    passages_in,
    quoted_contents,
    read_jsonl,
    read_rows,
    text_field,
)
from agentic_rag_env.corpus.store import (
    CorpusStore,
    Texts,
    check_corpus,
    fingerprint,
    open_corpus,
    read_corpus,
    write_store,
)

__all__ = [
    "CorpusStore",
    "Texts",
    "check_corpus",
    "checked_id",
    "checked_text",
    "file_version",
    "fingerprint",
    "json_type",
    "open_corpus",
    "passages_in",
    "quoted_contents",
    "read_corpus",
    "read_jsonl",
    "read_rows",
    "text_field",
    "write_store",
]
