"""Millions of passages in a memory-mapped file: opened at once, read by row, shared between processes."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from agentic_rag_env.cache_folder import CACHE_VARIABLE, cache_folder, kept, key_of_file
from agentic_rag_env.corpus.rows import file_version, passages_in
from agentic_rag_env.errors import DataError
from agentic_rag_env.files import written_whole
from agentic_rag_env.types import Passage

#: Key in the metadata of the Arrow schema that marks an Arrow file as a store; its value is the number of the format.
_FORMAT_KEY, _FORMAT = b"agentic_rag_env.corpus", b"1"
#: A record batch ends after this many passages or characters. Writing holds one record batch in memory.
_BATCH_PASSAGES, _BATCH_CHARS = 8192, 2**26
#: The corpora that this process has read, by file: time and size of the file, and its passages.
_READ: dict[str, tuple[list[int], Sequence[Passage]]] = {}
_DAMAGED = "is a damaged store: {}. Delete it, and write it again by the command that wrote it."


class CorpusStore(Sequence[Passage]):
    """The passages of a store, read from the memory-mapped file when they are asked for.

    A store is an Arrow file (IPC file format, columns `id` and `contents`), so any Arrow library reads it. To open a
    store is to read its footer and the heads of its record batches. Copies of the object map the same file, in this
    process or another.

    Args:
        path: A file written by `write_store`.

    Raises:
        DataError: The file is missing, damaged or no store.

    Attributes:
        path: The file.
        fingerprint: Hash of all ids and contents in their order, see `fingerprint`.
        source: What the store was made from, by which `open_corpus` recognizes an outdated one; "" if it was no file.
    """

    def __init__(self, path: str | Path) -> None:
        import pyarrow as pa

        self.path = Path(file_version(path)[0])
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
            if (reader.schema.metadata or {}).get(_FORMAT_KEY) != _FORMAT:
                raise DataError(
                    f"{path}: is no corpus store of format {_FORMAT.decode()}; write one with agentic-rag-index store."
                )
            *batches, _ = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            metadata = reader.get_batch_with_custom_metadata(len(batches)).custom_metadata
            self.fingerprint = metadata[b"fingerprint"].decode()
            self.source = metadata[b"source"].decode()
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise (error if isinstance(error, DataError) else DataError(f"{path}: {_DAMAGED.format(error)}")) from error
        self._columns = [(batch.column(0), batch.column(1)) for batch in batches]
        self._starts = [0, *accumulate(len(batch) for batch in batches)]

    def __reduce__(self) -> tuple[Any, ...]:
        return CorpusStore, (self.path,)

    def __len__(self) -> int:
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Passage: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | NDArray[np.integer]) -> Sequence[Passage]: ...
    def __getitem__(self, index: int | slice | Sequence[int] | NDArray[np.integer]) -> Passage | Sequence[Passage]:
        if isinstance(index, slice):
            return [self._passage(row) for row in range(*index.indices(len(self)))]
        if isinstance(index, (Sequence, np.ndarray)):
            return [self[int(row)] for row in index]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"passage {index} of a corpus of {len(self)}")
        return self._passage(row)

    def __iter__(self) -> Iterator[Passage]:
        for ids, contents in self._columns:
            yield from map(Passage, ids.to_pylist(), contents.to_pylist())

    def _passage(self, row: int) -> Passage:
        number = bisect_right(self._starts, row) - 1
        ids, contents = self._columns[number]
        place = row - self._starts[number]
        return Passage(ids[place].as_py(), contents[place].as_py())


class Texts(Sequence[str]):
    """The contents of a corpus as a sequence that holds no list of them."""

    def __init__(self, corpus: Sequence[Passage]) -> None:
        self._corpus = corpus

    def __len__(self) -> int:
        return len(self._corpus)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [passage.contents for passage in self._corpus[index]]
        return self._corpus[index].contents

    def __iter__(self) -> Iterator[str]:
        return (passage.contents for passage in self._corpus)


def read_corpus(path: str | Path) -> Sequence[Passage]:
    """The passages of a file. Those of a store stay on disk; those of any other file are read into memory.

    Args:
        path: A store, or a file that `passages_in` reads. While the file does not change, reading it again in one
            process returns the same object, so that the splits of a dataset can share one index.

    Raises:
        DataError: The file is missing, unreadable or empty, or a row is malformed or repeats an id.
    """
    file, *version = file_version(path)
    if file not in _READ or _READ[file][0] != version:
        _READ[file] = version, _read_corpus(file)
    return _READ[file][1]


def _read_corpus(path: str) -> Sequence[Passage]:
    if _is_store(path):
        return CorpusStore(path)
    passages = []
    place_of: dict[str, str] = {}
    for where, passage in passages_in(path):
        if passage.id in place_of:
            raise DataError(f"{where}: id {passage.id!r} is already the id of {place_of[passage.id]}.")
        place_of[passage.id] = where.rpartition(", ")[2]
        passages.append(passage)
    if not passages:
        raise DataError(f"{path}: is empty; a corpus needs at least one passage.")
    return tuple(passages)


def open_corpus(
    path: str | Path,
    store: str | Path | None = None,
    advance: Callable[[int], None] = lambda count: None,
    needed: str | None = None,
) -> CorpusStore:
    """The store of a file's passages. It is written first if it is missing, if its passages or the file have changed.

    A store at `store` is read whole for this; one in the cache folder is compared with its hash.

    Args:
        path: A store, which is opened as it is, or a file that `passages_in` reads.
        store: Where the store of such a file lies; None: in the cache folder, under a hash of the file.
        advance: Called with the number of further passages read or written.
        needed: The fingerprint that a store must have to take the place of the one at `store`; None: any.

    Raises:
        DataError: `read_corpus` would raise it, something else lies at `store`, the store cannot be written, or the
            passages are not the needed ones.
    """
    _, mtime_ns, size = file_version(path)
    if _is_store(path):
        return CorpusStore(path)
    source = f"{Path(path).name}, {size} bytes, modified {mtime_ns}"

    def write(target: Path) -> None:
        write_store((passage for _, passage in passages_in(path)), target, source, advance, needed)

    try:
        if store is None:
            file = Path(path).expanduser()
            what = f"a store of {path}"
            folder = kept("corpora", key_of_file(file), lambda folder: write(folder / "corpus.arrow"), what)
            return CorpusStore(folder / "corpus.arrow")
        target = Path(store).expanduser()
        if not target.exists() or CorpusStore(target).source != source or not _is_sound(target, advance):
            write(target)
        return CorpusStore(target)
    except OSError as error:
        raise DataError(
            f"{cache_folder() if store is None else store}: cannot be written: {error.strerror}. Name another cache "
            f"folder in {CACHE_VARIABLE}, or write the store of {path} with agentic-rag-index store {path} "
            "<file.arrow>, and give that."
        ) from error


def check_corpus(path: str | Path, advance: Callable[[int], None] = lambda count: None) -> tuple[int, str]:
    """Read all passages of a file.

    Args:
        path: A store, or a file that `passages_in` reads.
        advance: Called with the number of further passages read.

    Returns:
        The number of passages and their fingerprint.

    Raises:
        DataError: `read_corpus` would raise it, or the passages of a store are not those that were written into it.
    """
    if not _is_store(path):
        passages = read_corpus(path)
        advance(len(passages))
        return len(passages), fingerprint(passages)
    import pyarrow as pa

    store = CorpusStore(path)
    digest = _Digest()
    try:
        for passage in store:
            digest.update([passage])
            advance(1)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: {_DAMAGED.format(error)}") from error
    if digest.hexdigest() != store.fingerprint:
        raise DataError(
            f"{path}: holds other passages than were written: their fingerprint is {digest.hexdigest()}, and "
            f"{store.fingerprint} was noted. Write it again by the command that wrote it."
        )
    return len(store), store.fingerprint


def _is_sound(store: Path, advance: Callable[[int], None]) -> bool:
    """Whether a store holds the passages that were written into it."""
    try:
        check_corpus(store, advance)
    except DataError:
        return False
    return True


def write_store(
    passages: Iterable[Passage],
    path: str | Path,
    source: str = "",
    advance: Callable[[int], None] = lambda count: None,
    needed: str | None = None,
) -> CorpusStore:
    """Write a store. This takes the memory of one record batch and 8 bytes for each passage.

    Args:
        passages: At least one passage; each id occurs once.
        path: The file; it is replaced if it exists.
        source: What the passages come from, see `CorpusStore`.
        advance: Called with the number of further passages written.
        needed: The fingerprint that the passages must have; None: any.

    Raises:
        DataError: There is no passage, two have the same id, they are not the needed ones, or the name does not end in
            `.arrow`. A file that was there stays as it was.
    """
    import pyarrow as pa

    text = pa.large_string()
    schema = pa.schema([("id", text), ("contents", text)], metadata={_FORMAT_KEY: _FORMAT})
    path = Path(path).expanduser()
    if path.suffix != ".arrow":
        raise DataError(f"{path}: a store needs a name in .arrow, by which it is told from other files.")
    digest = _Digest()
    id_hashes = array("q")
    with written_whole(path) as partial:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in _batched(passages):
                ids, contents = [passage.id for passage in batch], [passage.contents for passage in batch]
                writer.write_batch(pa.record_batch([pa.array(ids, text), pa.array(contents, text)], schema=schema))
                digest.update(batch)
                id_hashes.extend(map(hash, ids))
                advance(len(batch))
            # The hash is known only now, so it goes with an empty batch at the end.
            nothing = pa.record_batch([pa.array([], text), pa.array([], text)], schema=schema)
            writer.write_batch(nothing, custom_metadata={"fingerprint": digest.hexdigest(), "source": source})
        if not id_hashes:
            raise DataError(f"{path}: would be empty; a corpus needs at least one passage.")
        _refuse_repeated_ids(CorpusStore(partial), np.asarray(id_hashes), path)
        if needed not in (None, found := digest.hexdigest()):
            raise DataError(
                f"{path}: belongs to files that were made from the passages {needed}, but the passages given are "
                f"{found}, {len(id_hashes)} of them; choose another folder, or delete this one."
            )
    return CorpusStore(path)


def fingerprint(corpus: Sequence[Passage]) -> str:
    """Hash of the ids and contents of all passages in their order, 32 hexadecimal digits; any container will do."""
    own = getattr(corpus, "fingerprint", None)
    if own is not None:
        return str(own)
    digest = _Digest()
    digest.update(corpus)
    return digest.hexdigest()


class _Digest:
    """The BLAKE2b hash over each id and each passage's contents, both preceded by their length."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.hexdigest = self._hash.hexdigest

    def update(self, passages: Iterable[Passage]) -> None:
        for passage in passages:
            for text in (passage.id, passage.contents):
                encoded = text.encode("utf-8", "surrogatepass")
                self._hash.update(len(encoded).to_bytes(8, "little") + encoded)


def _batched(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    batch: list[Passage] = []
    num_chars = 0
    for passage in passages:
        batch.append(passage)
        num_chars += len(passage.contents)
        if len(batch) == _BATCH_PASSAGES or num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _refuse_repeated_ids(store: CorpusStore, id_hashes: NDArray[np.int64], path: Path) -> None:
    order = np.argsort(id_hashes, kind="stable")
    same = np.flatnonzero(id_hashes[order[1:]] == id_hashes[order[:-1]])
    for first, second in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
        if store[first].id == store[second].id:
            raise DataError(
                f"{path}: id {store[first].id!r} would be that of passage {first} and of passage {second} (from 0)."
            )


def _is_store(path: str | Path) -> bool:
    if not str(path).endswith(".arrow"):
        return False
    import pyarrow as pa

    try:
        with pa.memory_map(str(Path(path).expanduser())) as source:
            return _FORMAT_KEY in (pa.ipc.open_file(source).schema.metadata or {})
    except (pa.ArrowException, OSError):
        return False
