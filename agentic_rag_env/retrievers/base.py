"""Defines the protocol of retrievers, the checks that all share, and what one retriever asks of another."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any, Protocol, TypeAlias, runtime_checkable

from agentic_rag_env.corpus import fingerprint
from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.settings import COUNT, check_value
from agentic_rag_env.types import Found, Passage

#: Number of passages from which on an index that is made in memory is kept in the cache folder.
KEPT_FROM = 5000
#: Most characters of a query that are read; see `Retriever.search`.
MAX_QUERY_CHARS = 10_000
#: Places in the corpus with their scores, best first; equal scores are in the order of the corpus.
Ranking: TypeAlias = list[tuple[int, float]]
#: Key in the metadata of a setting that names places outside: a file which the retriever writes, or options with
#: addresses. The settings in a run directory may be a stranger's. What they name in such a setting is used only if the
#: command line names it too.
OUTSIDE = "outside"


@runtime_checkable
class Retriever(Protocol):
    """Finds passages for queries, many at a time."""

    def search(self, queries: Sequence[str], top_k: int) -> Sequence[Found]:
        """Search for the passages that match each query best.

        Args:
            queries: Any number of query texts, in any characters a model may write. The built-in retrievers read the
                first `MAX_QUERY_CHARS` characters of each, so that no query takes long, whatever a model writes.
            top_k: Most passages per query, at least 1.

        Returns:
            One list per query, in the order of the queries: at most `top_k` passages, best first. The result for a
            query does not depend on the other queries. A `RetrieverError` may stand in place of a list; then only that
            query has failed, and only its episode ends.

        Raises:
            ConfigurationError: `top_k` is below 1.
            RetrieverError: The search failed. An empty list always means that nothing matched.
        """
        ...


class CorpusRetriever(ABC):
    """Searches passages that it holds. A subclass only ranks rows; this class does the rest.

    Attributes:
        corpus: The passages; their order decides ties.
    """

    corpus: Sequence[Passage]

    def search(self, queries: Sequence[str], top_k: int) -> list[Any]:
        """See `Retriever.search`. A query that occurs more than once is searched once."""

        def found(distinct: list[str]) -> list[Found]:
            return [
                best if isinstance(best, RetrieverError) else [self._passage(row, score) for row, score in best]
                for best in self.rank(distinct, top_k)
            ]

        return search_once(queries, top_k, found)

    @abstractmethod
    def rank(self, queries: Sequence[str], top_k: int) -> Sequence[Ranking | RetrieverError]:
        """The best rows for each query, or its failure.

        There is at least one query, all are distinct, and `top_k` is at least 1.
        """

    @property
    def fingerprint(self) -> str | None:
        """Hash of all that results depend on, passages included; None if a part cannot tell what it is."""
        identity = self._identity()
        return None if identity is None else hash_of({**identity, "corpus": self.fingerprint_of_corpus})

    @cached_property
    def fingerprint_of_corpus(self) -> str:
        """The hash of the passages, see `corpus.fingerprint`."""
        return fingerprint(self.corpus)

    @abstractmethod
    def _identity(self) -> dict[str, Any] | None:
        """Plain data with all that results depend on beside the passages; None if a part cannot tell what it is."""

    def _passage(self, row: int, score: float) -> Passage:
        passage = self.corpus[row]
        return Passage(passage.id, passage.contents, score)


def hash_of(data: Any) -> str:
    """Hash of plain data, the same in every process: 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=16).hexdigest()


def hash_with(retrievers: Iterable[Retriever], *settings: Any) -> str | None:
    """Hash of some settings and of the retrievers behind; None if one of these cannot tell what it is."""
    behind = [getattr(retriever, "fingerprint", None) for retriever in retrievers]
    return None if None in behind else hash_of([*settings, *behind])


def checked_queries(queries: Sequence[str], top_k: int) -> list[str]:
    """Check the arguments of `search`, and return the part of each query that is read.

    Raises:
        ConfigurationError: `top_k` is below 1, or `queries` is one string (whose characters would be searched).
    """
    if isinstance(queries, str):
        raise ConfigurationError(f"search takes a list of queries, got one string; pass [{queries[:40]!r}].")
    check_value("top_k", top_k, COUNT)
    return [query[:MAX_QUERY_CHARS] for query in queries]


def search_once(queries: Sequence[str], top_k: int, search: Callable[[list[str]], Sequence[Found]]) -> list[Any]:
    """Search a query that occurs more than once only once; each occurrence gets a list of its own.

    Args:
        queries: The queries of `Retriever.search`, which are checked.
        top_k: Its other argument, which is checked.
        search: Finds the results of distinct queries, at least one.

    Returns:
        For each query its passages, or its `RetrieverError`.

    Raises:
        ConfigurationError: `checked_queries` raises it.
    """
    queries = checked_queries(queries, top_k)
    distinct = list(dict.fromkeys(queries))
    found = dict(zip(distinct, search(distinct) if distinct else (), strict=True))
    return [result if isinstance(result := found[query], RetrieverError) else list(result) for query in queries]


