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
from agentic_rag_env.retrievers.vectors.usage import POOLINGS, PRESETS, Usage, resolve
from agentic_rag_env.settings import COUNT, TEXT, check_settings, one_of, or_none

#: The settings that decide the vectors and are kept with an index, in the order of `Usage`.
_OF_INDEX = ("pooling", "normalize", "query_prefix", "passage_prefix", "max_length")


@dataclass
class HuggingFaceConfig:
    """Settings of an encoder of Hugging Face transformers.

    A folder or hub id of sentence-transformers says itself how it is used. What is None below is taken from there, then
    from the preset. A pooling that contradicts them is refused.

    Attributes:
        model: Folder or hub id, such as `intfloat/e5-base-v2`.
        preset: Family whose pooling, prefixes and length are used: `e5`, `bge`, `minilm` or `gte`. None: that of a
            well-known hub id, or of a folder with its name for which nobody names a prefix; else none.
        pooling: `mean` or `max` over the tokens, `cls` for the first token, `last` for the last one. None: as the
            folder or the preset says; a model of which neither says it is refused.
        normalize: Whether passages are scaled to length 1. None: as the folder says, else true.
        query_prefix: Text put before each query. None: the folder's prompt, or the preset's, or no text.
        passage_prefix: Text put before each passage. None: as for queries.
        max_length: Most tokens kept of each text, prefix included. None: as the folder or the preset says, else 512.
        batch_size: Number of texts encoded at once.
        device: Device of the model, such as `cpu` or `cuda:0`; None chooses a GPU if there is one.
        dtype: `float32`, `float16` or `bfloat16`; None chooses bfloat16 on a GPU and float32 elsewhere.
    """

    model: str
    preset: str | None = None
    pooling: str | None = None
    normalize: bool | None = None
    query_prefix: str | None = None
    passage_prefix: str | None = None
    max_length: int | None = None
    batch_size: int = 64
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        check_settings(self, or_none(one_of(PRESETS)), "preset")
        check_settings(self, or_none(one_of(POOLINGS)), "pooling")
        check_settings(self, or_none(one_of(DTYPES)), "dtype")
        check_settings(self, or_none(COUNT), "max_length")
        check_settings(self, TEXT, "model")
        check_settings(self, COUNT, "batch_size")


@ENCODERS.register("huggingface", HuggingFaceConfig)
class HuggingFaceEncoder:
    """Encodes with the last hidden states of a transformer, pooled and scaled as the model was trained for.

    Queries are always scaled to length 1, which changes no ranking. Passages keep their lengths where relevance is the
    inner product (`normalize=false`).

    Args:
        config: The model and how to use it.

    Raises:
        ConfigurationError: A setting is out of range or contradicts the folder, torch or transformers is missing, or
            the model cannot be loaded or used as its folder says, or gives no hidden states for tokens alone (T5).

    Attributes:
        usage: How texts become vectors, complete.
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
        given = Usage(*(getattr(config, name) for name in _OF_INDEX))
        self.usage = resolve(config.model, config.preset, given, loaded.positions)
        self._weights_hash = hash_of_weights(model.state_dict(), loaded.missing)
        self._vocabulary_hash = hash_of(self._tokenizer.get_vocab())
        self.precision = str(loaded.dtype)
        self._model: Any = model.to(self._device, loaded.dtype).eval()
        self._dim = self._width()

    @property
    def fingerprint(self) -> str:
        """See `StoredEncoder`. It does not depend on where the model lies."""
        settings = {key: value for key, value in self.settings().items() if key != "model"}
        lower_case = ["lower case"] if self.usage.lower_case else []
        return hash_of([settings, self._weights_hash, self._vocabulary_hash, *lower_case])

    def settings(self) -> dict[str, Any]:
        """See `StoredEncoder`. Scaling is left out where it is the usual one, since older indexes lack it."""
        kept = {name: getattr(self.usage, name) for name in _OF_INDEX}
        if kept["normalize"]:
            del kept["normalize"]
        return {"name": "huggingface", "model": self.config.model, **kept}

    def state(self) -> dict[str, Any]:
        """See `StoredEncoder`."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `StoredEncoder`."""

    def fit(self, passages: Sequence[str]) -> None:
        """Do nothing, because the model is pretrained."""

    def encode_passages(self, passages: Sequence[str]) -> NDArray[np.float32]:
        """See `Encoder`."""
        return self._encode(passages, self.usage.passage_prefix, scaled=self.usage.normalize)

    def encode_queries(self, queries: Sequence[str]) -> NDArray[np.float32]:
        """See `Encoder`."""
        return self._encode(queries, self.usage.query_prefix, scaled=True)

    def _encode(self, given: Sequence[str], prefix: str | None, *, scaled: bool | None) -> NDArray[np.float32]:
        texts = [f"{prefix or ''}{encodable(text)}" for text in given]
        if self.usage.lower_case:
            texts = [text.lower() for text in texts]
        rows = np.zeros((len(texts), self._dim), np.float32)
        span = 64 * self.config.batch_size
        for first in range(0, len(texts), span):
            part = texts[first : first + span]
            ids = self._tokenizer(part, truncation=True, max_length=self.usage.max_length)["input_ids"]
            # Texts of similar length share a batch, so that little is spent on padding; a text may have no token.
            order = sorted((index for index in range(len(ids)) if ids[index]), key=lambda index: len(ids[index]))
            for start in range(0, len(order), self.config.batch_size):
                chosen = order[start : start + self.config.batch_size]
                rows[[first + index for index in chosen]] = self._pool([ids[index] for index in chosen])
        if scaled:
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return rows

    def _width(self) -> int:
        """Width of the vectors. A text tells, since the `hidden_size` of a model may be another one or missing."""
        try:
            return self._pool([[0]]).shape[1]
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"encoder {self.config.model!r} is a {type(self._model).__name__}, which gives no hidden states for "
                f"tokens alone ({error}). Give an encoder such as E5 or BGE, or a decoder such as Qwen2; a model that "
                "has an encoder and a decoder, such as T5, is neither."
            ) from error

    def _pool(self, token_ids: list[list[int]]) -> NDArray[np.float32]:
        """One vector per list of tokens, [n, dim]; the lists are in the order of their lengths."""
        import torch

        with torch.inference_mode():
            padded = torch.zeros(len(token_ids), len(token_ids[-1]), dtype=torch.long)
            mask = torch.zeros_like(padded)
            for row, ids in enumerate(token_ids):
                padded[row, : len(ids)] = torch.tensor(ids)
                mask[row, : len(ids)] = 1
            padded, mask = padded.to(self._device), mask.to(self._device)
            hidden = self._model(input_ids=padded, attention_mask=mask).last_hidden_state.float()
            return self._pooled(hidden, mask).cpu().numpy()

    def _pooled(self, hidden: Any, mask: Any) -> Any:
        """Vectors [n, dim] of hidden states [n, length, dim] with their mask [n, length], which pads at the right."""
        if self.usage.pooling == "cls":
            return hidden[:, 0]
        if self.usage.pooling == "last":
            return hidden[range(len(hidden)), mask.sum(1) - 1]
        weight = mask.unsqueeze(-1)
        if self.usage.pooling == "max":
            return hidden.masked_fill(weight == 0, float("-inf")).amax(1)
        return (hidden * weight).sum(1) / weight.sum(1)
