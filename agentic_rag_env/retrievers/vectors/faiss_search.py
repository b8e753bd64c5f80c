"""Opens FAISS indexes and makes them searches over vectors, on the CPU or GPUs."""

from __future__ import annotations

from functools import cached_property
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentic_rag_env.errors import ConfigurationError, DataError
from agentic_rag_env.retrievers.vectors.ranking import SCORE_DECIMALS, Candidates
from agentic_rag_env.retrievers.vectors.torch_search import TorchSearch

#: Most rows that FAISS on a GPU returns for a query.
_MAX_GPU_CANDIDATES = 2048
_WHEELS = ("faiss-cpu", "faiss-gpu-cu12")
_WITHOUT = "backend=torch and retriever=bm25 do without it."


def _how_to_install() -> str:
    # The two wheels share a folder, so one breaks the other. The installed one must be removed first.
    installed = [each.name for each in distributions() if each.name in _WHEELS]
    first = f"Run `pip uninstall {' '.join(sorted(installed))}`, then" if installed else "Run"
    return f"{first} pip install 'agentic-rag-env[faiss]' or, for GPUs, 'agentic-rag-env[faiss-gpu]', never both."


def faiss_search(
    index: Any, *, device: str | None = None, nprobe: int | None = None, ef_search: int | None = None
) -> FaissSearch | FaissGpuSearch:
    """A FAISS index as a `VectorSearch`.

    Args:
        index: An index of inner products on the CPU.
        device: See `DenseConfig`.
        nprobe: See `DenseConfig`.
        ef_search: See `DenseConfig`.

    Raises:
        ConfigurationError: The index has no such parameter, or it cannot be searched on the device.
    """
    for parameter, value in (("nprobe", nprobe), ("efSearch", ef_search)):
        if value is not None:
            set_parameter(index, parameter, value)
    if device not in (None, "cpu"):
        return FaissGpuSearch(index, device)
    return FlatSearch(index) if is_flat(index) else FaissSearch(index)


class FaissSearch:
    """A FAISS index on the CPU as a `VectorSearch`."""

    tolerance = 10.0**-SCORE_DECIMALS

    def __init__(self, index: Any) -> None:
        self._index = index
        self.num_rows, self.dim = int(index.ntotal), int(index.d)

    def propose(self, queries: NDArray[np.float32], count: int) -> Candidates:
        """See `VectorSearch`."""
        return Candidates(*self._index.search_and_reconstruct(np.ascontiguousarray(queries), count))


class FlatSearch(FaissSearch):
    """A flat FAISS index on the CPU: FAISS searches for few queries, torch for many where it is installed.

    For many queries FAISS takes two to five times as long (`benchmarks/test_retrieval.py`). Both rank the same.
    """

    #: Number of queries from which on matrix products are faster.
    MANY = 12

    def propose(self, queries: NDArray[np.float32], count: int) -> Candidates:
        """See `VectorSearch`."""
        products = self._products if len(queries) >= self.MANY else None
        return super().propose(queries, count) if products is None else products.propose(queries, count)

    def prepare(self) -> None:
        """Load torch now, which takes seconds, and not during the first search for many queries."""
        _ = self._products

    @cached_property
    def _products(self) -> TorchSearch | None:
        return TorchSearch(vectors_of_flat(self._index), "cpu") if find_spec("torch") else None


