"""Gradient checkpointing: one activation per layer is kept, and the others are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def enable(network: nn.Module) -> None:
    """Let the layers of a network recompute their activations, wherever `active` holds."""
    for module in network.modules():
        if isinstance(module, PreTrainedModel):
            # The second name is that of transformers before 5.20 or so.
            enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            return


@contextmanager
def active(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Put only the layers themselves in training mode: they recompute only then, and dropout inside them stays off."""
    layers = [m for network in networks for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
