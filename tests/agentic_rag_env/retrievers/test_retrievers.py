"""The contract of every local retriever, and the ranking of each against an oracle of its own."""

from __future__ import annotations

import collections
import copy
import errno
import math
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import types
import unicodedata
import zlib
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import agentic_rag_env  # noqa: F401
from agentic_rag_env.corpus import fingerprint
from agentic_rag_env.errors import ConfigurationError, RetrieverError, UnknownNameError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import Retriever, hash_of
from agentic_rag_env.retrievers.bm25 import BM25Config, BM25Retriever
from agentic_rag_env.retrievers.dense import DenseConfig, DenseRetriever
from agentic_rag_env.retrievers.static import StaticConfig, StaticRetriever
from agentic_rag_env.retrievers.vectors.encoders import build_encoder
from agentic_rag_env.retrievers.vectors.faiss_search import faiss_has_gpus
from agentic_rag_env.retrievers.vectors.hashed_ngram import HashedNgramConfig, HashedNgramEncoder
from agentic_rag_env.retrievers.words import Tokenizer
from agentic_rag_env.types import Passage

#: `rerank` needs a model, see `test_hybrid_rerank.py`; `sharded` needs parts, see `test_sharded.py`.
LOCAL = sorted(set(RETRIEVERS.names()) - {"http", "rerank", "sharded", *([] if find_spec("lancedb") else ["lancedb"])})
WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven"]


def corpus_of(*contents: str) -> tuple[Passage, ...]:
    return tuple(Passage(f"p{row}", text) for row, text in enumerate(contents))


def random_corpus(size: int, seed: int = 0) -> tuple[Passage, ...]:
    rng = np.random.default_rng(seed)
    return corpus_of(*(" ".join(rng.choice(WORDS, rng.integers(1, 12))) for _ in range(size)))


CORPUS = random_corpus(60)
QUERIES = ["amber cedar", "fjord", "haven grove delta birch ember", "amber amber fjord", "zebra", "", "amber cedar"]


@pytest.fixture(scope="module", params=LOCAL)
def retriever(request: pytest.FixtureRequest) -> Retriever:
    return RETRIEVERS.build(request.param, corpus=CORPUS)


class TestContract:
    """What every retriever over a corpus promises."""

    def test_is_a_retriever(self, retriever: Retriever) -> None:
        assert isinstance(retriever, Retriever)

    @pytest.mark.parametrize("top_k", [1, 3, 59, 60, 1000])
    def test_one_ranked_list_per_query(self, retriever: Retriever, top_k: int) -> None:
        found = retriever.search(QUERIES, top_k)
        assert len(found) == len(QUERIES)
        for passages in found:
            scores = [passage.score for passage in passages]
            assert len(passages) <= top_k
            assert scores == sorted(scores, reverse=True)
            assert len({passage.id for passage in passages}) == len(passages)
            assert all(CORPUS[int(passage.id[1:])].contents == passage.contents for passage in passages)
        assert found[0]

    def test_a_query_does_not_depend_on_the_others(self, retriever: Retriever) -> None:
        # More than 20 queries at once, where FAISS changes its way of computing.
        many = QUERIES * 10
        together = retriever.search(many, 5)
        assert together == [retriever.search([query], 5)[0] for query in many]
        assert together == retriever.search(many[::-1], 5)[::-1]

    def test_fewer_passages_are_a_beginning_of_more(self, retriever: Retriever) -> None:
        assert [found[:3] for found in retriever.search(QUERIES, 10)] == retriever.search(QUERIES, 3)

    def test_searching_changes_nothing(self, retriever: Retriever) -> None:
        before, queries = copy.deepcopy(CORPUS), list(QUERIES)
        first = retriever.search(queries, 4)
        expected = copy.deepcopy(first)
        first[0].clear()
        assert retriever.search(queries, 4) == expected
        assert queries == QUERIES
        assert before == CORPUS

    def test_two_retrievers_agree(self, retriever: Retriever, request: pytest.FixtureRequest) -> None:
        other = RETRIEVERS.build(request.node.callspec.params["retriever"], corpus=list(CORPUS))
        assert other.search(QUERIES, 7) == retriever.search(QUERIES, 7)

    def test_survives_copying(self, retriever: Retriever) -> None:
        expected = retriever.search(QUERIES, 3)
        assert copy.deepcopy(retriever).search(QUERIES, 3) == expected
        assert pickle.loads(pickle.dumps(retriever)).search(QUERIES, 3) == expected

    def test_no_queries(self, retriever: Retriever) -> None:
        assert retriever.search([], 3) == []
        assert retriever.search((), 3) == []

    @pytest.mark.parametrize(
        "query",
        [
            "\ud800 amber",
            "amber \udfff",
            "\x00\x1b[31m\u202e",
            "\n\t ",
            "👩‍👩‍👧",
            "東京",
            "x" * 100_000,
            "amber " * 20_000,
            "<answer>",
        ],
        ids=lambda query: ascii(query)[:20],
    )
    def test_any_characters(self, retriever: Retriever, query: str) -> None:
        (passages,) = retriever.search([query], 3)
        assert len(passages) <= 3

    def test_the_beginning_of_a_long_query_is_read(self, retriever: Retriever) -> None:
        beginning = ("amber cedar " * 1000)[:10_000]
        expected = retriever.search([beginning], 3)
        assert retriever.search([beginning + " fjord" * 100_000], 3) == expected

    @pytest.mark.parametrize("top_k", [0, -1])
    def test_top_k_below_one(self, retriever: Retriever, top_k: int) -> None:
        for queries in (["amber"], []):
            with pytest.raises(ConfigurationError, match=f"top_k must be an integer of at least 1, got {top_k}"):
                retriever.search(queries, top_k)

    def test_one_string_is_no_list_of_queries(self, retriever: Retriever) -> None:
        with pytest.raises(ConfigurationError, match="takes a list of queries"):
            retriever.search("amber", 3)

    @pytest.mark.parametrize("name", LOCAL)
    def test_needs_a_corpus(self, name: str) -> None:
        with pytest.raises(ConfigurationError, match=r"retriever '\w+' searches a corpus, but got none"):
            RETRIEVERS.build(name, corpus=None)
        with pytest.raises(ConfigurationError, match=r"retriever '\w+' got an empty corpus"):
            RETRIEVERS.build(name, corpus=[])

    @pytest.mark.parametrize("name", LOCAL)
    @pytest.mark.filterwarnings("ignore:.*The environment is being checked:UserWarning")
    def test_in_the_environment(self, name: str) -> None:
        check_env(gymnasium.make("AgenticRAG-v0", retriever=name).unwrapped, skip_render_check=True)


