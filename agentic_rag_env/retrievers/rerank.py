"""Ranks the passages of another retriever anew, by a cross-encoder that reads query and passage together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import Wrapper, build_wrapped, encodable, hash_with, search_once
from agentic_rag_env.retrievers.vectors.encoders import DTYPES
from agentic_rag_env.retrievers.vectors.transformer import hash_of_weights, load_pretrained
from agentic_rag_env.settings import COUNT, TEXT, check_settings, one_of, or_none
from agentic_rag_env.types import Found, Passage

#: Scores are compared after rounding to this many decimals, because another batch changes a logit by some 1e-6.
_SCORE_DECIMALS = 4
#: Most tokens of a query and a passage together where nobody says it.
_MAX_LENGTH = 512


@dataclass
class RerankConfig:
    """Settings of reranking.

    Attributes:
        model: Folder or hub id of a sequence classifier of transformers with one or two labels, such as
            `cross-encoder/ms-marco-MiniLM-L6-v2` or `BAAI/bge-reranker-base`.
        retriever: The retriever whose passages are ranked anew: a name, a mapping with `name` and settings, or an
            object.
        depth: Number of passages taken from it; `top_k` if that is more.
        max_length: Most tokens kept of a query and a passage together. None: as many as the model can read, but at most
            512.
        batch_size: Number of pairs scored at once.
        device: Device of the model, such as `cpu` or `cuda:0`; None chooses a GPU if there is one.
        dtype: `float32`, `float16` or `bfloat16`; None chooses bfloat16 on a GPU and float32 elsewhere.
    """

    model: str
    retriever: Any = "bm25"
    depth: int = 50
    max_length: int | None = None
    batch_size: int = 64
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        check_settings(self, COUNT, "depth", "batch_size")
        check_settings(self, or_none(COUNT), "max_length")
        check_settings(self, TEXT, "model")
        check_settings(self, or_none(one_of(DTYPES)), "dtype")


@RETRIEVERS.register("rerank", RerankConfig)
class RerankRetriever(Wrapper):
    """Scores each passage by the logit of the model's one label, or by the log odds of the second of two.

    Equal scores stay in the order of the retriever behind.

    Args:
        config: Model and retriever.
        corpus: The passages for the retriever behind.

    Raises:
        ConfigurationError: torch or transformers is missing, the model cannot be loaded or used in this way, or it
            cannot read so many tokens.
    """

    def __init__(self, config: RerankConfig, corpus: Sequence[Passage] | None = None) -> None:
        self.config = config
        self._retriever = build_wrapped("rerank", config.retriever, corpus)
        self.parts = [self._retriever]
        loaded = load_pretrained(
            "AutoModelForSequenceClassification",
            config.model,
            config.device,
            config.dtype,
            user="rerank",
            without_libraries="retriever 'rerank' needs torch and transformers; pip install both.",
        )
        model, self._tokenizer, self._device = loaded.model, loaded.tokenizer, loaded.device
        if model.config.num_labels > 2 or loaded.missing:
            raise ConfigurationError(
                f"rerank needs a cross-encoder with a trained head of one or two labels; {config.model!r} has "
                f"{model.config.num_labels} labels, and of its weights {len(loaded.missing)} are missing."
            )
        if loaded.positions is not None and (config.max_length or 1) > loaded.positions:
            raise ConfigurationError(
                f"rerank max_length={config.max_length}, but {config.model!r} has {loaded.positions} positions; "
                "lower it."
            )
        self._max_length = config.max_length or min(_MAX_LENGTH, loaded.positions or _MAX_LENGTH)
        self._weights_hash = hash_of_weights(model.state_dict())
        self._model: Any = model.to(self._device, loaded.dtype).eval()

    @property
    def fingerprint(self) -> str | None:
        """Hash of all that results depend on; None if the retriever behind cannot tell what it is."""
        settings = "rerank", self._weights_hash, self.config.depth, self._max_length
        return hash_with([self._retriever], *settings)

    def search(self, queries: Sequence[str], top_k: int) -> list[Found]:
        """See `Retriever.search`. All pairs of all queries are scored in common batches.

        A query fails if the model gives NaN or infinity for one of its pairs.
        """
        return search_once(queries, top_k, lambda distinct: self._ranked(distinct, top_k))

    def _ranked(self, queries: list[str], top_k: int) -> list[Found]:
        found: list[Found] = list(self._retriever.search(queries, max(top_k, self.config.depth)))
        pairs = [
            (encodable(query), passage.contents)
            for query, passages in zip(queries, found, strict=True)
            if not isinstance(passages, RetrieverError)
            for passage in passages
        ]
        scores = iter(self._score(pairs))
        ranked: list[Found] = []
        for query, passages in zip(queries, found, strict=True):
            if isinstance(passages, RetrieverError):
                ranked.append(passages)
                continue
            scored = [replace(passage, score=next(scores)) for passage in passages]
            if not all(isfinite(passage.score) for passage in scored):
                said = f"the reranker {self.config.model!r} gives NaN or infinity for the query {query[:80]!r}"
                ranked.append(RetrieverError(f"{said}; try dtype=float32."))
                continue
            ranked.append(sorted(scored, key=lambda passage: -passage.score)[:top_k])
        return ranked

    def _score(self, pairs: list[tuple[str, str]]) -> list[float]:
        import torch

        # Pairs of similar length share a batch, so that little is spent on padding.
        order = sorted(range(len(pairs)), key=lambda index: sum(map(len, pairs[index])))
        scores = [0.0] * len(pairs)
        for first in range(0, len(order), self.config.batch_size):
            chosen = order[first : first + self.config.batch_size]
            inputs = self._tokenizer(
                [pairs[index][0] for index in chosen],
                [pairs[index][1] for index in chosen],
                truncation=True,
                max_length=self._max_length,
                padding=True,
                return_tensors="pt",
            ).to(self._device)
            with torch.inference_mode():
                logits = self._model(**inputs).logits.float()
            values = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
            for index, value in zip(chosen, values.tolist(), strict=True):
                scores[index] = round(value, _SCORE_DECIMALS)
        return scores
