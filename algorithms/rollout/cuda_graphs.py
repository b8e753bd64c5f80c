"""CUDA graphs of decode steps, and whether a run uses them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentic_rag_env.errors import ConfigurationError
from algorithms.rollout.cached_engine import CachedEngine
from algorithms.rollout.config import RolloutConfig
from algorithms.rollout.recorded_steps import Recorder, unrecorded

#: Rows and greedy tokens of each that are compared at the start.
_ROWS, _TOKENS = 4, 32


class CudaGraphs:
    """Records CUDA graphs, which share their memory. See `Recorder`."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See `Recorder`. The computation may neither make the host wait nor take anything from it."""
        compute()  # libraries make their workspaces in a first call, which can't be recorded
        graph = torch.cuda.CUDAGraph()
        usual = torch.cuda.current_stream()
        try:
            # Another thread may search on the same GPU meanwhile, which is no part of the recording, nor harmed by it.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = compute()
        except RuntimeError:
            torch.cuda.set_stream(usual)  # where a recording fails, torch leaves the thread on the stream of recordings
            raise

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def decided_recorder(
    setting: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: str
) -> tuple[Callable[[], Recorder] | None, str]:
    """Find out whether a model's decode steps are replayed as CUDA graphs.

    Args:
        setting: `RolloutConfig.cuda_graphs`.
        model: The model on its device, whole.
        tokenizer: Its tokenizer.
        precision: See `precision.autocast`.

    Returns:
        What `CachedEngine` takes as `recorder`, and the reason, for people.

    Raises:
        ConfigurationError: They are asked for, and the model is not on a GPU.
    """
    if setting == "off":
        return None, "rollout.cuda_graphs=off"
    if model.device.type != "cuda":
        if setting == "on":
            raise ConfigurationError("rollout.cuda_graphs=on needs a GPU, and there is none; set auto or off.")
        return None, "auto: there is no GPU"
    if setting == "on":
        return CudaGraphs, "rollout.cuda_graphs=on"
    trouble = _trouble(model, tokenizer, precision)
    if trouble is None:
        return CudaGraphs, "auto: greedy tokens are the same"
    return None, f"auto: {trouble}"


def _trouble(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: str) -> str | None:
    """What goes wrong with graphs, compared with the same computation at the same shapes without them."""
    expected = _written(model, tokenizer, precision, lambda: unrecorded)
    try:
        found = _written(model, tokenizer, precision, CudaGraphs)
    except RuntimeError as error:
        return f"recording fails ({type(error).__name__}: {str(error).splitlines()[0]})"
    differing = sum(ids != found[row] for row, ids in expected.items())
    return f"greedy tokens differ in {differing} of {_ROWS} rows" if differing else None


def _written(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: str, recorder: Callable[[], Recorder]
) -> dict[int, list[int]]:
    config = RolloutConfig(temperature=0.0, max_new_tokens=_TOKENS, max_tokens=_TOKENS + 2 * _ROWS)
    engine = CachedEngine(
        model, tokenizer, config, num_rows=_ROWS, action_ends=[], precision=precision, recorder=recorder
    )
    for row in range(_ROWS):
        engine.open(row, np.arange(_ROWS + row))
    written: dict[int, list[int]] = {}
    while actions := engine.write():
        written |= {action.row: action.ids.tolist() for action in actions}
        engine.close(written)
    return written
