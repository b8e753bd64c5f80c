"""A GPU that this machine does not have: tensors compute on the CPU, but say that they lie on one, and act like it.

The numbers are real, so whole runs work. What a GPU would refuse is refused: operations on tensors of two devices, and
`numpy` of a tensor on the GPU. What would make the host wait for it, and what it would launch, is counted. A copy to
pinned memory of the host for which nobody waits arrives when the host waits next; before, other numbers are there. It
knows nothing of kernels that only CUDA has, of memory and of speed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
_MARK, _PINNED = "lies_on_the_pretended_gpu", "is_pinned_for_the_pretended_gpu"
#: These make new tensors, on the device that they are told.
_MAKERS = (
    "arange asarray as_tensor empty empty_like eye full full_like linspace ones ones_like rand rand_like randint "
    "randn randn_like randperm tensor zeros zeros_like"
).split()
#: These take tensors of any device: to copy between devices is their purpose.
_COPIES = {"aten::copy_", "aten::_to_copy", "aten::set_"}
_TAKE_INDICES_OF_THE_HOST = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
#: The host must know their result, or its shape, before it can go on.
_READS = {
    "aten::_local_scalar_dense": "item",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::equal": "equal",
    "aten::bincount": "bincount",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
    "aten::unique_consecutive": "unique",
}


class PretendedGpu:
    """What happened on it.

    Attributes:
        launches: Launched operations by name; views launch nothing.
        waits: Moments at which the host waited for the device, by name: something was read, or copied there in a way
            that blocks.
        places: The same by file and line of our code.
        tape: What the CUDA graph that is being recorded consists of; None: nothing is recorded.
        arriving: Copies to the host that have not arrived, and what they copy.
        stream: "usual", or "recordings" while a CUDA graph is recorded.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self.tape: list[tuple[Any, ...]] | None = None
        self.arriving: list[tuple[Tensor, Tensor]] = []
        self.stream = "usual"

    def reset(self) -> None:
        """Count from zero."""
        for counter in (self.launches, self.waits, self.places):
            counter.clear()

    def launched(self, name: str) -> None:
        """Count a launch, unless it is only recorded."""
        if self.tape is None:
            self.launches[name] += 1

    def waited(self, why: str) -> None:
        """Count a wait, which nothing that is recorded may need."""
        if self.tape is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({why})")
        self.waits[why] += 1
        arriving, self.arriving = self.arriving, []
        for copy, sent in arriving:
            copy.copy_(sent)
        frame = sys._getframe(1)
        while frame.f_back is not None:
            file = frame.f_code.co_filename
            if "/tests/" not in file and ("/algorithms/" in file or "/agentic_rag_env/" in file):
                self.places[f"{file.rpartition('/')[2]}:{frame.f_lineno} {why}"] += 1
                return
            frame = frame.f_back


def lies_on_it(tensor: Any) -> bool:
    """Whether a tensor lies on the pretended GPU."""
    return (
        isinstance(tensor, Tensor) and _true_device(tensor).type == "cpu" and hasattr(tensor.untyped_storage(), _MARK)
    )


_true_device = torch.Tensor.device.__get__  # type: ignore[attr-defined]


def _marked(tensor: Tensor) -> Tensor:
    if _true_device(tensor).type == "cpu":
        setattr(tensor.untyped_storage(), _MARK, True)
    return tensor


def _pinned(tensor: Tensor) -> Tensor:
    setattr(tensor.untyped_storage(), _PINNED, True)
    return tensor


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _graph_class(gpu: PretendedGpu) -> type:
    class CUDAGraph:
        """Replays operations as they were recorded: on the same tensors, and without any line of Python from then."""

        def __init__(self) -> None:
            self.tape: list[tuple[Any, ...]] = []

        def replay(self) -> None:
            gpu.launched("CUDA graph")
            with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
                for func, args, kwargs, result in self.tape:
                    again = func(*args, **kwargs)
                    for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                            old.copy_(new)

    return CUDAGraph


