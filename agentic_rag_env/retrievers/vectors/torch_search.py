"""Blocked matrix products with a running top-k in torch, on CPU or GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentic_rag_env.errors import ConfigurationError, required_library
from agentic_rag_env.retrievers.vectors.ranking import SCORE_DECIMALS, Candidates
from agentic_rag_env.retrievers.vectors.transformer import fixed_device

#: Rows of a block: on a CPU its scores for some hundred queries fit into the cache, on a GPU those for 512 take half a
#: gigabyte.
CPU_BLOCK_ROWS, GPU_BLOCK_ROWS = 2**14, 2**18


class TorchSearch:
    """Exact search as a `VectorSearch`.

    Args:
        vectors: [n, dim], float32 or float16; may be memory-mapped.
        devices: See `DenseConfig.device`.
        dtype: See `DenseConfig.dtype`.

    Raises:
        ConfigurationError: torch is missing, or there is no such device.
    """

    def __init__(self, vectors: NDArray[np.floating], devices: str | None = None, dtype: str | None = None) -> None:
        with required_library("dense backend=torch needs torch: pip install torch; backend=faiss does without."):
            import torch
        self._vectors = vectors
        self.num_rows, self.dim = vectors.shape
        self._dtype = getattr(torch, dtype or str(vectors.dtype))
        names = (devices or ("cuda" if torch.cuda.is_available() else "cpu")).split(",")
        try:
            self._devices = [fixed_device(name.strip()) for name in names]
            self._rounding = 0.0
            size = CPU_BLOCK_ROWS if self._devices[0].type == "cpu" else GPU_BLOCK_ROWS
            self._blocks = [
                (first, self._held(vectors[first : first + size], self._devices[number % len(names)]))
                for number, first in enumerate(range(0, self.num_rows, size))
            ]
        except (RuntimeError, AssertionError) as error:
            raise ConfigurationError(f"dense backend=torch cannot use device={devices!r}: {error}") from error
        self.tolerance = 10.0**-SCORE_DECIMALS + self._rounding

    def _held(self, rows: NDArray[np.floating], device: Any) -> Any:
        """Put a block into the form that is searched; add up what its rounding may change."""
        import torch

        whole = torch.from_numpy(rows) if rows.flags.writeable else _from_read_only(rows)
        held = whole.to(device, self._dtype)
        half_queries = device.type == "cuda" and self._dtype != torch.float32
        if held.dtype != whole.dtype or half_queries:
            exact = whole.to(device, torch.float32)
            lost = (exact - held.float()).norm(dim=1).max().item()
            # By Cauchy-Schwarz, for queries of length 1; their own rounding is at most half a unit in the last place.
            query_lost = torch.finfo(self._dtype).eps / 2 * exact.norm(dim=1).max().item() if half_queries else 0.0
            self._rounding = max(self._rounding, lost + query_lost)
        return held

    def propose(self, queries: NDArray[np.float32], count: int) -> Candidates:
        """See `VectorSearch`."""
        import torch

        with torch.inference_mode():
            asked = torch.from_numpy(np.ascontiguousarray(queries))
            best_scores = torch.empty(len(queries), 0, device=self._devices[0])
            best_rows = torch.empty(len(queries), 0, dtype=torch.long, device=self._devices[0])
            for first, scores in self._scores(asked):
                top = scores.topk(min(count, scores.shape[1]), dim=1)
                best_scores = torch.cat([best_scores, top.values.to(self._devices[0])], dim=1)
                best_rows = torch.cat([best_rows, top.indices.to(self._devices[0]) + first], dim=1)
                kept = best_scores.topk(min(count, best_scores.shape[1]), dim=1)
                best_scores, best_rows = kept.values, best_rows.gather(1, kept.indices)
            rows = best_rows.cpu().numpy()
            return Candidates(best_scores.cpu().numpy(), rows, self._vectors[rows].astype(np.float32, copy=False))

    def _scores(self, queries: Any) -> Iterator[tuple[int, Any]]:
        """The first row and the scores [n, rows], float32, of each block."""
        import torch

        for first, block in self._blocks:
            if block.device.type == "cuda" and block.dtype != torch.float32:
                asked = queries.to(block.device, block.dtype)
                yield first, torch.mm(asked, block.T, out_dtype=torch.float32)
            else:
                yield first, queries.to(block.device) @ block.float().T


def _from_read_only(rows: NDArray[np.floating]) -> Any:
    """A tensor that shares memory with an array which nobody writes to, as torch would otherwise warn about."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(rows)
