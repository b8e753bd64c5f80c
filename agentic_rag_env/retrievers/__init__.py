"""Retrievers. Importing this package registers the built-in ones. The libraries of a retriever load when it is made."""

# Each of these files registers its part.
from agentic_rag_env.retrievers import (  # noqa: F401
    bm25,
    cached,
    dense,
    faulty,
    http,
    hybrid,
    lancedb,
    rerank,
    sharded,
    static,
)
from agentic_rag_env.retrievers.vectors import hashed_ngram, huggingface  # noqa: F401