def require_corpus(name: str, corpus: Sequence[Passage] | None) -> Sequence[Passage]:
    """The corpus of a retriever that cannot do without one.

    Raises:
        ConfigurationError: There is no corpus, or it is empty.
    """
    if corpus is None:
        raise ConfigurationError(
            f"retriever {name!r} searches a corpus, but got none; give the dataset a corpus "
            "(dataset.corpus=<file.jsonl>) or choose a retriever that brings its own, such as 'http'."
        )
    if not len(corpus):
        raise ConfigurationError(f"retriever {name!r} got an empty corpus; it needs at least one passage.")
    return corpus


def encodable(text: str) -> str:
    """The text with a `?` for each character that UTF-8 cannot express (lone surrogates).

    Tokenizers and JSON parsers refuse such characters, and a model can be made to write them.
    """
    return text if text.isascii() else text.encode("utf-8", errors="replace").decode("utf-8")


def fingerprint_of(retriever: Any, spec: Any, corpus: Sequence[Passage] | None) -> str:
    """The identity of a retriever: with equal fingerprints, equal queries have equal results.

    A retriever says its identity in an attribute `fingerprint` (str): a hash of corpus, encoder and all settings that a
    result depends on. None says that it has no identity. Without the attribute, the identity of a retriever that
    was made from a name or mapping over a corpus is a hash of settings, passages and, if it is from outside of this
    package, the file of its code. A retriever whose results depend on anything else must have the attribute.

    Args:
        retriever: The retriever.
        spec: What it was built from: a name, a mapping or the retriever itself.
        corpus: The passages that it was built over.

    Raises:
        ConfigurationError: The retriever has no identity.
    """
    own = getattr(retriever, "fingerprint", "")
    if own is None:
        raise _no_identity(retriever, "a part of it cannot tell what it is")
    if own:
        return str(own)
    if not isinstance(spec, (str, Mapping)) or corpus is None:
        raise _no_identity(retriever, "it has no attribute 'fingerprint' and is not built over a corpus by name")
    settings = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = settings.pop("name")
    entry = RETRIEVERS.get(name)
    if entry.config is not None:
        settings = vars(entry.config(**settings))
    try:
        plain = json.dumps({"name": name, **settings}, sort_keys=True, default=dataclasses.asdict)
    except (TypeError, ValueError) as error:
        raise _no_identity(retriever, f"its settings are no plain data ({error})") from error
    return f"{plain} corpus={fingerprint(corpus)} version={_version(retriever, entry.factory)}"


def _version(retriever: Any, factory: Any) -> str:
    """The version of the code behind a registered retriever: this package's, or the hash of a plug-in's file."""
    module = factory.__module__
    if module.partition(".")[0] == __name__.partition(".")[0]:
        return version("agentic-rag-env")
    try:
        return hash_of(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError) as error:
        raise _no_identity(retriever, f"the code of {module} is in no file") from error


def build_wrapped(wrapper: str, spec: Any, corpus: Sequence[Passage] | None) -> Retriever:
    """Make the retriever that another part searches with.

    Args:
        wrapper: The other part, for the error.
        spec: A name, a mapping or a retriever.
        corpus: The passages for a retriever that searches a corpus.

    Raises:
        ConfigurationError: The object is no retriever.
    """
    retriever = RETRIEVERS.build(spec, corpus=corpus)
    if not isinstance(retriever, Retriever):
        raise ConfigurationError(
            f"{wrapper} needs a retriever: a name, a mapping or an object with search(queries, top_k), got "
            f"{retriever!r}."
        )
    return retriever


class Wrapper:
    """A retriever that searches with others: it passes on what they count, and has them prepare themselves.

    Attributes:
        parts: The others.
    """

    parts: Sequence[Retriever]

    def stats(self) -> Mapping[str, int]:
        """The counts of the parts, added up by name."""
        counts: Counter[str] = Counter()
        for part in self.parts:
            counts.update(stats_of(part))
        return dict(counts)

    def prepare(self) -> None:
        """Prepare the parts, see `prepare`."""
        for part in self.parts:
            prepare(part)


def stats_of(retriever: Any) -> Mapping[str, int]:
    """The counts of a retriever since it was made; empty if it has no method `stats`."""
    stats = getattr(retriever, "stats", None)
    return stats() if callable(stats) else {}


def prepare(retriever: Any) -> None:
    """Load what the first search of a retriever would wait for, if it has a method `prepare`."""
    if callable(method := getattr(retriever, "prepare", None)):
        method()


def scores_by(retriever: Any) -> str:
    """What the scores of a retriever depend on, as its attribute `scores_by` says.

    `passage`, the default: on query and passage alone, so that scores of several corpora can be compared. `corpus`: on
    the other passages too, as word statistics and ranks do. `service`: a service sends them, and does not say.
    """
    return getattr(retriever, "scores_by", "passage")


def _no_identity(retriever: Any, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"{type(retriever).__name__} has no identity to keep results under: {reason}. Give it an attribute "
        "'fingerprint', or name what it searches with fingerprint=<name>, another one for every change of it."
    )
