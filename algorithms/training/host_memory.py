"""Memory of freed tensors: the process keeps it for the next ones, and gives it back when too much is idle.

The allocator of glibc hands large blocks back to the system at once, which clears every page that it gives out again:
a fifth of the time of a training step with 135M parameters. If it keeps them, tensors that differ in size from step to
step leave holes that fit nothing, and a process comes to hold twice of what it uses.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

_STATM = Path("/proc/self/statm")
#: Below it, nothing is worth the pages that have to be made anew.
_MIN_BYTES = 2 * 2**30
_MAX_GROWTH = 1.25
#: Of mallopt(3): free memory at the end of the heap, and blocks from this size on, go back to the system.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 2**31 - 1


def resident() -> int | None:
    """Bytes of memory that this process holds; None where the system does not say."""
    if not _STATM.is_file():
        return None
    return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int:
    """Most memory that this process ever held [bytes]."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back() -> None:
    """Give back to the system what the C library keeps of freed memory; only glibc can."""
    if library := _glibc():
        library.malloc_trim(0)


def keep_freed() -> None:
    """Let the C library keep freed memory of any size for later blocks, until `give_back`; only glibc can."""
    if library := _glibc():
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        library.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        return library
    return None


class StepMemory:
    """Keeps the memory of a stage's training steps about what its second step took.

    In the first one, the optimizer has no state yet.
    """

    def __init__(self) -> None:
        self._num_steps = 0
        self._usual = 0
        keep_freed()

    def after_step(self) -> None:
        """Give memory back if the process has grown by a quarter since the second step."""
        now = resident()
        if now is None:
            return
        self._num_steps += 1
        if self._num_steps <= 2:
            self._usual = now
        elif now > max(_MIN_BYTES, _MAX_GROWTH * self._usual):
            give_back()
