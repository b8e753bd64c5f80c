"""Defines the protocol of text encoders for dense search, makes them by name, and finds the encoder of an index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from agentic_rag_env.errors import ConfigurationError, DataError, RetrieverError
from agentic_rag_env.registry import Registry
from agentic_rag_env.retrievers.index_folder import ENCODER_STATE, read_json
from agentic_rag_env.terminal import printable

ENCODERS = Registry("encoder")
DTYPES = ("float32", "float16", "bfloat16")


@runtime_checkable
class Encoder(Protocol):
    """Turns texts into vectors whose inner product measures relevance."""

    def fit(self, passages: Sequence[str]) -> None:
        """Learn from the corpus before anything is encoded; a pretrained model does nothing.

        What is learned goes into new attributes: an object that was there before may belong to a copy of the encoder.
        """
        ...

    def encode_passages(self, passages: Sequence[str]) -> NDArray[np.float32]:
        """Passages as rows [n, dim], 0 where a text has no features; of length 1 if relevance is the cosine."""
        ...

    def encode_queries(self, queries: Sequence[str]) -> NDArray[np.float32]:
        """Queries as rows [n, dim] of length 1, or 0 where a text has no features."""
        ...


@runtime_checkable
class StoredEncoder(Encoder, Protocol):
    """An encoder that can build an index on disk: it tells its identity and hands over what it has learned."""

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides the vectors, weights included; device and precision don't count."""
        ...

    def settings(self) -> dict[str, Any]:
        """The settings from which `build_encoder` makes an equal encoder, on another machine too."""
        ...

    def state(self) -> dict[str, Any]:
        """The plain data that `fit` has learned."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what another encoder has learned, instead of `fit`."""
        ...


def build_encoder(spec: Any) -> Encoder:
    """Make an encoder from a registered name, a mapping with `name` or `model`, or a model's folder or hub id.

    An encoder is copied (not what it holds, such as a model), because each of those who use it lets it learn from a
    corpus of their own.

    Raises:
        UnknownNameError: The word is no registered name, no folder and no hub id.
        ConfigurationError: The settings do not fit.
    """
    if isinstance(spec, Mapping) and "name" not in spec and "model" in spec:
        spec = {"name": "huggingface", **spec}
    if isinstance(spec, str) and spec not in ENCODERS.names() and ("/" in spec or Path(spec).is_dir()):
        spec = {"name": "huggingface", "model": spec}
    encoder = ENCODERS.build(spec)
    return copy(encoder) if encoder is spec else encoder


def stored(encoder: Encoder, purpose: str) -> StoredEncoder:
    """The encoder, if what it has learned can be kept.

    Args:
        encoder: Any encoder.
        purpose: What it is to do, for the error.

    Raises:
        ConfigurationError: It is no `StoredEncoder`.
    """
    if not isinstance(encoder, StoredEncoder):
        raise ConfigurationError(
            f"encoder {type(encoder).__name__} cannot {purpose}: it lacks fingerprint, settings, state or load_state "
            "(see StoredEncoder)."
        )
    return encoder


def encoder_of_index(manifest: Mapping[str, Any], given: Any) -> Encoder:
    """The encoder that an index was built with.

    Args:
        manifest: Manifest of the index.
        given: An encoder, or settings for `build_encoder`, where the manifest's encoder lies elsewhere; or None.

    Raises:
        ConfigurationError: The encoder cannot be made.
        DataError: The encoder is not the one that the index was built with.
    """
    built_with = manifest["encoder"]
    model = built_with["settings"].get("model")
    if given is None and isinstance(model, str) and not Path(model).expanduser().exists():
        print(
            f"The encoder of {manifest['folder']}, {printable(model)}, is looked for on the Hugging Face hub.",
            flush=True,
        )
    asked = build_encoder(built_with["settings"] if given is None else given)
    encoder = stored(asked, f"be compared with that of the index {manifest['folder']}")
    encoder.load_state(read_json(Path(manifest["folder"]) / ENCODER_STATE)["state"])
    if encoder.fingerprint != built_with["fingerprint"]:
        raise DataError(
            f"{manifest['folder']}: was built with the encoder {built_with['fingerprint']} ({built_with['settings']}), "
            f"but the encoder given is {encoder.fingerprint} ({encoder.settings()}); give that encoder, or build the "
            "index again."
        )
    return encoder


def encode_queries(encoder: Encoder, queries: Sequence[str]) -> tuple[NDArray[np.float32], dict[int, RetrieverError]]:
    """Encode queries. One for which the encoder gives NaN or infinity fails alone.

    Args:
        encoder: The encoder.
        queries: At least one query.

    Returns:
        The vectors, [n, dim], with zeros for a query that fails; and the failures by the places of their queries.
    """
    vectors = np.array(encoder.encode_queries(queries), np.float32, order="C")
    failed = np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist()
    vectors[failed] = 0
    said = "the encoder gives NaN or infinity for the query"
    return vectors, {place: RetrieverError(f"{said} {queries[place][:80]!r}.") for place in failed}


def first_not_finite(vectors: NDArray[np.floating]) -> int | None:
    """The first row of [n, dim] that holds NaN or infinity, if any does."""
    finite = np.isfinite(vectors).all(axis=1)
    return None if finite.all() else int(np.argmin(finite))
