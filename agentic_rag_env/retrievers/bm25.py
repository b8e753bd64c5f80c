"""Lexical search: Okapi BM25 through the bm25s library."""

from __future__ import annotations

import logging
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentic_rag_env.cache_folder import kept_or_none
from agentic_rag_env.corpus import Texts
from agentic_rag_env.errors import ConfigurationError, DataError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import KEPT_FROM, CorpusRetriever, Ranking, hash_of
from agentic_rag_env.retrievers.index_folder import corpus_of_index, read_manifest
from agentic_rag_env.retrievers.words import WORDS, Tokenizer, unspaced_chars
from agentic_rag_env.settings import COUNT, FRACTION, PLACE, at_least, check_settings, or_none
from agentic_rag_env.types import Passage

#: Name of the folder within an index folder, and of the vocabulary's file in that folder.
BM25_FOLDER, VOCABULARY = "bm25", "vocabulary.arrow"
#: Most words of a query that are read. Queries of search agents have 5 to 50. A search for 128 of the most common words
#: takes 15 ms in 200,000 passages.
MAX_QUERY_WORDS = 128
#: Number of passages that are tokenized at a time.
_SPAN = 4096
#: Number of blocks of scores for each passage that is asked for.
_BLOCKS = 64
#: Number of words whose place in the vocabulary is remembered. Looking up a word takes as long as scoring a rare one.
_MOST_FOUND = 2**16
#: If this share of the characters, or more, is in scripts without blanks, words are no good unit.
_MUCH_UNSPACED = 0.1

_logger = logging.getLogger(__name__)


@dataclass
class BM25Config:
    """Settings of BM25.

    Attributes:
        k1: Saturation of the term frequency; the default is Anserini's.
        b: Strength of the length normalization, in [0, 1]; the default is Anserini's.
        stemmer: Language of the Snowball stemmer (PyStemmer) that cuts inflected words down, such as `english`; None: a
            word stays as it is. Most published figures of BM25 are with stems and without stop words.
        stopwords: Name of a list in bm25s of words that do not count, such as `english`. With it, words of one
            character do not count either. None: all words count.
        tokenizer: `words` are the texts between blanks and punctuation. With `bigrams`, scripts without blanks
            between words, such as Chinese, Japanese and Thai, count as overlapping pairs of characters; other scripts
            are split as `words`.
        index: Folder made by `agentic-rag-index bm25` with the same settings as above. None: the index is made in
            memory. For 5,000 passages or more it is made once for all processes, in the cache folder.
        corpus: File of the passages, instead of those of the dataset or the index folder.
        max_query_words: Most words of a query that are read, repetitions included; the rest is ignored. The time of a
            search grows with the number of words and with how common they are.
    """

    k1: float = 0.9
    b: float = 0.4
    stemmer: str | None = None
    stopwords: str | None = None
    tokenizer: str = "words"
    index: str | None = None
    corpus: str | None = None
    max_query_words: int = MAX_QUERY_WORDS

    def __post_init__(self) -> None:
        check_settings(self, COUNT, "max_query_words")
        check_settings(self, at_least(0), "k1")
        check_settings(self, FRACTION, "b")
        check_settings(self, or_none(PLACE), "index", "corpus")
        self.make_tokenizer()

    def make_tokenizer(self) -> Tokenizer:
        """Make the tokenizer that cuts passages and queries into words."""
        return Tokenizer(self.tokenizer, self.stemmer, self.stopwords)

    def of_index(self) -> dict[str, Any]:
        """All that decides an index: its settings, those of words if they are unusual, and how words are cut."""
        words = {name: getattr(self, name) for name in ("stemmer", "stopwords", "tokenizer")}
        usual = {"stemmer": None, "stopwords": None, "tokenizer": "words"}
        of_words = {name: value for name, value in words.items() if value != usual[name]}
        return {"k1": self.k1, "b": self.b, **of_words, "words": WORDS[self.tokenizer]}