class FaissGpuSearch:
    """A copy of a FAISS index on GPUs as a `VectorSearch`; the vectors are taken from the one on the CPU.

    Args:
        index: The index on the CPU.
        devices: `cuda`, or GPUs by number: `cuda:0,cuda:1`.

    Raises:
        ConfigurationError: This FAISS cannot use GPUs, or there are no such GPUs.
    """

    #: Twice the rounding of float16, for vectors of length 1.
    tolerance = 2.0**-10

    def __init__(self, index: Any, devices: str) -> None:
        import faiss

        if not faiss_has_gpus():
            raise ConfigurationError(
                f"dense device={devices!r} needs a GPU and a FAISS built for it; backend=torch searches on a GPU "
                f"without FAISS. {_how_to_install()}"
            )
        options = faiss.GpuMultipleClonerOptions()
        options.shard = True
        options.useFloat16 = True
        try:
            numbers = None if devices == "cuda" else [int(name.removeprefix("cuda:")) for name in devices.split(",")]
            self._on_gpus = faiss.index_cpu_to_gpus_list(index, co=options, gpus=numbers)
            if hasattr(index, "make_direct_map"):
                index.make_direct_map()
        except (RuntimeError, ValueError) as error:
            raise ConfigurationError(f"dense device={devices!r} cannot hold this index: {error}") from error
        self._index = index
        self.num_rows, self.dim = int(index.ntotal), int(index.d)

    def propose(self, queries: NDArray[np.float32], count: int) -> Candidates:
        """See `VectorSearch`."""
        scores, rows = self._on_gpus.search(np.ascontiguousarray(queries), min(count, _MAX_GPU_CANDIDATES))
        vectors = self._index.reconstruct_batch(np.maximum(rows, 0).ravel()).reshape(*rows.shape, self.dim)
        return Candidates(scores, rows, vectors)


def import_faiss(user: str) -> Any:
    """Import the library FAISS.

    Raises:
        ConfigurationError: FAISS is missing, or only remains of it are left.
    """
    try:
        import faiss
    except ImportError as error:
        raise ConfigurationError(f"{user!r} needs the library faiss. {_how_to_install()} {_WITHOUT}") from error
    if not hasattr(faiss, "IndexFlatIP"):  # a folder without its files, which Python imports as a namespace
        raise ConfigurationError(f"{user!r} needs the library faiss, which is damaged. {_how_to_install()} {_WITHOUT}")
    return faiss


def faiss_has_gpus() -> bool:
    """Whether FAISS is installed, was built for GPUs and finds one."""
    if find_spec("faiss") is None:
        return False
    import faiss

    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def flat_index(vectors: NDArray[np.floating]) -> Any:
    """A FAISS index that holds vectors [n, dim] as they are.

    Raises:
        ConfigurationError: The library is missing.
    """
    index = import_faiss("dense").IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def read_index(file: Path) -> Any:
    """A FAISS index from a file, memory-mapped.

    Raises:
        ConfigurationError: The library is missing.
        DataError: The file is no FAISS index of inner products.
    """
    faiss = import_faiss("dense")
    try:
        index = faiss.read_index(str(file), getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP))
    except RuntimeError as error:
        raise DataError(f"{file}: is no FAISS index, or a damaged one: {error}") from error
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise DataError(f"{file}: does not search by inner products; build it with METRIC_INNER_PRODUCT.")
    return index


def is_flat(index: Any) -> bool:
    """Whether a FAISS index holds the vectors themselves, one after the other."""
    import faiss

    return isinstance(index, faiss.IndexFlat)


def vectors_of_flat(index: Any) -> NDArray[np.float32]:
    """The vectors [n, dim] of a flat FAISS index, not copied."""
    import faiss

    vectors = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
    # A view of what the index holds, which must live as long; only a subclass of the array takes an attribute.
    owner: Any = vectors.view(_OwningArray)
    owner.index = index
    return owner


class _OwningArray(np.ndarray):
    """An array that keeps alive what its memory belongs to."""

    index: Any


def set_parameter(index: Any, name: str, value: int) -> None:
    """Set how a FAISS index is searched, `nprobe` or `efSearch`.

    Raises:
        ConfigurationError: The index has no such parameter.
    """
    import faiss

    try:
        faiss.ParameterSpace().set_index_parameter(index, name, value)
    except RuntimeError as error:
        raise ConfigurationError(
            f"{name}={value} was given, but an index of type {type(index).__name__} has no such parameter; leave it."
        ) from error
