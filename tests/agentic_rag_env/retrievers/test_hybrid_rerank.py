"""Retrievers made of others: fused by their ranks, or ranked again by a model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import agentic_rag_env  # noqa: F401
from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import CorpusRetriever, Ranking
from agentic_rag_env.types import Found, Passage

CORPUS = tuple(Passage(f"p{row}", f"passage {row}") for row in range(8))


class Ranked(CorpusRetriever):
    """Finds the rows it is told, whatever the query; counts the queries."""

    def __init__(self, *rows: int, corpus: Sequence[Passage] = CORPUS) -> None:
        self.corpus, self.rows, self.asked = corpus, rows, []  # type: ignore[var-annotated]

    def rank(self, queries: Sequence[str], top_k: int) -> list[Ranking]:
        self.asked += queries
        return [[(row, 1.0 - place / 10) for place, row in enumerate(self.rows[:top_k])] for _ in queries]

    def _identity(self) -> dict[str, Any]:
        return {"rows": self.rows}


class Service:
    """A retriever without a corpus; fails for the query "bad"."""

    def __init__(self, *ids: str) -> None:
        self.ids = ids

    def search(self, queries: Sequence[str], top_k: int) -> list[Found]:
        found = [Passage(name, f"text of {name}", 5.0) for name in self.ids[:top_k]]
        return [RetrieverError("no luck") if query == "bad" else found for query in queries]


def hybrid(*parts: Any, **settings: Any) -> Any:
    return RETRIEVERS.build({"name": "hybrid", "retrievers": list(parts), **settings}, corpus=CORPUS)


def test_sums_of_reciprocal_ranks() -> None:
    (found,) = hybrid(Ranked(3, 1, 2), Ranked(1, 5, 3), Ranked(1)).search(["q"], 3)
    assert [(passage.id, passage.contents) for passage in found] == [(f"p{row}", f"passage {row}") for row in (1, 3, 5)]
    assert [passage.score for passage in found] == pytest.approx([1 / 62 + 2 / 61, 1 / 61 + 1 / 63, 1 / 62], abs=1e-11)
    (sharper,) = hybrid(Ranked(3, 1), Ranked(1, 3, 2), rank_constant=1).search(["q"], 8)
    assert [passage.score for passage in sharper] == pytest.approx([1 / 3 + 1 / 2, 1 / 2 + 1 / 3, 1 / 4], abs=1e-11)


def test_ties_follow_the_corpus() -> None:
    (found,) = hybrid(Ranked(7, 4), Ranked(2, 6)).search(["q"], 4)
    assert [passage.id for passage in found] == ["p2", "p7", "p4", "p6"]
    # The order of a sum does not matter: rows 5 and 1 have the ranks 1, 2, 3 in different orders.
    (found,) = hybrid(Ranked(5, 7, 1), Ranked(1, 5, 7), Ranked(7, 1, 5)).search(["q"], 3)
    assert [passage.id for passage in found] == ["p1", "p5", "p7"]


def test_without_a_common_corpus_ties_follow_the_retrievers() -> None:
    (found,) = hybrid(Ranked(7, 4), Service("x", "p7", "y")).search(["q"], 5)
    assert [passage.id for passage in found] == ["p7", "x", "p4", "y"]
    assert found[0].contents == "passage 7"
    other = CORPUS[::-1]
    (found,) = hybrid(Ranked(7, 4), Ranked(7, 0, corpus=other)).search(["q"], 4)
    assert [passage.id for passage in found] == ["p7", "p0", "p4"]


def test_a_copy_of_the_corpus_is_the_same_corpus() -> None:
    (found,) = hybrid(Ranked(7), Ranked(2, corpus=list(CORPUS))).search(["q"], 2)
    assert [passage.id for passage in found] == ["p2", "p7"]


def test_a_failure_is_of_one_query() -> None:
    results = hybrid(Ranked(0), Service("x")).search(["good", "bad", "good"], 2)
    assert isinstance(results[1], RetrieverError)
    assert [[passage.id for passage in results[place]] for place in (0, 2)] == [["p0", "x"]] * 2


def test_a_passage_that_is_listed_twice_counts_once() -> None:
    (found,) = hybrid(Service("a", "b", "b", "c"), Service("a", "b")).search(["q"], 3)
    assert [passage.id for passage in found] == ["a", "b", "c"]
    assert [passage.score for passage in found] == pytest.approx([2 / 61, 2 / 62, 1 / 63], abs=1e-11)


def test_depth() -> None:
    shallow = hybrid(Ranked(0, 1, 2, 3), Ranked(4, 3), depth=2)
    assert [passage.id for passage in shallow.search(["q"], 2)[0]] == ["p0", "p4"]
    assert shallow.search(["q"], 4)[0][0].id == "p3"


def test_repeated_queries_are_searched_once() -> None:
    parts = Ranked(0), Ranked(1)
    joined = hybrid(*parts)
    assert len(joined.search(["a", "b", "a", "a"], 1)) == 4
    assert [part.asked for part in parts] == [["a", "b"]] * 2
    results = parts[0].search(["c", "c"], 1)
    results[0].clear()
    assert results[1]
    assert parts[0].asked == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retrievers": ["bm25"]}, "hybrid needs two or more retrievers, got"),
        ({"retrievers": ["bm25", 5]}, "hybrid needs a retriever: .* got 5"),
        ({"depth": 0}, "depth must be an integer of at least 1, got 0"),
        ({"rank_constant": 0}, "rank_constant must be an integer of at least 1, got 0"),
    ],
)
def test_hybrid_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        RETRIEVERS.build({"name": "hybrid", **settings}, corpus=CORPUS)


def test_fingerprints() -> None:
    whole = hybrid(Ranked(0), Ranked(1)).fingerprint
    assert whole == hybrid(Ranked(0), Ranked(1)).fingerprint
    others = [hybrid(Ranked(0), Ranked(2)), hybrid(Ranked(0), Ranked(1), depth=5), hybrid(Ranked(1), Ranked(0))]
    assert len({whole, *(other.fingerprint for other in others)}) == 4
    assert hybrid(Ranked(0), Service("x")).fingerprint is None
    assert Ranked(0).fingerprint != Ranked(0, corpus=CORPUS[1:]).fingerprint


# Reranking


@pytest.fixture(scope="module", params=[1, 2])
def cross_encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random classifier of pairs with one or two labels."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: place for place, word in enumerate(["[PAD]", "[UNK]", "q", "passage", *map(str, range(8))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = str(tmp_path_factory.mktemp("cross"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", model_input_names=["input_ids", "attention_mask"]
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=len(words), num_labels=request.param, initializer_range=0.5, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def rerank(model: str, behind: Any, **settings: Any) -> Any:
    spec = {"name": "rerank", "model": model, "retriever": behind, "device": "cpu", "batch_size": 3, **settings}
    return RETRIEVERS.build(spec, corpus=CORPUS)


def test_rerank_by_the_model_alone(cross_encoder: str) -> None:
    import torch
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(cross_encoder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(cross_encoder)
    expected = {}
    for query in ("q", "q 5 3"):
        for passage in CORPUS:
            with torch.no_grad():
                logits = model(**tokenizer(query, passage.contents, return_tensors="pt")).logits[0].tolist()
            expected[query, passage.id] = logits[0] if len(logits) == 1 else logits[1] - logits[0]
    results = rerank(cross_encoder, Ranked(*range(8))).search(["q", "q 5 3", "q"], 5)
    assert results[2] == results[0]
    for query, found in zip(("q", "q 5 3"), results[:2], strict=True):
        best = sorted(CORPUS, key=lambda passage: -expected[query, passage.id])[:5]
        assert [passage.id for passage in found] == [passage.id for passage in best]
        assert [passage.score for passage in found] == pytest.approx([expected[query, p.id] for p in best], abs=1e-4)


def test_rerank_keeps_the_order_of_equals(cross_encoder: str) -> None:
    same = tuple(Passage(f"p{row}", "passage") for row in range(8))
    (found,) = rerank(cross_encoder, Ranked(5, 2, 7, corpus=same)).search(["q"], 3)
    assert [passage.id for passage in found] == ["p5", "p2", "p7"]


def test_rerank_depth_failures_and_nothing_found(cross_encoder: str) -> None:
    behind = Ranked(*range(8))
    found = rerank(cross_encoder, behind, depth=2).search(["q", "q"], 1)
    assert behind.asked == ["q"]
    assert found[0][0].id in ("p0", "p1")
    assert rerank(cross_encoder, Ranked()).search(["q", "\ud800"], 3) == [[], []]
    assert rerank(cross_encoder, Ranked()).search([], 3) == []
    results = rerank(cross_encoder, Service("x", "y")).search(["bad", "q"], 3)
    assert isinstance(results[0], RetrieverError)
    assert {passage.id for passage in results[1]} == {"x", "y"}


def test_rerank_fails_for_the_query_whose_score_is_not_finite(cross_encoder: str) -> None:
    def broken(*rows: int) -> Any:
        """It gives NaN for every pair with the word 7."""
        retriever = rerank(cross_encoder, Ranked(*rows))
        retriever._model.get_input_embeddings().weight.data[11] = float("nan")
        return retriever

    expected = rerank(cross_encoder, Ranked(0, 1, 2)).search(["q", "q 3"], 3)
    first, bad, last = broken(0, 1, 2).search(["q", "q 7", "q 3"], 3)
    assert [first, last] == expected
    assert isinstance(bad, RetrieverError)
    assert "NaN or infinity for the query 'q 7'; try dtype=float32" in str(bad)
    assert isinstance(broken(0, 7, 1).search(["q"], 1)[0], RetrieverError)


def test_rerank_in_the_registry_and_its_fingerprint(cross_encoder: str) -> None:
    one, two = rerank(cross_encoder, "bm25"), rerank(cross_encoder, "bm25", depth=9)
    assert {passage.id for passage in one.search(["passage 3"], 8)[0]} == {passage.id for passage in CORPUS}
    assert one.fingerprint == rerank(cross_encoder, "bm25", batch_size=1).fingerprint != two.fingerprint
    assert rerank(cross_encoder, Service("x")).fingerprint is None


def test_rerank_models_that_cannot_work(tmp_path: Path, cross_encoder: str) -> None:
    import transformers

    with pytest.raises(ConfigurationError, match="cannot be loaded; give a folder made by save_pretrained"):
        rerank(str(tmp_path / "none"), "bm25")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.AutoTokenizer.from_pretrained(cross_encoder).save_pretrained(tmp_path)
    transformers.BertModel(transformers.BertConfig(vocab_size=12, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"needs a cross-encoder .* of its weights [1-9]\d* are missing"):
        rerank(str(tmp_path), "bm25")
    for setting, said in (({"depth": 0}, "depth must be an integer"), ({"dtype": "int8"}, "dtype must be one of")):
        with pytest.raises(ConfigurationError, match=f"retriever 'rerank': {said}"):
            rerank(cross_encoder, "bm25", **setting)


@pytest.mark.parametrize(("kind", "rows"), [("Bert", 64), ("Roberta", 66)])
def test_no_more_tokens_than_the_model_can_read(tmp_path: Path, cross_encoder: str, kind: str, rows: int) -> None:
    """RoBERTa counts positions from 2 on, so 66 rows are 64 positions."""
    import transformers

    shutil.copytree(cross_encoder, tmp_path / "model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=12, num_labels=1, max_position_embeddings=rows, pad_token_id=1, **sizes
    )
    getattr(transformers, f"{kind}ForSequenceClassification")(config).save_pretrained(tmp_path / "model")
    long = (Passage("long", "passage " * 500), *CORPUS[1:])
    model, behind = str(tmp_path / "model"), Ranked(0, 1, corpus=long)
    for allowed in ({}, {"max_length": 64}):
        assert len(rerank(model, behind, **allowed).search(["q"], 2)[0]) == 2
    with pytest.raises(ConfigurationError, match=r"rerank max_length=65, but .* has 64 positions; lower it"):
        rerank(model, behind, max_length=65)


class Counting:
    """A retriever that counts its searches and how often it was prepared."""

    def __init__(self) -> None:
        self.searches = self.prepared = 0

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        self.searches += len(queries)
        return [[Passage("a", "amber", 1.0)] for _ in queries]

    def stats(self) -> dict[str, int]:
        return {"searches": self.searches}

    def prepare(self) -> None:
        self.prepared += 1


@pytest.mark.parametrize("name", ["hybrid", "sharded", "cached", "faulty"])
def test_counts_and_preparation_reach_through(name: str) -> None:
    parts = [Counting(), Counting()] if name in ("hybrid", "sharded") else [Counting()]
    settings: dict[str, Any] = {
        "hybrid": {"retrievers": parts},
        "sharded": {"shards": parts},
        "cached": {"retriever": parts[0], "fingerprint": "mine"},
        "faulty": {"retriever": parts[0]},
    }[name]
    retriever = RETRIEVERS.build({"name": name, **settings}, corpus=None)
    retriever.search(["q", "r"], 1)
    assert retriever.stats()["searches"] == 2 * len(parts)
    retriever.prepare()
    assert [part.prepared for part in parts] == [1] * len(parts)
