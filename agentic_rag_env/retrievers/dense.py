"""Dense search in a FAISS index: exact in a flat one, approximate in the others, on CPU or GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.vectors.faiss_search import (
    FaissGpuSearch,
    FaissSearch,
    FlatSearch,
    import_faiss,
    is_flat,
    read_index,
    set_parameter,
)
from agentic_rag_env.retrievers.vectors.ranking import VectorSearch
from agentic_rag_env.retrievers.vectors.retriever import FAISS_FILE, EmbeddingConfig, EmbeddingRetriever
from agentic_rag_env.types import Passage


@dataclass
class DenseConfig(EmbeddingConfig):
    """Settings of dense search through FAISS; see also `EmbeddingConfig`.

    Attributes:
        nprobe: Lists that an IVF index looks into; more find more and take longer. None: what the index was saved with.
        ef_search: Candidates that an HNSW graph keeps while searching, likewise.
        device: `cpu` searches the memory-mapped file. `cuda`, or `cuda:0,cuda:1`, copies it to all GPUs or those named,
            as float16, each holding a share; FAISS must have been built for GPUs.
    """

    nprobe: int | None = None
    ef_search: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("nprobe", "ef_search"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigurationError(f"dense {name} must be at least 1, got {value}.")


@RETRIEVERS.register("dense", DenseConfig)
class DenseRetriever(EmbeddingRetriever):
    """Searches embeddings by FAISS: in memory, 4 bytes x dim x passages, or in a memory-mapped index.

    Args:
        config: Encoder, index and how to search it.
        corpus: The passages; their order decides ties. None: those of the index folder.

    Raises:
        ConfigurationError: As for `EmbeddingRetriever`; or a library is missing, or the index cannot be searched so.
        DataError: As for `EmbeddingRetriever`; or the file is no FAISS index of inner products.
    """

    def __init__(self, config: DenseConfig, corpus: Sequence[Passage] | None = None) -> None:
        self._settings = config
        super().__init__("dense", config, corpus)

    def _open_vectors(self, vectors: NDArray[np.floating]) -> VectorSearch:
        faiss = import_faiss("dense")
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        return self._configured(index)

    def _from_disk(self, path: Path) -> VectorSearch:
        return self._configured(read_index(path / FAISS_FILE if path.is_dir() else path))

    def _configured(self, index: Any) -> VectorSearch:
        for parameter, value in (("nprobe", self._settings.nprobe), ("efSearch", self._settings.ef_search)):
            if value is not None:
                set_parameter(index, parameter, value)
        if self._settings.device != "cpu":
            return FaissGpuSearch(index, self._settings.device)
        return FlatSearch(index) if is_flat(index) else FaissSearch(index)

    def _search_identity(self) -> dict[str, Any]:
        config = self._settings
        index = None if self._index_path is None else [self._vectors_identity()]
        if index is not None and self._manifest is not None:
            index.append(self._manifest["index"])
        return {"search": "faiss", "index": index, "nprobe": config.nprobe, "ef_search": config.ef_search}