# BM25


def bm25_by_hand(texts: list[str], query: str, k1: float, b: float) -> list[float]:
    """Lucene's BM25: sum over words of ln(1 + (N - df + 1/2) / (df + 1/2)) tf / (tf + k1 (1 - b + b l / avg l))."""
    documents = [re.findall(r"\w+", text.lower()) for text in texts]
    average = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in re.findall(r"\w+", query.lower()):
            frequency = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - frequency + 0.5) / (frequency + 0.5))
            count = document.count(word)
            score += idf * count / (count + k1 * (1 - b + b * len(document) / average))
        scores.append(score)
    return scores


TEXTS = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join), min_size=1, max_size=8)


@settings(deadline=None, max_examples=50)
@given(TEXTS, st.lists(st.sampled_from([*WORDS, "zebra"]), max_size=4).map(" ".join), st.sampled_from([0.0, 0.4, 1.0]))
def test_bm25_scores(texts: list[str], query: str, b: float) -> None:
    (found,) = BM25Retriever(BM25Config(k1=0.9, b=b), corpus_of(*texts)).search([query], len(texts))
    expected = bm25_by_hand(texts, query, 0.9, b)
    assert {passage.id for passage in found} == {f"p{row}" for row, score in enumerate(expected) if score > 0}
    for passage in found:
        assert passage.score == pytest.approx(expected[int(passage.id[1:])], rel=1e-5)


def test_bm25_looks_a_repeated_word_up_once() -> None:
    bm25 = BM25Retriever(BM25Config(), CORPUS)
    index, looked_up = bm25._index, []

    def noted(ids: list[int]) -> Any:
        looked_up.extend(ids)
        return index.get_scores_from_ids(ids)

    bm25._index = SimpleNamespace(get_scores_from_ids=noted)
    ((best, *_),) = bm25.search(["amber " * 100 + "cedar " * 20], 1)
    assert len(looked_up) == 2
    scores = {word: bm25_by_hand([p.contents for p in CORPUS], word, 0.9, 0.4) for word in ("amber", "cedar")}
    expected = [100 * amber + 20 * cedar for amber, cedar in zip(scores["amber"], scores["cedar"], strict=True)]
    assert best.id == f"p{np.argmax(expected)}"
    assert best.score == pytest.approx(max(expected), rel=1e-5)


