"""Text encoders of Hugging Face transformers, such as E5 and BGE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.retrievers.base import encodable, hash_of
from agentic_rag_env.retrievers.vectors.encoders import DTYPES, ENCODERS
from agentic_rag_env.retrievers.vectors.transformer import hash_of_weights, load_pretrained
from agentic_rag_env.settings import COUNT, check_settings, one_of, or_none


@dataclass
class HuggingFaceConfig:
    """Settings of an encoder of Hugging Face transformers; the defaults are those of E5 as Search-R1 uses it.

    Attributes:
        model: Folder or hub id, such as `intfloat/e5-base-v2`.
        pooling: `mean` over the tokens, or `cls` for the first token.
        query_prefix: Text put before each query.
        passage_prefix: Text put before each passage.
        max_length: Most tokens kept of each text, prefix included.
        batch_size: Number of texts encoded at once.
        device: Device of the model, such as `cpu` or `cuda:0`; None chooses a GPU if there is one.
        dtype: `float32`, `float16` or `bfloat16`; None chooses bfloat16 on a GPU and float32 elsewhere.
    """

    model: str
    pooling: str = "mean"
    query_prefix: str = "query: "
    passage_prefix: str = "passage: "
    max_length: int = 256
    batch_size: int = 64
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        check_settings(self, one_of(["mean", "cls"]), "pooling")
        check_settings(self, or_none(one_of(DTYPES)), "dtype")
        check_settings(self, COUNT, "max_length", "batch_size")


@ENCODERS.register("huggingface", HuggingFaceConfig)
class HuggingFaceEncoder:
    """Encodes with the last hidden states of a transformer, pooled and scaled to length 1.

    Args:
        config: The model and how to use it.

    Raises:
        ConfigurationError: A setting is out of range, torch or transformers is missing, or the model cannot be loaded.

    Attributes:
        precision: Precision in which the vectors are computed, such as `torch.float32`.
    """

    def __init__(self, config: HuggingFaceConfig) -> None:
        self.config = config
        loaded = load_pretrained(
            "AutoModel",
            config.model,
            config.device,
            config.dtype,
            user="encoder",
            without_libraries=f"encoder {config.model!r} needs torch and transformers "
            "(pip install torch transformers); encoder=hashed_ngram needs neither.",
        )
        model, self._tokenizer, self._device = loaded.model, loaded.tokenizer, loaded.device
        longest = getattr(model.config, "max_position_embeddings", config.max_length)
        if config.max_length > longest:
            raise ConfigurationError(
                f"encoder max_length={config.max_length}, but {config.model!r} has {longest} positions; lower it."
            )
        self._weights_hash = hash_of_weights(model.state_dict(), loaded.missing)
        self._vocabulary_hash = hash_of(self._tokenizer.get_vocab())
        self.precision = str(loaded.dtype)
        self._model: Any = model.to(self._device, loaded.dtype).eval()

    @property
    def fingerprint(self) -> str:
        """See `StoredEncoder`. It does not depend on where the model lies."""
        settings = {key: value for key, value in self.settings().items() if key != "model"}
        return hash_of([settings, self._weights_hash, self._vocabulary_hash])

    def settings(self) -> dict[str, Any]:
        """See `StoredEncoder`."""
        kept = ("model", "pooling", "query_prefix", "passage_prefix", "max_length")
        return {"name": "huggingface", **{name: getattr(self.config, name) for name in kept}}

    def state(self) -> dict[str, Any]:
        """See `StoredEncoder`."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `StoredEncoder`."""

    def fit(self, passages: Sequence[str]) -> None:
        """Do nothing, because the model is pretrained."""

    def encode_passages(self, passages: Sequence[str]) -> NDArray[np.float32]:
        """See `Encoder`."""
        return self._encode([self.config.passage_prefix + encodable(text) for text in passages])

    def encode_queries(self, queries: Sequence[str]) -> NDArray[np.float32]:
        """See `Encoder`."""
        return self._encode([self.config.query_prefix + encodable(text) for text in queries])

    def _encode(self, texts: list[str]) -> NDArray[np.float32]:
        rows = np.zeros((len(texts), self._model.config.hidden_size), np.float32)
        span = 64 * self.config.batch_size
        for first in range(0, len(texts), span):
            part = texts[first : first + span]
            ids = self._tokenizer(part, truncation=True, max_length=self.config.max_length)["input_ids"]
            # Texts of similar length share a batch, so that little is spent on padding; a text may have no token.
            order = sorted((index for index in range(len(ids)) if ids[index]), key=lambda index: len(ids[index]))
            for start in range(0, len(order), self.config.batch_size):
                chosen = order[start : start + self.config.batch_size]
                rows[[first + index for index in chosen]] = self._pool([ids[index] for index in chosen])
        return rows

    def _pool(self, token_ids: list[list[int]]) -> NDArray[np.float32]:
        """One vector of length 1 per list of tokens, [n, dim]."""
        import torch

        with torch.inference_mode():
            padded = torch.zeros(len(token_ids), len(token_ids[-1]), dtype=torch.long)
            mask = torch.zeros_like(padded)
            for row, ids in enumerate(token_ids):
                padded[row, : len(ids)] = torch.tensor(ids)
                mask[row, : len(ids)] = 1
            padded, mask = padded.to(self._device), mask.to(self._device)
            hidden = self._model(input_ids=padded, attention_mask=mask).last_hidden_state.float()
            if self.config.pooling == "cls":
                pooled = hidden[:, 0]
            else:
                weight = mask.unsqueeze(-1).float()
                pooled = (hidden * weight).sum(1) / weight.sum(1)
            return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()
