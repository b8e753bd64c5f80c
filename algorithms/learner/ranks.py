"""The processes that carry out one run together. This module alone knows the process group.

Every process knows the whole batch, and shares are of the work only: episodes to play, rows to score, gradients. So
hooks, schedules, minibatches and figures are those of one process, up to the order of sums. With one process every
function here does nothing.

The first process alone reads and writes files of the run. What it has decided or read, `decided` tells the others.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from agentic_rag_env.errors import ConfigurationError
from algorithms.learner.lifeline import PATIENCE, Lifeline

T = TypeVar("T")

#: Entries of gradients that are summed at once, 64 MB of float32.
_BUCKET = 2**24


class _Together:
    """The group of this process, once it has joined one."""

    objects: Any = None
    lifeline: Lifeline | None = None
    alone = 0


def join() -> None:
    """Join the processes that `torchrun` has started beside this one, if there are any. A second call does nothing.

    Raises:
        ConfigurationError: Two of them share a GPU.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    use_device()
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    _Together.objects = dist.new_group(backend="gloo", timeout=PATIENCE)
    _Together.lifeline = Lifeline(dist.get_rank(), dist.get_world_size())
    if torch.cuda.is_available():
        own = platform.node(), str(torch.cuda.get_device_properties(device()).uuid)
        require_own_gpus(gathered(own))


def require_own_gpus(found: Sequence[tuple[str, str]]) -> None:
    """Refuse processes that share a GPU, at which NCCL would fail later.

    Args:
        found: The machine and the GPU of every process.

    Raises:
        ConfigurationError: A GPU occurs twice.
    """
    for machine in dict(found):
        gpus = [gpu for place, gpu in found if place == machine]
        if len(set(gpus)) < len(gpus):
            raise ConfigurationError(
                f"{len(gpus)} processes on {machine} have {len(set(gpus))} GPUs, and each needs its own; start "
                f"torchrun with --nproc-per-node {len(set(gpus))}."
            )


def leave() -> None:
    """Leave the other processes when all have done their work. A process that has not joined does nothing."""
    if _Together.lifeline is not None:
        wait()
        _Together.lifeline.cut()
        dist.destroy_process_group()
        _Together.objects = _Together.lifeline = None


def fail() -> None:
    """End this process quietly if another one tells what went wrong; return if it is this one's task to tell."""
    if _Together.lifeline is not None:
        _Together.lifeline.fail()


def device() -> torch.device:
    """Where this process computes: a GPU of its own on its machine if there are GPUs, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if "LOCAL_RANK" not in os.environ:
        return torch.device("cuda")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def use_device() -> None:
    """Let this thread compute on the GPU of this process; a new thread begins on the first GPU."""
    if (place := device()).index is not None:
        torch.cuda.set_device(place)


def count() -> int:
    """Number of processes that work together."""
    return dist.get_world_size() if _Together.objects is not None and not _Together.alone else 1


def rank() -> int:
    """Number of this process among them, from 0."""
    return dist.get_rank() if _Together.objects is not None and not _Together.alone else 0


def is_first() -> bool:
    """Whether this process writes the files of the run and prints."""
    return _Together.objects is None or dist.get_rank() == 0


# --- shares of the work ----------------------------------------------------------------------------------------------


def share(items: Sequence[T]) -> Sequence[T]:
    """The items that this process works on: every `count()`-th one."""
    return items[rank() :: count()]


def in_order(own: Sequence[T]) -> list[T]:
    """Gather what every process has made of its `share`, in the order of one process."""
    parts = gathered(list(own))
    return [parts[number % len(parts)][number // len(parts)] for number in range(sum(map(len, parts)))]


def gathered(own: T) -> list[T]:
    """What every process has, in the order of the processes."""
    if count() == 1:
        return [own]
    found: list[Any] = [None] * count()
    _collective(dist.all_gather_object, found, own, group=_Together.objects)
    return found


def summed(tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes, in place."""
    if count() > 1:
        _collective(dist.all_reduce, tensor)
    return tensor


def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum gradients over the processes. A parameter that has one in any process has one in all of them afterwards."""
    if count() == 1 or not parameters:
        return
    has_gradient = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
    summed(has_gradient)
    bucket: list[nn.Parameter] = []
    for parameter, has in zip(parameters, has_gradient.tolist(), strict=True):
        if has:
            bucket.append(parameter)
        if sum(each.numel() for each in bucket) >= _BUCKET:
            _sum_bucket(bucket)
            bucket = []
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = summed(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


# --- the first process decides ---------------------------------------------------------------------------------------


def decided(make: Callable[[], T]) -> T:
    """Let the first process call a function, alone, and give every process what it returned.

    Args:
        make: Called in the first process only. In it, the functions of this module are those of one process.
    """
    if count() == 1:
        return make()
    return _told(_alone(make) if rank() == 0 else None)


def led(work: Callable[[], T], answer: Callable[[Any], Any]) -> T:
    """Let the first process work, and the others help where its work asks them to.

    Args:
        work: Called in the first process only. It may call `ask` with plain data.
        answer: Called with these data in every process at once; what it returns in the first one is what `ask` returns.

    Returns:
        What `work` returned, in every process.
    """
    if count() == 1:
        return work()
    if rank() == 0:
        result = work()
        _told((False, result))
        return result
    while True:
        asks, told = _told(None)
        if not asks:
            return told
        answer(told)


def ask(question: Any) -> None:
    """Call the others to what `led` has given them to answer. The caller answers the same question itself."""
    if count() > 1:
        _told((True, question))


def wait() -> None:
    """Wait until every process has come here."""
    gathered(None)


def _alone(make: Callable[[], T]) -> T:
    _Together.alone += 1
    try:
        return make()
    finally:
        _Together.alone -= 1


def _told(value: Any) -> Any:
    """What the first process tells all."""
    told = [value]
    _collective(dist.broadcast_object_list, told, src=0, group=_Together.objects)
    return told[0]


def _collective(call: Callable[..., Any], *args: Any, **settings: Any) -> None:
    try:
        call(*args, **settings)
    except RuntimeError:
        # Another process has gone, or it is about to say why it goes.
        assert _Together.lifeline is not None
        _Together.lifeline.lost()
        raise