@pytest.mark.parametrize("most", [1, 2, 128])
def test_bm25_reads_the_first_words_of_a_query(most: int) -> None:
    bm25 = BM25Retriever(BM25Config(max_query_words=most), CORPUS)
    read = ["zebra"] * (most - 1) + ["amber"]
    assert bm25.search([" -- ".join([*read, "cedar", "fjord"])], 5) == bm25.search([" ".join(read)], 5) != [[]]


def test_bm25_with_the_usual_bound_is_the_retriever_of_before() -> None:
    corpus = fingerprint(CORPUS)
    old = hash_of({"retriever": "bm25", "k1": 0.9, "b": 0.4, "words": 2, "corpus": corpus})
    assert BM25Retriever(BM25Config(), CORPUS).fingerprint == old
    assert BM25Retriever(BM25Config(max_query_words=127), CORPUS).fingerprint != old


DELHI, SCATTERED = "दिल्ली भारत की राजधानी है", "दिल लड़का लल द ल ल द"
CAFE = "Café Zürich"


@pytest.mark.parametrize("name", ["bm25", "dense"])
def test_words_are_cut_at_no_mark(name: str) -> None:
    """Vowel signs and accents belong to the word before them, in whatever form of Unicode they come."""
    corpus = corpus_of(SCATTERED, DELHI, unicodedata.normalize("NFC", CAFE), "Kaffee in Bern")
    retriever = RETRIEVERS.build(name, corpus=corpus)
    decomposed = unicodedata.normalize("NFD", "café")
    assert decomposed != "café"
    best = [found[0] for found in retriever.search(["दिल्ली", decomposed, "café"], 4)]
    assert [passage.id for passage in best] == ["p1", "p2", "p2"]
    assert best[1] == best[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The quick_brown fox's 2nd, jump-over: é!", ["the", "quick_brown", "fox", "s", "2nd", "jump", "over", "é"]),
        ("दिल्ली भारत", ["दिल्ली", "भारत"]),
        (unicodedata.normalize("NFD", CAFE), ["café", "zürich"]),
        ("x\u0323y \u0301 ❤\ufe0f 1\ufe0f\u20e3", ["x\u0323y", "1"]),  # no mark alone, and no choice of a look
    ],
)
def test_words_of_a_text(text: str, words: list[str]) -> None:
    assert Tokenizer().words([text]) == [words]
    assert Tokenizer().first_words([text + " and more" * 9], len(words)) == [words]


CHINESE = corpus_of(
    "法国的首都是巴黎", "塞纳河流过巴黎。", "柏林在施普雷河畔", "東京は日本の首都です", "Paris is the capital, 巴黎"
)
THAI = corpus_of("กรุงเทพเป็นเมืองหลวงของไทย", "เชียงใหม่อยู่ทางเหนือ")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("法国首都", ["p0", "p3"]),
        ("巴黎", ["p4", "p1", "p0"]),
        ("日本", ["p3"]),
        ("capital", ["p4"]),
        ("河", []),  # a pair is the smallest unit of a run of two and more
    ],
)
def test_bm25_finds_chinese_and_japanese_by_bigrams(query: str, expected: list[str]) -> None:
    bm25 = BM25Retriever(BM25Config(tokenizer="bigrams"), CHINESE)
    assert {passage.id for passage in bm25.search([query], 5)[0]} == set(expected)
    assert BM25Retriever(BM25Config(), CHINESE).search(["法国首都"], 5) == [[]]


def test_bm25_finds_thai_by_bigrams() -> None:
    bm25 = BM25Retriever(BM25Config(tokenizer="bigrams"), THAI)
    assert [passage.id for (passage,) in bm25.search(["เมืองหลวง", "เชียงใหม่"], 1)] == ["p0", "p1"]


def test_bigrams_of_a_text() -> None:
    cut = Tokenizer("bigrams").words(["Köln, 東京タワー 中 ok", "plain Words"])
    assert cut == [["köln", "東京", "京タ", "タワ", "ワー", "中", "ok"], ["plain", "words"]]
    assert Tokenizer("bigrams").first_words(["東京タワー" * 1000], 3) == [["東京", "京タ", "タワ"]]
    # Thai, Lao, Myanmar and Khmer: a letter keeps its vowel signs and tones.
    cut = Tokenizer("bigrams").words(["กินข้าว ok", "ລາວ", "မြန်မာ", "ភ្នំ"])
    assert cut == [["กิน", "นข้", "ข้า", "าว", "ok"], ["ລາ", "າວ"], ["မြန်", "န်မာ"], ["ភ្នំ"]]