@RETRIEVERS.register("bm25", BM25Config)
class BM25Retriever(CorpusRetriever):
    """Searches title and text together, by an index in memory or in a memory-mapped folder.

    All words of a text count, lower-cased and whole, unless `BM25Config` says otherwise. An index takes about 8 bytes
    per distinct word of each passage. A query without a known word matches nothing.

    Args:
        config: The settings.
        corpus: The passages; their order decides ties. None: those of the index folder.

    Raises:
        ConfigurationError: There is no corpus, the corpus holds no words, the stemmer or the list of stop words is
            missing, or the settings are not those of the index.
        DataError: The index folder is incomplete, or was built from another corpus.
    """

    scores_by = "corpus"

    def __init__(self, config: BM25Config, corpus: Sequence[Passage] | None = None) -> None:
        self._found: dict[str, int | None] = {}
        self._tokenizer = config.make_tokenizer()
        self._tokenizer.words(())  # reports a missing stemmer or list of stop words before anything is opened
        self._config, self._given = config, corpus
        manifest = None if config.index is None else read_manifest(config.index, "bm25")
        self.corpus = corpus_of_index("bm25", config.corpus, corpus, manifest)
        if config.index is None or manifest is None:
            self._on_disk, (self._index, self._vocabulary) = self._made()
            return
        self._on_disk = True
        if manifest["index"].get("words") != WORDS.get(manifest["index"].get("tokenizer", "words")):
            raise DataError(
                f"{config.index}: was built by another version, which cuts texts into other words; build it again by "
                "the same agentic-rag-index bm25 command."
            )
        if manifest["index"] != config.of_index():
            raise ConfigurationError(
                f"bm25 index {config.index} was built with {_listed(manifest['index'])}, but "
                f"{_listed(config.of_index())} are asked for; set them alike or build another index."
            )
        self._index, self._vocabulary = _load(Path(config.index).expanduser() / BM25_FOLDER)

    def __reduce__(self) -> str | tuple[Any, ...]:
        # A copy maps the same files.
        return (BM25Retriever, (self._config, self._given)) if self._on_disk else super().__reduce__()

    def rank(self, queries: Sequence[str], top_k: int) -> list[Ranking]:
        """See `CorpusRetriever.rank`."""
        words_of_each = self._tokenizer.first_words(queries, self._config.max_query_words)
        return [self._best(words, top_k) for words in words_of_each]

    def _identity(self) -> dict[str, Any]:
        most = self._config.max_query_words
        # The default is left out, so that caches of older versions, which had no bound, stay valid with it.
        bound = {} if most == MAX_QUERY_WORDS else {"max_query_words": most}
        return {"retriever": "bm25", **self._config.of_index(), **bound}

    def _made(self) -> tuple[bool, tuple[Any, Any]]:
        """Whether the index lies on disk, and the index with its vocabulary."""
        texts, config = Texts(self.corpus), self._config
        if len(texts) < KEPT_FROM:
            return False, index_texts(texts, config)

        def make(folder: Path) -> None:
            save_index(*index_texts(texts, config), folder / BM25_FOLDER)

        key = hash_of([self.fingerprint_of_corpus, config.of_index(), version("bm25s")])
        folder = kept_or_none("bm25", key, make, f"the BM25 index of {len(texts):,} passages")
        return (False, index_texts(texts, config)) if folder is None else (True, _load(folder / BM25_FOLDER))

    def _best(self, words: list[str], top_k: int) -> Ranking:
        by_count: dict[int, list[int]] = defaultdict(list)
        for word, count in Counter(words).items():
            if (place := self._find(word)) is not None:
                by_count[count].append(place)
        if not by_count:
            return []
        # A word is looked up once, however often it occurs, so a repetition costs nothing.
        scores = reduce(np.add, (self._index.get_scores_from_ids(ids) * np.float32(n) for n, ids in by_count.items()))
        top_k = min(top_k, len(scores))
        candidates = np.flatnonzero((scores >= _reached(scores, top_k)) & (scores > 0))
        best = candidates[np.argsort(-scores[candidates], kind="stable")[:top_k]]
        return [(int(row), float(scores[row])) for row in best]

    def _find(self, word: str) -> int | None:
        if word in self._found:
            return self._found[word]
        place: int | None = bisect_left(self._vocabulary, word, key=lambda entry: entry.as_py())
        if place == len(self._vocabulary) or self._vocabulary[place].as_py() != word:
            place = None
        if len(self._found) < _MOST_FOUND:
            self._found[word] = place
        return place


