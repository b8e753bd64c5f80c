"""Which kernel attention runs in: PyTorch chooses one by device, dtype, mask and shape, and does not say so."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from algorithms.learner.networks import backbone_hidden
from algorithms.learner.precision import autocast
from algorithms.rollout.kv_cache import EpisodeCache, check_cache

_FUSED = re.compile("aten::_scaled_dot_product_(.+?)_attention")  # ..._flash_attention, ..._flash_attention_for_cpu


def attention_kernels(model: PreTrainedModel, precision: str) -> dict[str, str]:
    """Find the kernels by computing a few tokens in each of the ways in which a run computes.

    Args:
        model: A causal language model, whole, on its device.
        precision: See `precision.autocast`.

    Returns:
        The kernel of "training", "prefill" and "decode": "flash", "efficient", "cudnn"; "math" for plain products and
        a softmax, whose scores take memory; or the attention that the model was loaded with, if it is not "sdpa".

    Raises:
        ConfigurationError: The family can't be computed token by token, see `check_cache`.
    """
    check_cache(model)
    input_ids = torch.zeros(2, 4, dtype=torch.long, device=model.device)
    positions = torch.arange(4, device=model.device).expand(2, -1)
    backbone, cache, found = model.base_model, EpisodeCache(2), {}
    with autocast(model.device, precision):
        with _Seen() as training:
            backbone_hidden(model, input_ids, None)
        with torch.no_grad(), _Seen() as prefill:
            cache.forward(backbone, input_ids[:, :3], positions[:, :3], length=3)
        with torch.no_grad(), _Seen() as decode:
            cache.forward(backbone, input_ids[:, 3:], positions[:, 3:], length=4)
    implementation = model.config._attn_implementation
    unfused = "math" if implementation == "sdpa" else implementation
    for phase, seen in (("training", training), ("prefill", prefill), ("decode", decode)):
        found[phase] = " and ".join(sorted(seen.kernels)) or unfused
    return found


def in_words(kernels: dict[str, str]) -> str:
    """Say in a few words which kernels these are."""
    if len(set(kernels.values())) == 1:
        return f"attention by {kernels['decode']}"
    return "attention by " + ", ".join(f"{kernel} in {phase}" for phase, kernel in kernels.items())


class _Seen(TorchDispatchMode):
    """Notes the fused kernels of attention that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kernel := _FUSED.match(func._schema.name):
            self.kernels.add(kernel[1])
        return func(*args, **(kwargs or {}))
