"""Networks that lie in shares on the processes of a run, so that none of them holds one whole (FSDP2).

Each decoder layer is a unit, gathered while it computes. Embedding, final norm and head are one more unit: `gathered`
gathers it, and it stays until the backward pass of what was computed or until `release`. So the head can be used chunk
by chunk, forward and backward, in between; and gradients are summed once, in the backward pass of the hidden states.

Gathering is the work of all processes at once: each must make the same forward and backward passes, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from algorithms.learner import ranks

Network = TypeVar("Network", bound=nn.Module)
T = TypeVar("T")


def shard(network: Network) -> Network:
    """Keep this process's share of a network's weights only. All processes hold the same network and call this at once.

    Args:
        network: A causal language model, or a critic with a backbone of its own. Returned, now with `DTensor` weights.
    """
    for layer in _backbone(network).layers:
        _as_unit(layer, reshard_after_forward=True)
    _as_unit(network, reshard_after_forward=False)
    network._compute_gathered = lambda compute: compute()  # type: ignore[assignment]
    register_fsdp_forward_method(network, "_compute_gathered")
    return network


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` was called on a network."""
    return isinstance(network, FSDPModule)


def gathered(network: nn.Module, compute: Callable[[], T]) -> T:
    """Call a function that computes with a network, while its outer unit is gathered.

    Args:
        network: Any network; with one that is not sharded, the function is just called.
        compute: Its result must be a tensor, or hold tensors in tuples, lists or dicts.
    """
    run: Any = network
    return run._compute_gathered(compute) if is_sharded(network) else compute()


def release(*networks: nn.Module | None) -> None:
    """Let go of the outer units that were gathered without a backward pass to come."""
    for network in networks:
        if isinstance(network, FSDPModule):
            network.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor without shares: gathered if it is sharded. All processes call this at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(state: Any) -> Any:
    """Gather the tensors of nested mappings and lists, such as the state of an optimizer, onto the CPU.

    The first process keeps them, since it alone writes; the others, which help, get None for each.
    """
    if isinstance(state, Tensor):
        tensor = whole(state.detach())
        return tensor.cpu() if ranks.is_first() else None
    if isinstance(state, Mapping):
        return {key: whole_state(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole_state(value) for value in state)
    return state


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """This process's share of a whole tensor, sharded as another one of the same shape is."""
    if not isinstance(other, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give a whole network the weights of a sharded one. All processes call this at once."""
    weights = source.state_dict()
    for name, tensor in target.state_dict().items():
        tensor.copy_(whole(weights[name]))


def load_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put whole weights into a network, sharded or not.

    Raises:
        RuntimeError: They do not fit.
    """
    own = network.state_dict()
    network.load_state_dict({name: like(value, own.get(name, value)) for name, value in state.items()})


def _as_unit(module: nn.Module, *, reshard_after_forward: bool) -> None:
    unit = fully_shard(module, reshard_after_forward=reshard_after_forward)
    # Losses are weighted by the tokens of the whole batch already, so gradients are summed; by a plain sum, which gloo
    # has too.
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)


def _backbone(network: Any) -> Any:
    return getattr(network, "backbone", None) or network.base_model
