"""Keeps search results in a file, so that no process ever reads a wrong or incomplete one.

The file is an SQLite database in WAL mode, for three reasons. Its commits are atomic: a process may be killed at any
moment, and the next reader finds each entry whole or not at all. Writers of several processes queue for its lock, while
readers go on with the last commit. A lookup reads a few pages instead of the whole file.

A commit does not wait for the disk (`synchronous=NORMAL`). A power cut may cost the newest entries, but never their
integrity, and a lost entry is searched again. Each entry carries a checksum over key and content, so damage by other
means (a disk, an editor) reads as a miss. WAL needs memory shared between the processes: keep the file on a local disk,
not on NFS.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.types import Passage

#: Number that marks a file as a cache of this layout (`PRAGMA user_version`); another layout has another number.
LAYOUT = 0x52414731
#: Longest wait for other processes that are writing [seconds].
LOCK_TIMEOUT_S = 60.0
_DIGEST_SIZE = 16
_KEYS_PER_QUERY = 500


class CacheEntries:
    """Results by key. Memory holds the ones used last; the file holds all.

    Args:
        path: The file; None: memory only.
        max_in_memory: Most results in memory.
        read_only: Whether the file is only read, so that it may be one that cannot be written.

    Raises:
        ConfigurationError: The file is none of ours; every method may raise it.
        RetrieverError: The file can't be opened, read or written; every method may raise it.
    """

    def __init__(self, path: str | Path | None, max_in_memory: int, *, read_only: bool) -> None:
        self.path = None if path is None else Path(path).expanduser()
        self._max_in_memory, self._read_only = max_in_memory, read_only
        self._in_memory: OrderedDict[bytes, tuple[Passage, ...]] = OrderedDict()
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._connection_pid = 0

    def __reduce__(self) -> tuple[Any, ...]:
        # An open file cannot be copied. A copy of the object opens the file itself, in this process or another.
        return partial(CacheEntries, read_only=self._read_only), (self.path, self._max_in_memory)

    def enter(self, fingerprint: str) -> None:
        """Note whose results are to be kept; refuse a file that is only read and has none of them."""
        if self.path is None:
            return
        if self._read_only and not self.path.exists():
            raise ConfigurationError(f"cached with offline=true needs the file {self.path}, which does not exist.")
        with self._open(writing=not self._read_only) as connection:
            if not self._read_only:
                connection.execute("INSERT OR IGNORE INTO sources VALUES (?)", (fingerprint,))
                return
            known = [row[0] for row in connection.execute("SELECT fingerprint FROM sources ORDER BY rowid")]
        if fingerprint not in known:
            raise ConfigurationError(
                f"the cache {self.path} has no results of the retriever {fingerprint!r}; it has those of "
                f"{', '.join(map(repr, known)) or 'none'}. Choose the same retriever and corpus, or fingerprint=<that>."
            )

    def read(self, keys: Sequence[bytes]) -> dict[bytes, tuple[Passage, ...]]:
        """The results of those keys that have one, by key."""
        found = {}
        with self._lock:
            for key in keys:
                if key in self._in_memory:
                    self._in_memory.move_to_end(key)
                    found[key] = self._in_memory[key]
            if self.path is not None:
                on_disk = self._read_file([key for key in keys if key not in found])
                self._remember(on_disk)
                found |= on_disk
        return found

    def write(self, results: Mapping[bytes, Sequence[Passage]]) -> None:
        """Keep results: all of them, or none if the process dies meanwhile."""
        with self._lock:
            self._remember({key: tuple(passages) for key, passages in results.items()})
            if self.path is not None and results:
                rows = [(key, _pack(key, passages)) for key, passages in results.items()]
                with self._open() as connection:
                    connection.executemany("INSERT OR REPLACE INTO results VALUES (?, ?)", rows)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._connection is not None and self._connection_pid == os.getpid():
                self._connection.close()
            self._connection = None

    def _read_file(self, keys: Sequence[bytes]) -> dict[bytes, tuple[Passage, ...]]:
        found: dict[bytes, tuple[Passage, ...]] = {}
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            some = keys[start : start + _KEYS_PER_QUERY]
            marks = ", ".join("?" * len(some))
            with self._open(writing=False) as connection:
                rows = connection.execute(f"SELECT key, value FROM results WHERE key IN ({marks})", some).fetchall()
            found |= {key: passages for key, value in rows if (passages := _unpack(key, value)) is not None}
        return found

    def _remember(self, results: Mapping[bytes, tuple[Passage, ...]]) -> None:
        self._in_memory |= results
        while len(self._in_memory) > self._max_in_memory:
            self._in_memory.popitem(last=False)

    @contextmanager
    def _open(self, writing: bool = True) -> Iterator[sqlite3.Connection]:
        """Yield the connection to the file, in a transaction if it is to be written."""
        try:
            with self._lock:
                # A forked worker must not use the connection of its parent.
                if self._connection is None or self._connection_pid != os.getpid():
                    assert self.path is not None
                    connect = _connect_read_only if self._read_only else _connect
                    self._connection, self._connection_pid = connect(self.path), os.getpid()
                if not writing:
                    yield self._connection
                    return
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                finally:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
        except (sqlite3.Error, OSError) as error:
            raise RetrieverError(f"the cache {self.path} cannot be used: {error}.") from error


def _connect_read_only(path: Path) -> sqlite3.Connection:
    # A reader of a write-ahead log makes files beside it. Where it cannot, it is told that nobody writes meanwhile, as
    # `offline` means.
    unwritten = not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists()
    place = f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if unwritten else ''}"
    with _opened(path, place) as connection:
        if _layout(connection) != LAYOUT:
            raise sqlite3.DatabaseError("it is a database of something else")
    return connection


def _connect(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _opened(path, path.absolute().as_uri()) as connection:
        # This holds the lock, so that processes that start together find either nothing or the whole layout.
        connection.execute("BEGIN IMMEDIATE")
        layout = _layout(connection)
        if layout == 0 and not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            connection.execute("CREATE TABLE sources (fingerprint TEXT UNIQUE NOT NULL)")
            connection.execute("CREATE TABLE results (key BLOB PRIMARY KEY, value BLOB NOT NULL)")
            connection.execute(f"PRAGMA user_version = {LAYOUT}")
        elif layout != LAYOUT:
            raise sqlite3.DatabaseError("it is a database of something else")
        connection.execute("COMMIT")
        connection.execute("PRAGMA synchronous = NORMAL")
        if _write_ahead(connection) != "wal":
            raise sqlite3.OperationalError("its file system cannot hold a write-ahead log")
    return connection


@contextmanager
def _opened(path: Path, place: str) -> Iterator[sqlite3.Connection]:
    """Open a file by its URI and yield the connection, which stays open if the block finds it to be a cache."""
    connection = sqlite3.connect(place, LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False, uri=True)
    try:
        yield connection
    except sqlite3.DatabaseError as error:
        connection.close()
        if isinstance(error, sqlite3.OperationalError):
            raise
        raise ConfigurationError(f"{path} is no cache of this version ({error}); name another file.") from error


def _layout(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


def _write_ahead(connection: sqlite3.Connection) -> str:
    """Change the journal mode, and return the new mode. For this SQLite itself does not wait for other processes."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            return connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _pack(key: bytes, passages: Sequence[Passage]) -> bytes:
    # JSON writes the shortest digits that read back as the same float, and escapes what UTF-8 lacks.
    content = json.dumps([[passage.id, passage.contents, float(passage.score)] for passage in passages]).encode()
    return digest(key, content) + content


def _unpack(key: bytes, value: bytes) -> tuple[Passage, ...] | None:
    if not isinstance(value, bytes) or value[:_DIGEST_SIZE] != digest(key, value[_DIGEST_SIZE:]):
        return None
    return tuple(Passage(*row) for row in json.loads(value[_DIGEST_SIZE:]))


def digest(*parts: bytes) -> bytes:
    """A hash of the parts and of where each one ends, 16 bytes."""
    hashed = hashlib.blake2b(digest_size=_DIGEST_SIZE)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.digest()
