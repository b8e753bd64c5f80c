"""The cache folder keeps what one process has made for every other process. It never lies beside the user's files.

An entry is a folder that is named by a hash of all that its content depends on. It lists its files with their sizes and
hashes. An entry that is incomplete, damaged or not ours is made again. What a killed process has begun is removed then.
An entry has the usual rights of new files, so several users can share a folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

from agentic_rag_env.files import sync, sync_all

#: Environment variable that names another folder than `~/.cache/agentic_rag_env`.
CACHE_VARIABLE = "AGENTIC_RAG_CACHE"
#: Entries of up to this many bytes are hashed whenever they are opened, which takes a second or two. For larger ones
#: only the sizes are compared; `agentic-rag-index check` reads them whole.
_MOST_HASHED = 2**30
_LISTING = "files.json"

_logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The cache folder; it need not exist."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/agentic_rag_env").expanduser()


def kept(kind: str, key: str, make: Callable[[Path], None], what: str) -> Path:
    """An entry of the cache folder, made first if it is not there whole.

    Args:
        kind: Folder that holds the entries of one kind.
        key: Hash of all that the content depends on.
        make: Writes the files of the entry into an empty folder.
        what: What the files are, for the log.

    Raises:
        OSError: The cache folder cannot be written, or the entry cannot be read.
        Exception: Whatever `make` raises.
    """
    from filelock import FileLock

    folder = cache_folder() / kind / key
    if is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{key}.lock"):
        if is_whole(folder):  # another process has made it meanwhile
            return folder
        if folder.exists():
            _logger.warning("%s is damaged; it is made again.", folder)
            shutil.rmtree(folder)  # before anything is made: it may be another user's
        _logger.warning("Making %s, once, to be kept in %s.", what, folder)
        start = time.monotonic()
        for unfinished in folder.parent.glob(f".{key}.*/"):  # of a process that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        # Not `mkdtemp`, whose folders nobody else can read.
        making = folder.parent / f".{key}.{uuid4().hex}"
        making.mkdir()
        try:
            make(making)
            seal_folder(making)
            making.rename(folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(making, ignore_errors=True)
        _logger.warning("That took %.0f s.", time.monotonic() - start)
    return folder


def kept_or_none(kind: str, key: str, make: Callable[[Path], None], what: str) -> Path | None:
    """An entry of the cache folder as `kept` returns it; None, with a warning, if that raises an `OSError`."""
    try:
        return kept(kind, key, make, what)
    except OSError as error:
        _logger.warning("This is made in memory, since it cannot be kept: %s (%s).", what, error)
        return None


def key_of_file(file: Path) -> str:
    """Hash that changes with the contents of a file, wherever a small one lies.

    For a file of more than a gigabyte, it is a hash of its place, size, time and 256 blocks spread evenly over it.
    """
    status = file.stat()
    if status.st_size <= _MOST_HASHED:
        return digest_of(file)
    hashed = hashlib.blake2b(digest_size=16)
    hashed.update(json.dumps([str(file.absolute()), status.st_size, status.st_mtime_ns]).encode())
    for block in sampled_blocks(file):
        hashed.update(block)
    return hashed.hexdigest()


def sampled_blocks(file: Path) -> Iterator[bytes]:
    """256 blocks spread evenly over a file, its end included: quick to read even in a file of 60 GB."""
    last = max(0, file.stat().st_size - 4096)
    with file.open("rb") as opened:
        for number in range(256):
            opened.seek(last * number // 255)
            yield opened.read(4096)


def digest_of(file: Path) -> str:
    """Hash of a file, 32 hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != _LISTING)
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def seal_folder(folder: Path) -> None:
    """List the files of a complete folder with their sizes and hashes, and wait until all of it is on the disk."""
    listed = {name: [size, digest_of(folder / name)] for name, size in _sizes(folder).items()}
    (folder / _LISTING).write_text(json.dumps(listed, sort_keys=True), encoding="utf-8")
    sync_all(folder)


def is_whole(folder: Path) -> bool:
    """Whether a folder holds what `seal_folder` has listed.

    Raises:
        PermissionError: The folder is there, but this user must not read it.
    """
    try:
        listed = json.loads((folder / _LISTING).read_text(encoding="utf-8"))
        found = _sizes(folder)
        if {name: size for name, (size, _) in listed.items()} != found:
            return False
        hashed = sum(found.values()) <= _MOST_HASHED
        return not hashed or all(digest_of(folder / name) == digest for name, (_, digest) in listed.items())
    except PermissionError as error:
        said = f"{folder} cannot be read by this user; whoever made it can allow that (chmod -R a+rX)"
        raise PermissionError(error.errno, said) from error
    except (OSError, ValueError, TypeError, AttributeError):
        return False
