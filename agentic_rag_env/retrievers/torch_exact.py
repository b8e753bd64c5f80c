"""Exact dense search by blocked matrix products in torch, on CPU or GPUs, where FAISS does not fit or is slower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agentic_rag_env.errors import ConfigurationError, DataError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.vectors.encoders import DTYPES
from agentic_rag_env.retrievers.vectors.faiss_search import is_flat, read_index, vectors_of_flat
from agentic_rag_env.retrievers.vectors.ranking import VectorSearch
from agentic_rag_env.retrievers.vectors.retriever import VECTORS_FILE, EmbeddingConfig, EmbeddingRetriever
from agentic_rag_env.retrievers.vectors.torch_search import TorchSearch
from agentic_rag_env.types import Passage


@dataclass
class TorchExactConfig(EmbeddingConfig):
    """Settings of exact search; see also `EmbeddingConfig`.

    Attributes:
        device: Such as `cpu`, `cuda`, or `cuda:0,cuda:1` to hold a share on each; None: a GPU if there is one.
        dtype: Precision in which the vectors are held and candidates are found, `float32`, `float16` or `bfloat16`;
            None: that of the vectors on disk, float32 for those in memory. Results do not depend on it, since
            candidates are scored again by the vectors themselves: it decides memory and speed.
    """

    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise ConfigurationError(f"torch_exact dtype must be {', '.join(DTYPES)} or None, got {self.dtype!r}.")


@RETRIEVERS.register("torch_exact", TorchExactConfig)
class TorchExactRetriever(EmbeddingRetriever):
    """Searches all embeddings by matrix products, with the ids and the order of a flat FAISS index.

    On the CPU, vectors on disk stay there, memory-mapped, unless another `dtype` is asked for; a GPU holds all of them.

    Args:
        config: Encoder, index, device and precision.
        corpus: The passages; their order decides ties. None: those of the index folder.

    Raises:
        ConfigurationError: As for `EmbeddingRetriever`; or torch is missing, or there is no such device.
        DataError: As for `EmbeddingRetriever`; or the index keeps no vectors.
    """

    def __init__(self, config: TorchExactConfig, corpus: Sequence[Passage] | None = None) -> None:
        self._settings = config
        super().__init__("torch_exact", config, corpus)

    def _open_vectors(self, vectors: NDArray[np.floating]) -> VectorSearch:
        return TorchSearch(vectors, self._settings.device, self._settings.dtype)

    def _from_disk(self, path: Path) -> VectorSearch:
        return self._open_vectors(open_vectors(path / VECTORS_FILE) if path.is_dir() else _flat_vectors(path))


def open_vectors(file: Path) -> NDArray[np.floating]:
    """The vectors of an index folder, memory-mapped.

    Raises:
        DataError: They are missing or damaged.
    """
    try:
        return np.load(file, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: the vectors cannot be read ({error}); build the index again.") from error


def _flat_vectors(file: Path) -> NDArray[np.floating]:
    """The vectors of a flat FAISS file, memory-mapped."""
    index = read_index(file)
    if not is_flat(index):
        raise DataError(f"{file}: torch_exact needs the vectors of a flat index, got {type(index).__name__}.")
    return vectors_of_flat(index)
