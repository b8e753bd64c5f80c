"""Gradient checkpointing: one activation per layer is kept, and the others are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def enable(network: nn.Module) -> None:
    """Let the layers of a network recompute their activations, wherever `active` holds."""
    for module in network.modules():
        if isinstance(module, PreTrainedModel):
            # The second name is that of transformers before 5.20 or so.
            enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            for layer in _layers(module):
                layer._gradient_checkpointing_func = partial(_without_dropout, layer)
            return


def _layers(network: nn.Module) -> list[Any]:
    """The layers that can recompute their activations."""
    return [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]


def _without_dropout(layer: nn.Module, forward: Callable[..., Any], *inputs: Any) -> Any:
    """Checkpoint a layer's forward, and put the layer itself in evaluation mode whenever it computes."""

    def compute(*inputs: Any) -> Any:
        before, layer.training = layer.training, False
        try:
            return forward(*inputs)
        finally:
            layer.training = before

    return checkpoint(compute, *inputs, use_reentrant=False)


@contextmanager
def active(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Put only the layers themselves in training mode: they recompute only then. Dropout stays off."""
    layers = [layer for network in networks for layer in _layers(network)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
