"""Memory of freed tensors goes back to the system, where the C library would keep it.

The allocator of glibc keeps freed blocks below 32 MiB for later ones. Tensors of a training step differ in size from
step to step, so they leave holes that fit nothing, and a process comes to hold twice of what it uses.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_STATM = Path("/proc/self/statm")
#: Below it, nothing is worth the pages that have to be made anew.
_MIN_BYTES = 2 * 2**30
_MAX_GROWTH = 1.25


def resident() -> int | None:
    """Bytes of memory that this process holds; None where the system does not say."""
    if not _STATM.is_file():
        return None
    return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Give back to the system what the C library keeps of freed memory; only glibc can."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


class StepMemory:
    """Keeps the memory of a stage's training steps about what its first step took."""

    def __init__(self) -> None:
        self._after_first: int | None = None

    def after_step(self) -> None:
        """Give memory back if the process has grown by a quarter since the first step."""
        now = resident()
        if now is None:
            return
        if self._after_first is None:
            self._after_first = now
        elif now > max(_MIN_BYTES, _MAX_GROWTH * self._after_first):
            give_back()
