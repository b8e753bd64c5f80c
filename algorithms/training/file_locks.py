"""Files that one process at a time holds: who writes a run, who uses a slot, who collects demonstrations.

The kernel drops a lock when the last process that has it open ends, however it ends, so that none is ever stale.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: dict[Path, int] = {}


def try_lock(path: Path) -> int | None:
    """Open and lock a file, unless another process has it.

    Args:
        path: Made if absent, with its folder; it stays.

    Returns:
        A descriptor. The lock lasts until it is closed here and in every process that inherited it. None where the
        file is locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            os.close(descriptor)
            raise
        warnings.warn(f"{path.parent} can't be guarded against a second writer: {error.strerror}.", stacklevel=2)
    return descriptor


def write_holder(descriptor: int, note: str = "") -> None:
    """Say in a locked file who has it."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}{note}\n".encode(), 0)


def hold(path: Path) -> str | None:
    """Keep a file locked until `release` or the end of this process; twice is the same as once.

    Returns:
        None, or who has it instead.
    """
    path = path.absolute()
    if path in _held:
        return None
    descriptor = try_lock(path)
    if descriptor is None:
        return path.read_text(encoding="utf-8").strip() or "another process"
    write_holder(descriptor)
    _held[path] = descriptor
    return None


def release(path: Path) -> None:
    """Undo `hold`."""
    descriptor = _held.pop(path.absolute(), None)
    if descriptor is not None:
        os.close(descriptor)


@contextmanager
def exclusively(path: Path, waiting: str) -> Iterator[None]:
    """One process after the other.

    Args:
        path: The file to lock.
        waiting: Printed if another process has it.
    """
    descriptor = try_lock(path)
    if descriptor is None:
        print(waiting, flush=True)
        descriptor = os.open(path, os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(descriptor)