@pytest.mark.parametrize(
    ("tokenizer", "corpus", "warned"),
    [("words", CHINESE, True), ("words", THAI, True), ("bigrams", CHINESE, False), ("words", CORPUS, False)],
)
def test_bm25_says_that_it_will_find_little(
    tokenizer: str, corpus: Any, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    BM25Retriever(BM25Config(tokenizer=tokenizer), corpus)
    assert ("Set tokenizer=bigrams" in caplog.text) == warned


def test_the_share_of_chinese_counts_characters(caplog: pytest.LogCaptureFixture) -> None:
    """One Chinese passage after a whole span of English ones is little of a corpus."""
    BM25Retriever(BM25Config(), [*corpus_of(*["amber birch"] * 4096), Passage("last", "法国的首都是巴黎")])
    assert "tokenizer=bigrams" not in caplog.text


def test_bm25_ties_follow_the_corpus() -> None:
    corpus = corpus_of(*["birch"] * 5, "amber", *["birch"] * 5, "amber", "amber amber")
    (found,) = BM25Retriever(BM25Config(k1=0.9, b=0.0), corpus).search(["amber birch"], 5)
    assert [passage.id for passage in found] == ["p12", "p5", "p11", "p0", "p1"]


@pytest.mark.parametrize("in_order", [False, True], ids=["mixed", "best-last"])
def test_bm25_best_of_many(in_order: bool) -> None:
    corpus = random_corpus(3000)
    if in_order:  # all of the best in one place
        corpus = tuple(sorted(corpus, key=lambda passage: passage.contents.count("amber")))
    bm25 = BM25Retriever(BM25Config(), corpus)
    place_of = {passage.id: place for place, passage in enumerate(corpus)}
    for query in ("amber", "amber cedar fjord", " ".join(WORDS)):
        (ranked,) = bm25.search([query], len(corpus))
        expected = sorted(ranked, key=lambda passage: (-passage.score, place_of[passage.id]))
        assert ranked == expected
        for top_k in (1, 3, 10, 100):
            assert bm25.search([query], top_k) == [expected[:top_k]]


def test_bm25_reads_title_and_text_and_ignores_case() -> None:
    corpus = corpus_of('"Amber Road"\nnothing', '"Other"\nalso NOTHING, but\tÉtude')
    bm25 = BM25Retriever(BM25Config(), corpus)
    assert [[passage.id for passage in found] for found in bm25.search(["ROAD", "étude!", "the"], 5)] == [
        ["p0"],
        ["p1"],
        [],
    ]


@pytest.mark.parametrize("texts", [["", "amber"], ["!?", "amber"], ["amber", ""]])
def test_bm25_with_a_passage_without_words(texts: list[str]) -> None:
    (found,) = BM25Retriever(BM25Config(), corpus_of(*texts)).search(["amber"], 5)
    assert [passage.contents for passage in found] == ["amber"]


def test_bm25_settings_out_of_range() -> None:
    with pytest.raises(ConfigurationError, match="found no words in the 2 passages"):
        BM25Retriever(BM25Config(), corpus_of("", "!?"))
    for setting, said in (
        ({"k1": -0.1}, "k1 must be at least 0, got -0.1"),
        ({"b": -0.1}, r"b must be in \[0, 1\], got -0.1"),
        ({"b": 1.1}, r"b must be in \[0, 1\], got 1.1"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            BM25Config(**setting)


BOOKS = corpus_of("The runner runs", "A library of ponies", "Running ponies", "x and y, the end")


@pytest.mark.parametrize(
    ("setting", "query", "expected"),
    [
        ({}, "run", []),
        ({"stemmer": "english"}, "run", ["p2", "p0"]),
        ({"stemmer": "english"}, "PONY", ["p2", "p1"]),
        ({"stemmer": "german"}, "pony", []),
        ({}, "the", ["p0", "p3"]),
        ({"stemmer": "english"}, "the", ["p0", "p3"]),
        ({"stopwords": "english"}, "the", []),
        ({"stopwords": "english"}, "of a library", ["p1"]),
        ({"stopwords": "german"}, "the", ["p0", "p3"]),
        ({}, "x", ["p3"]),
        ({"stopwords": "english"}, "x", []),
        ({"stemmer": "english", "stopwords": "english"}, "the runs", ["p0", "p2"]),
    ],
)
def test_bm25_stems_and_stop_words(setting: dict[str, str], query: str, expected: list[str]) -> None:
    (found,) = BM25Retriever(BM25Config(**setting), BOOKS).search([query], 4)
    assert [passage.id for passage in found] == expected


def test_bm25_scores_over_stems_are_those_of_the_stemmed_texts() -> None:
    """The runner runs -> runner run; a library of ponies -> librari poni; running ponies -> run poni; end."""
    stemmed = BM25Retriever(BM25Config(stemmer="english", stopwords="english"), BOOKS)
    plain = BM25Retriever(BM25Config(), corpus_of("runner run", "librari poni", "run poni", "end"))
    for query, stems in (("the ponies ran or run", "poni ran run"), ("Libraries", "librari"), ("ends", "end")):
        assert [[(p.id, p.score) for p in found] for found in stemmed.search([query], 4)] == [
            [(p.id, p.score) for p in found] for found in plain.search([stems], 4)
        ]


def test_bm25_of_other_words_is_another_retriever() -> None:
    settings: list[dict[str, str]] = [{}, {"stemmer": "english"}, {"stopwords": "english"}, {"stemmer": "german"}]
    assert len({BM25Retriever(BM25Config(**setting), BOOKS).fingerprint for setting in settings}) == 4
    stemmed = BM25Retriever(BM25Config(stemmer="english"), BOOKS)
    assert pickle.loads(pickle.dumps(stemmed)).search(["run"], 4) == stemmed.search(["run"], 4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"stemmer": "englsh"}, r"PyStemmer has no stemmer 'englsh'\. Did you mean 'english'\?"),
        ({"stopwords": "klingon"}, "bm25s has no list of stop words 'klingon'; it has english"),
    ],
)
def test_bm25_words_that_are_not_to_be_had(setting: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        BM25Retriever(BM25Config(**setting), BOOKS)
    with pytest.raises(ConfigurationError, match="must be a name such as english, or None, got True"):
        BM25Config(**dict.fromkeys(setting, True))  # type: ignore[arg-type]


def test_bm25_without_the_stemmer_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "Stemmer", None)
    with pytest.raises(ConfigurationError, match="pip install PyStemmer"):
        BM25Retriever(BM25Config(stemmer="english"), BOOKS)
    assert BM25Retriever(BM25Config(stopwords="english"), BOOKS).search(["ponies"], 4)[0]