class _Event:
    """The host can wait for what was begun before it; here it then waits for everything."""

    def __init__(self, gpu: PretendedGpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        """Done by `synchronize`."""

    def synchronize(self) -> None:
        self.gpu.waited("event")


@contextlib.contextmanager
def _recording(gpu: PretendedGpu, graph: Any, pool: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
    gpu.tape, gpu.stream = graph.tape, "recordings"
    try:
        yield
        gpu.stream = "usual"  # like torch, which stays on the stream of recordings if one fails
    finally:
        gpu.tape = None


class _Operations(TorchDispatchMode):
    """Sees every operation that reaches a backend, also those of a backward pass."""

    def __init__(self, gpu: PretendedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self._carry_out(func, args, kwargs or {})
        if self.gpu.tape is not None:
            self.gpu.tape.append((func, args, kwargs or {}, result))
        return result

    def _carry_out(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [lies_on_it(tensor) for tensor in tensors]
        if not any(there):
            return func(*args, **kwargs)
        if name in _COPIES:
            return self._copy(func, name, args, kwargs)
        self._refuse_a_mixture(name, tensors, there)
        if name in _READS:
            self.gpu.waited(_READS[name])
        elif name.startswith("aten::index") and _has_mask(args[1:]):
            self.gpu.waited("mask as an index")
        elif name == "aten::repeat_interleave":
            self.gpu.waited("repeat_interleave")
        if not func.is_view and name != "aten::_unsafe_view":
            self.gpu.launched(name)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                _marked(leaf)
        return result

    def _copy(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        self.gpu.launched(name)
        if name == "aten::copy_" and lies_on_it(args[0]) != lies_on_it(args[1]):
            on_host = args[1] if lies_on_it(args[0]) else args[0]
            is_async = args[2:] == (True,) or kwargs.get("non_blocking")
            if not is_async or self.gpu.tape is not None or not hasattr(on_host.untyped_storage(), _PINNED):
                self.gpu.waited("copy_")
            elif on_host is args[0]:
                with _disable_current_modes():
                    self.gpu.arriving.append((on_host, args[1].clone()))
                    return on_host.fill_(-77)
        result = func(*args, **kwargs)
        return _marked(result) if lies_on_it(args[0]) else result

    def _refuse_a_mixture(self, name: str, tensors: list[Tensor], there: list[bool]) -> None:
        strangers = [tensor for tensor, is_there in zip(tensors, there, strict=True) if not is_there and tensor.dim()]
        if strangers and there[0] and name in _TAKE_INDICES_OF_THE_HOST:
            strangers = [tensor for tensor in strangers if tensor.dtype not in (torch.int64, torch.bool)]
            self.gpu.waited("index from the host")
        if strangers:
            shapes = [tuple(tensor.shape) for tensor in strangers]
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} got {shapes} of the CPU.")


def _has_mask(arguments: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(arguments[:1]))


def _patches(gpu: PretendedGpu) -> Iterator[Any]:
    """Everything that is replaced while the GPU is there."""
    true = {name: getattr(Tensor, name) for name in ("to", "cpu", "tolist", "numpy", "__array__", "__deepcopy__")}

    def up(tensor: Tensor, blocks: bool = True) -> Tensor:
        gpu.launched("copy to the GPU")
        if blocks or not hasattr(tensor.untyped_storage(), _PINNED) or gpu.tape is not None:
            gpu.waited("copy to the GPU")
        return _marked(tensor.clone())

    def down(tensor: Tensor) -> Tensor:
        gpu.waited("copy to the host")
        copy = tensor.clone()
        delattr(copy.untyped_storage(), _MARK)
        return copy

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        moved = self
        if device is not None and _is_cuda(device) != lies_on_it(self):
            moved = up(self, blocks=not non_blocking) if _is_cuda(device) else down(self)
        settings = {"memory_format": memory_format} if memory_format is not None else {}
        return true["to"](moved, dtype=dtype or moved.dtype, copy=copy and moved is self, **settings)

    def reading(name: str) -> Any:
        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if lies_on_it(self):
                if name != "tolist":
                    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
                gpu.waited("tolist")
            return true[name](self, *args, **kwargs)

        return read

    def new_tensor(self: Tensor, data: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": self.device, **kwargs})

    def deepcopied(self: Tensor, memo: dict[int, Any]) -> Tensor:
        copy = true["__deepcopy__"](self, memo)
        return _marked(copy) if lies_on_it(self) else copy

    methods: dict[str, Any] = {
        "device": property(lambda self: CUDA if lies_on_it(self) else _true_device(self)),
        "is_cuda": property(lies_on_it),
        "to": to,
        "cpu": lambda self: self.to("cpu"),
        "cuda": lambda self, *args, **kwargs: self.to("cuda"),
        "new_tensor": new_tensor,
        "pin_memory": lambda self: _pinned(self.clone()),
        "__deepcopy__": deepcopied,
        **{name: reading(name) for name in ("tolist", "numpy", "__array__")},
    }
    for name, method in methods.items():
        yield patch.object(Tensor, name, method)
    for name in _MAKERS:
        yield patch.object(torch, name, _maker(getattr(torch, name), up))
    # In inference mode torch would show composite operations whole, and hide what they launch.
    yield patch.object(torch, "inference_mode", torch.no_grad)
    yield patch.object(torch._C, "_group_tensors_by_device_and_dtype", _grouped)
    yield patch.object(torch.amp.autocast_mode.autocast, "__init__", _autocast_on_the_cpu)
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "pretended"}
    yield patch.object(torch.cuda, "current_stream", lambda: gpu.stream)
    yield patch.object(torch.cuda, "set_stream", functools.partial(setattr, gpu, "stream"))
    for name, answer in {**answers, "empty_cache": None, "synchronize": None}.items():
        yield patch.object(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    yield patch.object(torch.cuda, "CUDAGraph", _graph_class(gpu))
    yield patch.object(torch.cuda, "Event", functools.partial(_Event, gpu))
    yield patch.object(torch.cuda, "graph", functools.partial(_recording, gpu))
    yield patch.object(torch.cuda, "graph_pool_handle", object)


def _maker(make: Any, up: Any) -> Any:
    """A factory of tensors that also makes them on the pretended GPU."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Tensor:
        device, is_pinned = kwargs.get("device"), kwargs.pop("pin_memory", False)
        if not _is_cuda(device):
            return _pinned(make(*args, **kwargs)) if is_pinned else make(*args, **kwargs)
        kwargs["device"] = "cpu"
        if make.__name__ in ("tensor", "as_tensor", "asarray"):  # from data on the host, which go there in a copy
            data = args[0]
            return data.to(CUDA, kwargs.get("dtype")) if lies_on_it(data) else up(make(*args, **kwargs))
        return _marked(make(*args, **kwargs))

    return made


_group = torch._C._group_tensors_by_device_and_dtype


def _grouped(lists: Any, *args: Any) -> Any:
    """Optimizers group tensors by the device that C++ sees."""
    found = _group(lists, *args)
    on_gpu = any(lies_on_it(tensor) for tensor in lists[0])
    return {(CUDA if on_gpu else device, dtype): group for (device, dtype), group in found.items()}


_autocast_init = torch.amp.autocast_mode.autocast.__init__


def _autocast_on_the_cpu(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
    _autocast_init(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """This machine has a GPU as long as the context lasts."""
    gpu = PretendedGpu()
    with torch.device("cpu"):  # which remembers the factories by identity when it is first used
        torch.empty(0)
    with contextlib.ExitStack() as stack:
        for each in _patches(gpu):
            stack.enter_context(each)
        stack.enter_context(_Operations(gpu))
        yield gpu
