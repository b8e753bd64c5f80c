"""The weights that rollouts read under bfloat16: cast once for each update, not anew in every decode step.

Autocast casts the matrices of linear layers before each product. It remembers the casts only of weights that are being
trained, and never under `torch.inference_mode`. A decode step has few rows, so that casting takes longer than the
products themselves.
"""

from __future__ import annotations

import copy
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class Bfloat16Copy:
    """A network whose linear layers are in bfloat16, and which shares everything else with the original.

    Norms, embeddings and buffers are the original's own tensors. Under autocast the copy computes what the original
    computes, bit for bit, because autocast would have cast the same weights. It takes half the memory of the linear
    layers. Adapters in the place of linear layers are made of linear layers, and are cast like them.

    Use `bfloat16_copy`, by which all who read one network share one copy.

    Args:
        original: The network. What is float32 in its linear layers is cast.

    Attributes:
        original: The network.
        model: The copy, in evaluation mode and without gradients.
    """

    def __init__(self, original: PreTrainedModel) -> None:
        self.original = original
        shared = {id(tensor): tensor for tensor in (*original.parameters(), *original.buffers())}
        self.model: PreTrainedModel = copy.deepcopy(original, memo=shared)
        for linear in _linear_layers(self.model):
            for name, tensor in _cast_by_autocast(linear):
                # A parameter of its own: a head may be tied to the embedding, which stays as it is.
                setattr(linear, name, nn.Parameter(tensor.detach().bfloat16(), requires_grad=False))
        module: Any
        for module in self.model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False  # nothing is kept for a backward pass
        self.model.eval()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the original's weights as they are now, in place."""
        for source, target in zip(_linear_layers(self.original), _linear_layers(self.model), strict=True):
            for name, tensor in _cast_by_autocast(source):
                getattr(target, name).copy_(tensor)


#: The copies in use, by the id of the original. A copy holds its original, so the id belongs to nothing else meanwhile.
_in_use: WeakValueDictionary[int, Bfloat16Copy] = WeakValueDictionary()


def bfloat16_copy(original: PreTrainedModel) -> Bfloat16Copy:
    """Get the copy of a network with its present weights: the one that somebody holds already, refreshed, or a new one.

    Args:
        original: The network; its layers must stay the same objects while the copy is in use.
    """
    found = _in_use.get(id(original))
    if found is None:
        _in_use[id(original)] = found = Bfloat16Copy(original)
    else:
        found.refresh()
    return found


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def _cast_by_autocast(linear: nn.Linear) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in linear.named_parameters(recurse=False) if tensor.dtype == torch.float32]