# Static


def test_static_results_by_query() -> None:
    listed = {
        "who": [{"id": "a", "contents": "x", "score": 2}, {"id": "b", "contents": "y"}],
        "what": [Passage("c", "z")],
    }
    static = RETRIEVERS.build({"name": "static", "passages": listed}, corpus=None)
    assert static.search(["what", "who", "else"], 3) == [
        [Passage("c", "z")],
        [Passage("a", "x", 2.0), Passage("b", "y")],
        [],
    ]
    assert static.search(["who"], 1) == [[Passage("a", "x", 2.0)]]


def test_static_results_for_every_query() -> None:
    static = StaticRetriever(StaticConfig([Passage("c", "z")]), CORPUS)
    assert static.search(["one", "two"], 3) == [[Passage("c", "z")]] * 2
    assert StaticRetriever(StaticConfig([])).search(["one"], 3) == [[]]
    assert StaticRetriever(StaticConfig(), CORPUS).search(["one"], 2) == [list(CORPUS[:2])]


@pytest.mark.parametrize(
    "passages", ["text", 5, ["text"], [{"id": "a"}], [{"id": "a", "contents": "x", "url": ""}], {"q": "text"}]
)
def test_static_passages_of_another_form(passages: Any) -> None:
    with pytest.raises(ConfigurationError, match="static passage"):
        StaticRetriever(StaticConfig(passages))


# Hashed n-grams


def words_by_hand(text: str) -> list[str]:
    words = [""]
    for char in unicodedata.normalize("NFC", text).lower():
        mark = unicodedata.category(char) in ("Mn", "Mc") and not unicodedata.name(char, "").startswith("VARIATION SEL")
        if char.isalnum() or char == "_" or (mark and words[-1]):
            words[-1] += char
        else:
            words.append("")
    return [word for word in words if word]


