"""The machine that a plan is made for: this one, or GPUs that are named."""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from agentic_rag_env.settings import COUNT, Allowed, above, check_settings, or_none
from algorithms.learner.config import WITHOUT_EFFECT

GIB = 2**30


class Device(NamedTuple):
    """What one GPU, or this machine's processor, can do.

    Attributes:
        name: What it is called.
        memory: Bytes that a process can use.
        flops: Matrix products a second, in the precision of training.
        bandwidth: Bytes read from memory a second.
        decode_s: Least time of a decode step, which Python and launches take [seconds].
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    decode_s: float


#: Data sheets: memory as a process finds it, dense bfloat16, bandwidth. A decode step takes some 25 ms of Python and
#: launches for a model of 24 layers: arithmetic from counted operations, not measured on a GPU.
GPUS = {
    "h200": Device("h200", 139 * GIB, 989e12, 4.8e12, 0.025),
    "h100": Device("h100", 79 * GIB, 989e12, 3.35e12, 0.025),
    "a100": Device("a100", 79 * GIB, 312e12, 2.0e12, 0.025),
}


@dataclass
class HardwareConfig:
    """The machine that `preflight=true` plans for. It does not change where a run trains.

    Attributes:
        gpu: `h200`, `h100` or `a100`, or for another card the one most like it, with its `memory_gib`; None: this
            machine.
        count: Number of GPUs that share one run. Each holds a share of the episodes, and all networks or, with
            `learner.sharding=fsdp2`, a share of each.
        memory_gib: Memory of each [GiB]; None: what the GPU or this machine has.
    """

    gpu: str | None = field(default=None, metadata=WITHOUT_EFFECT)
    count: int = field(default=1, metadata=WITHOUT_EFFECT)
    memory_gib: float | None = field(default=None, metadata=WITHOUT_EFFECT)

    def __post_init__(self) -> None:
        allowed = f"one of {', '.join(GPUS)}; for another card take the one most like it, and set hardware.memory_gib"
        check_settings(self, or_none(Allowed(allowed, lambda value: value in GPUS, tuple(GPUS))), "gpu")
        check_settings(self, COUNT, "count")
        check_settings(self, or_none(above(0)), "memory_gib")


def device_of(config: HardwareConfig) -> Device:
    """The device that the settings name, or this machine's; the speed of a processor is measured in a second."""
    device = GPUS[config.gpu] if config.gpu else _this_machine()
    return device if config.memory_gib is None else device._replace(memory=config.memory_gib * GIB)


@functools.cache
def _this_machine() -> Device:
    import torch

    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        known = next((gpu for name, gpu in GPUS.items() if name in found.name.lower()), GPUS["a100"])
        return known._replace(name=found.name, memory=float(found.total_memory))
    size, rounds = 1024, 0
    matrix, start = torch.ones(size, size), time.perf_counter()
    while time.perf_counter() < start + 0.5:
        matrix @ matrix
        rounds += 1
    flops = rounds * 2 * size**3 / (time.perf_counter() - start)
    block, start = torch.ones(2**26), time.perf_counter()
    block.sum()
    bandwidth = 4 * len(block) / (time.perf_counter() - start)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device("cpu", float(memory), flops, bandwidth, 0.002)