def _reached(scores: NDArray[np.float32], count: int) -> np.float32:
    """A score that at least `count` of the scores [n] reach, but few more: the `count`-th among the blocks' best.

    `np.partition` over all scores takes five times as long as the rest of a search in a million passages.
    """
    size = max(1, len(scores) // (_BLOCKS * count))
    best_of_blocks = np.maximum.reduceat(scores, np.arange(0, len(scores), size))
    return np.partition(best_of_blocks, -count)[-count]


def index_texts(
    texts: Iterable[str], config: BM25Config, advance: Callable[[int], None] = lambda count: None
) -> tuple[Any, Any]:
    """Index texts.

    Args:
        texts: Any number of texts; they are read once.
        config: The settings.
        advance: Called with the number of further texts tokenized.

    Returns:
        The `bm25s.BM25`, and an Arrow array of the words in sorted order; the place of a word is its id.

    Raises:
        ConfigurationError: There is no word in the texts, or the stemmer or the list of stop words is missing.
    """
    import bm25s
    import pyarrow as pa

    # The library switches its own debug messages on, which any program with a root handler would print.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    tokenizer = config.make_tokenizer()
    found: dict[str, int] = {}
    word_ids: list[Any] = []
    num_chars = num_unspaced = 0
    remaining = iter(texts)
    while span := list(islice(remaining, _SPAN)):
        word_ids += [
            np.array([found.setdefault(word, len(found)) for word in words], np.int32)
            for words in tokenizer.words(span)
        ]
        num_chars += sum(map(len, span))
        num_unspaced += sum(map(unspaced_chars, span))
        advance(len(span))
    if tokenizer.tokenizer == "words" and num_unspaced > _MUCH_UNSPACED * num_chars:
        _logger.warning(
            "%.0f%% of the corpus is in scripts without blanks between words: bm25 will find little of it. Set "
            "tokenizer=bigrams.",
            100 * num_unspaced / num_chars,
        )
    if not found:
        raise ConfigurationError(f"retriever 'bm25' found no words in the {len(word_ids)} passages of the corpus.")
    vocabulary = sorted(found)
    new_id = np.empty(len(found), np.int32)
    new_id[[found[word] for word in vocabulary]] = np.arange(len(found), dtype=np.int32)
    index = bm25s.BM25(k1=config.k1, b=config.b)
    # Sorted words make the files of the same texts equal. An array takes a tenth of the memory of a list.
    numbered = [array("i", new_id[ids].tobytes()) for ids in word_ids]
    index.index((numbered, {word: place for place, word in enumerate(vocabulary)}), show_progress=False)
    index.vocab_dict = {}
    return index, pa.array(vocabulary, pa.large_string())


def save_index(index: Any, vocabulary: Any, folder: Path) -> None:
    """Write what `index_texts` returned into a folder."""
    import pyarrow as pa

    index.save(folder, show_progress=False)
    table = pa.table({"word": vocabulary})
    with pa.OSFile(str(folder / VOCABULARY), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _load(folder: Path) -> tuple[Any, Any]:
    import bm25s
    import pyarrow as pa

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    try:
        words = pa.ipc.open_file(pa.memory_map(str(folder / VOCABULARY))).get_batch(0).column(0)
        index = bm25s.BM25.load(folder, mmap=True, load_vocab=False, show_progress=False)
    except (OSError, ValueError, EOFError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{folder}: is a damaged BM25 index ({error}); build it again.") from error
    # The arrays stay mapped, but are plain arrays, because a slice of a `memmap` takes ten times as long.
    index.scores = {
        name: np.asarray(part) if isinstance(part, np.memmap) else part for name, part in index.scores.items()
    }
    return index, words


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items() if name != "words")