def ngram_by_hand(text: str, passages: list[str], config: HashedNgramConfig) -> np.ndarray:
    words = words_by_hand(text)
    vector = np.zeros(config.dim)
    for word, count in collections.Counter(words).items():
        frequency = sum(word in words_by_hand(passage) for passage in passages)
        idf = math.log((1 + len(passages)) / (1 + frequency)) + 1
        marked = "<" + word + ">"
        grams = [marked]
        for n in range(config.min_n, config.max_n + 1):
            if n < len(marked):
                grams += ["".join(gram) for gram in zip(*(marked[start:] for start in range(n)), strict=False)]
        for gram in grams:
            crc = zlib.crc32(gram.encode())
            sign = 1 if crc >= 2**31 else -1
            vector[crc % config.dim] += sign * (1 + math.log(count)) * idf / math.sqrt(len(grams))
    return vector / (np.linalg.norm(vector) or 1)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4), st.sampled_from([(64, 3, 5), (7, 1, 2), (1024, 3, 3)]))
def test_hashed_ngram_follows_its_formula(texts: list[str], sizes: tuple[int, int, int]) -> None:
    config = HashedNgramConfig(*sizes)
    encoder = HashedNgramEncoder(config)
    encoder.fit(texts)
    rows = encoder.encode_passages([*texts, "unseen amber"])
    assert rows.dtype == np.float32
    for text, row in zip([*texts, "unseen amber"], rows, strict=True):
        np.testing.assert_allclose(row, ngram_by_hand(text, texts, config), atol=1e-6)


def test_retrievers_that_share_an_encoder_learn_apart() -> None:
    """The weight of a word comes from the retriever's own corpus, whoever else uses the encoder."""
    common, rare = corpus_of(*["amber birch"] * 9, "birch", "amber"), corpus_of("amber birch", *["cedar"] * 9)
    shared = HashedNgramEncoder()
    first = DenseRetriever(DenseConfig(encoder=shared), common)
    expected = first.search(QUERIES, 5)
    DenseRetriever(DenseConfig(encoder=shared), rare)
    assert first.search(QUERIES, 5) == expected
    assert expected == DenseRetriever(DenseConfig(), common).search(QUERIES, 5)


def test_hashed_ngram_finds_misspelt_and_inflected_words() -> None:
    corpus = corpus_of(
        "The capital of Freedonia is Fredville.", "Rivers flow into seas.", "A list of mountain climbers."
    )
    (typo, inflected) = DenseRetriever(DenseConfig(), corpus).search(["Freedomia capitol", "mountains climber"], 1)
    assert (typo[0].id, inflected[0].id) == ("p0", "p2")


