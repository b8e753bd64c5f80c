"""Lock files, each held by one process at a time: the one that writes a run, uses a slot or collects demonstrations.

The library filelock puts the locks on open files. The kernel drops a lock when the last process that has the file open
ends, however it ends, so no lock is ever stale. A job inherits the lock of its slot, so this uses
`filelock.lock_descriptor`, whose descriptor can be handed on. That of a `filelock.FileLock` belongs to the process that
made it.
"""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import lock_descriptor

from agentic_rag_env.files import write_whole

#: What tells a cache folder from a folder that only bears its name; also read by programs that make backups.
_TAG, _SIGNATURE = "CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n# of agentic_rag_env\n"
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: dict[Path, int] = {}


def try_lock(path: Path, wait: bool = False) -> int | None:
    """Open and lock a file, unless another process has it.

    Args:
        path: The file. It is made if absent, with its folder, and it stays.
        wait: Whether to wait until no other process has the file.

    Returns:
        A descriptor, or None if the file is locked. The lock lasts until the descriptor is closed here and in every
        process that inherited it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if lock_descriptor(descriptor, blocking=wait):
            return descriptor
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            message = f"{path.parent} can't be guarded against a second writer: {error.strerror}."
            warnings.warn(message, stacklevel=2)
            return descriptor
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def hold(path: Path) -> str | None:
    """Keep a file locked until `release` or the end of this process. A second call changes nothing.

    Returns:
        None, or who has the file instead.
    """
    path = path.absolute()
    if path in _held:
        return None
    descriptor = try_lock(path)
    if descriptor is None:
        return path.read_text(encoding="utf-8").strip() or "another process"
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _held[path] = descriptor
    return None


def release(path: Path) -> None:
    """Undo `hold`."""
    descriptor = _held.pop(path.absolute(), None)
    if descriptor is not None:
        os.close(descriptor)


def is_cache(folder: Path) -> bool:
    """Whether a folder was made by `make_cache`."""
    tag = folder / _TAG
    return tag.is_file() and tag.read_bytes() == _SIGNATURE.encode()


def make_cache(folder: Path) -> None:
    """Make a cache folder, or make an existing folder one.

    Raises:
        OSError: The folder can't be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not is_cache(folder):
        write_whole(folder / _TAG, _SIGNATURE.encode())


def require_writable(folder: Path) -> None:
    """Make a folder, and a file in it that vanishes at once.

    Raises:
        OSError: It can't be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def exclusively(path: Path, waiting: str) -> Iterator[None]:
    """Let one process after the other run the block.

    Args:
        path: The file to lock.
        waiting: Printed if another process has it.
    """
    descriptor = try_lock(path)
    if descriptor is None:
        print(waiting, flush=True)
        descriptor = try_lock(path, wait=True)
    assert descriptor is not None
    try:
        yield
    finally:
        os.close(descriptor)
