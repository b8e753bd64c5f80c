"""Retrievers. Importing this package registers the built-in ones. The libraries of a retriever load when it is made."""

from agentic_rag_env.retrievers.base import CorpusRetriever, Retriever
from agentic_rag_env.retrievers.bm25 import BM25Config, BM25Retriever
from agentic_rag_env.retrievers.cached import CachedConfig, CachedRetriever
from agentic_rag_env.retrievers.dense import DenseConfig, DenseRetriever
from agentic_rag_env.retrievers.faulty import FaultyConfig, FaultyRetriever
from agentic_rag_env.retrievers.http import HttpConfig, HttpRetriever
from agentic_rag_env.retrievers.hybrid import HybridConfig, HybridRetriever
from agentic_rag_env.retrievers.lancedb import LanceDBConfig, LanceDBRetriever
from agentic_rag_env.retrievers.rerank import RerankConfig, RerankRetriever
from agentic_rag_env.retrievers.sharded import ShardedConfig, ShardedRetriever
from agentic_rag_env.retrievers.static import StaticConfig, StaticRetriever
from agentic_rag_env.retrievers.vectors.encoders import ENCODERS, Encoder, StoredEncoder
from agentic_rag_env.retrievers.vectors.hashed_ngram import HashedNgramConfig, HashedNgramEncoder
from agentic_rag_env.retrievers.vectors.huggingface import HuggingFaceConfig, HuggingFaceEncoder

__all__ = [
    "ENCODERS",
    "BM25Config",
    "BM25Retriever",
    "CachedConfig",
    "CachedRetriever",
    "CorpusRetriever",
    "DenseConfig",
    "DenseRetriever",
    "Encoder",
    "FaultyConfig",
    "FaultyRetriever",
    "HashedNgramConfig",
    "HashedNgramEncoder",
    "HttpConfig",
    "HttpRetriever",
    "HuggingFaceConfig",
    "HuggingFaceEncoder",
    "HybridConfig",
    "HybridRetriever",
    "LanceDBConfig",
    "LanceDBRetriever",
    "RerankConfig",
    "RerankRetriever",
    "Retriever",
    "ShardedConfig",
    "ShardedRetriever",
    "StaticConfig",
    "StaticRetriever",
    "StoredEncoder",
]