def test_same_bits_in_every_process() -> None:
    script = (
        "import hashlib\n"
        "from agentic_rag_env.types import Passage\n"
        "from agentic_rag_env.retrievers.bm25 import BM25Config, BM25Retriever\n"
        "from agentic_rag_env.retrievers.dense import DenseConfig, DenseRetriever\n"
        "corpus = [Passage(str(i), f'word{i % 7} other{i % 3} third{i}') for i in range(50)]\n"
        "for retriever in (DenseRetriever(DenseConfig(), corpus), BM25Retriever(BM25Config(), corpus)):\n"
        "    print(hashlib.sha256(repr(retriever.search(['word1 other2', 'third4'], 10)).encode()).hexdigest())\n"
    )
    root = str(Path(__file__).parents[3])
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_hashed_ngram_settings_out_of_range() -> None:
    for setting, said in (
        ({"dim": 0}, "dim must be an integer of at least 1, got 0"),
        ({"min_n": 0}, "min_n must be an integer of at least 1, got 0"),
        ({"min_n": 4, "max_n": 3}, "max_n must be at least 4, got 3"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            HashedNgramConfig(**setting)


# Dense


class TableEncoder:
    """Looks vectors up: a text is the number of its row."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows.astype(np.float32)

    def fit(self, passages: Any) -> None:
        pass

    def encode_passages(self, passages: Any) -> np.ndarray:
        return self.rows[[int(text) for text in passages]]

    encode_queries = encode_passages


def test_dense_ranking_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 16))
    rows[100:200] = rows[:100]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    dense = DenseRetriever(DenseConfig(TableEncoder(rows)), corpus_of(*map(str, range(300))))
    found = dense.search([str(row) for row in range(300)], 20)
    scores = np.round(rows.astype(np.float32).astype(float) @ rows.astype(np.float32).astype(float).T, 5)
    for query, passages in enumerate(found):
        expected = sorted(range(300), key=lambda row: (-scores[query, row], row))[:20]
        assert [int(passage.contents) for passage in passages] == expected
        np.testing.assert_allclose([passage.score for passage in passages], scores[query, expected], atol=1e-9)


@pytest.mark.parametrize("num_queries", [1, 40])
def test_dense_ties_follow_the_corpus(num_queries: int) -> None:
    rows = np.tile(np.eye(3)[0], (500, 1))
    rows[250] = [0.8, 0.6, 0]
    dense = DenseRetriever(DenseConfig(TableEncoder(rows)), corpus_of(*map(str, range(500))))
    for found in dense.search(["0"] * num_queries, 4):
        assert [passage.id for passage in found] == ["p0", "p1", "p2", "p3"]
    for found in dense.search(["250"] * num_queries, 3):
        assert [(passage.id, passage.score) for passage in found] == [("p250", 1.0), ("p0", 0.8), ("p1", 0.8)]


def test_dense_query_without_features_matches_nothing() -> None:
    assert DenseRetriever(DenseConfig(), CORPUS).search(["?!", "amber"], 2)[0] == []


def test_dense_numbers_that_are_not_finite() -> None:
    rows = np.eye(3)
    rows[1, 1] = np.nan
    with pytest.raises(ConfigurationError, match="NaN or infinity for passage 'p1'"):
        DenseRetriever(DenseConfig(TableEncoder(rows)), corpus_of("0", "1", "2"))
    dense = DenseRetriever(DenseConfig(TableEncoder(rows)), corpus_of("0", "2"))
    hybrid = RETRIEVERS.build({"name": "hybrid", "retrievers": [dense, dense]}, corpus=None)
    for retriever in (dense, hybrid):
        first, bad, last = retriever.search(["0", "1", "2"], 1)
        assert [passage.id for passage in (*first, *last)] == ["p0", "p1"]
        assert isinstance(bad, RetrieverError)
        assert "NaN or infinity for the query '1'" in str(bad)


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        (["faiss-gpu-cu12", "numpy", "faiss-cpu"], r"Run `pip uninstall faiss-cpu faiss-gpu-cu12`, then pip install"),
        (["faiss-cpu"], r"Run `pip uninstall faiss-cpu`, then pip install"),
        (["numpy"], r"Run pip install"),
    ],
)
def test_two_builds_of_faiss_that_broke_each_other(
    installed: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both wheels own the folder `faiss/`. Removing one leaves a folder without files, which Python can import."""
    monkeypatch.setitem(sys.modules, "faiss", types.ModuleType("faiss"))
    found = [types.SimpleNamespace(name=name) for name in installed]
    monkeypatch.setattr("agentic_rag_env.retrievers.vectors.faiss_search.distributions", lambda: found)
    with pytest.raises(ConfigurationError, match=rf"damaged\. {said}.*never both"):
        DenseRetriever(DenseConfig(backend="faiss"), CORPUS)


def test_faiss_without_gpus_is_asked_for_one() -> None:
    if faiss_has_gpus():
        pytest.skip("it has one")
    with pytest.raises(ConfigurationError, match=r"a FAISS built for it; backend=torch.*\[faiss-gpu\]', never both"):
        DenseRetriever(DenseConfig(backend="faiss", device="cuda"), CORPUS)


def test_dense_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigurationError, match="backend=torch"):
        DenseRetriever(DenseConfig(backend="faiss"), CORPUS)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigurationError, match=r"agentic-rag-env\[faiss\].*backend=torch"):
        DenseRetriever(DenseConfig(), CORPUS)
    with pytest.raises(ConfigurationError, match="pip install torch; backend=faiss"):
        DenseRetriever(DenseConfig(backend="torch"), CORPUS)


def test_encoders_by_name_mapping_and_object() -> None:
    pytest.importorskip("torch")
    assert isinstance(build_encoder("hashed_ngram"), HashedNgramEncoder)
    built = build_encoder({"name": "hashed_ngram", "dim": 64})
    assert isinstance(built, HashedNgramEncoder)
    assert built.config.dim == 64
    assert build_encoder(built).fingerprint == built.fingerprint
    with pytest.raises(UnknownNameError, match=r"Unknown encoder 'hashed_ngrm'\. Did you mean 'hashed_ngram'"):
        build_encoder("hashed_ngrm")
    with pytest.raises(ConfigurationError, match="cannot be loaded; give a folder"):
        build_encoder("./no/such/folder")


# Kept in the cache folder

OVER_TORCH = pytest.param(
    {"name": "dense", "backend": "torch"}, marks=pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")
)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, in which what is made of 60 passages is kept already."""
    for module in ("bm25", "dense"):
        monkeypatch.setattr(f"agentic_rag_env.retrievers.{module}.KEPT_FROM", 60)
    monkeypatch.setenv("AGENTIC_RAG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("spec", ["bm25", "dense", OVER_TORCH, "hybrid"])
def test_what_is_kept_gives_the_same_results(kept: Path, caplog: pytest.LogCaptureFixture, spec: Any) -> None:
    made = RETRIEVERS.build(spec, corpus=CORPUS[:59])  # too few to be kept
    assert not kept.exists()
    first = RETRIEVERS.build(spec, corpus=CORPUS)
    assert "Making the " in caplog.text
    caplog.clear()
    again = RETRIEVERS.build(spec, corpus=CORPUS)
    assert caplog.text == "", "nothing is made a second time"
    assert first.search(QUERIES, 5) == again.search(QUERIES, 5)
    assert pickle.loads(pickle.dumps(again)).search(QUERIES, 5) == first.search(QUERIES, 5)
    os.environ["AGENTIC_RAG_CACHE"] = str(kept / "file" / "unusable")
    (kept / "file").touch()
    assert RETRIEVERS.build(spec, corpus=CORPUS).search(QUERIES, 5) == first.search(QUERIES, 5)
    assert "in memory, since" in caplog.text
    assert made.search(QUERIES, 5) != first.search(QUERIES, 5)


def test_what_is_kept_belongs_to_corpus_and_settings(kept: Path) -> None:
    specs = [{}, {"k1": 1.2}, {"b": 0.0}, {"stopwords": "english"}, {"tokenizer": "bigrams"}]
    for corpus in (CORPUS, CORPUS[::-1]):
        for changed in specs:
            RETRIEVERS.build({"name": "bm25", **changed}, corpus=corpus)
        for dim in (64, 128):
            RETRIEVERS.build({"name": "dense", "encoder": {"name": "hashed_ngram", "dim": dim}}, corpus=corpus)
    RETRIEVERS.build({"name": "bm25", "max_query_words": 5}, corpus=CORPUS)  # a setting of searching
    assert len([item for item in (kept / "bm25").iterdir() if item.is_dir()]) == 10
    assert len([item for item in (kept / "vectors").iterdir() if item.is_dir()]) == 4


@pytest.mark.parametrize("name", ["bm25", "dense"])
@pytest.mark.parametrize(
    "harm", [lambda content: content[:-1], lambda content: b"", lambda content: content[:-1] + b"~"]
)
def test_what_is_not_whole_is_made_again(kept: Path, caplog: pytest.LogCaptureFixture, name: str, harm: Any) -> None:
    expected = RETRIEVERS.build(name, corpus=CORPUS).search(QUERIES, 5)
    (entry,) = (item for item in next(kept.iterdir()).iterdir() if item.is_dir())
    for file in sorted(file for file in entry.rglob("*") if file.is_file()):
        before = file.read_bytes()
        file.write_bytes(harm(before))
        caplog.clear()
        assert RETRIEVERS.build(name, corpus=CORPUS).search(QUERIES, 5) == expected
        assert "is damaged; it is made again" in caplog.text
        assert file.read_bytes() == before


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_what_is_kept_has_the_usual_rights(kept: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        RETRIEVERS.build("bm25", corpus=CORPUS)
    finally:
        os.umask(before)
    for path in kept.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~umask, path


@pytest.mark.parametrize("right", ["read", "remove"])
def test_nothing_is_made_where_another_users_entry_stays(
    kept: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, right: str
) -> None:
    """The user of the tests may be root, who has every right. So the system's refusal is played."""
    expected = RETRIEVERS.build("bm25", corpus=CORPUS).search(QUERIES, 5)
    (listing,) = kept.rglob("files.json")
    owner, name = (Path, "read_text") if right == "read" else (shutil, "rmtree")
    granted = getattr(owner, name)

    def refusing(path: Path, *given: Any, **named: Any) -> Any:
        if path in (listing, listing.parent):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return granted(path, *given, **named)

    monkeypatch.setattr(owner, name, refusing)
    if right == "remove":
        listing.write_text("{}", encoding="utf-8")
    caplog.clear()
    assert RETRIEVERS.build("bm25", corpus=CORPUS).search(QUERIES, 5) == expected
    said = f"{listing.parent} cannot be read by this user" if right == "read" else "Permission denied"
    assert "made in memory, since it cannot be kept" in caplog.text
    assert said in caplog.text
    assert "Making" not in caplog.text
