"""Search by embeddings: through FAISS, exact or approximate, or by matrix products in torch, on CPU or GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentic_rag_env.cache_folder import kept_or_none, sampled_blocks
from agentic_rag_env.corpus import Texts
from agentic_rag_env.errors import ConfigurationError, DataError, RetrieverError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import KEPT_FROM, CorpusRetriever, Ranking, hash_of
from agentic_rag_env.retrievers.index_folder import (
    ENCODER_STATE,
    FAISS_FILE,
    MANIFEST,
    VECTORS_FILE,
    corpus_of_index,
    load_vectors,
    read_json,
    read_manifest,
    write_json,
)
from agentic_rag_env.retrievers.vectors.encoders import (
    DTYPES,
    Encoder,
    StoredEncoder,
    build_encoder,
    encode_queries,
    encoder_of_index,
    first_not_finite,
)
from agentic_rag_env.retrievers.vectors.faiss_search import (
    faiss_has_gpus,
    faiss_search,
    flat_index,
    is_flat,
    read_index,
    vectors_of_flat,
)
from agentic_rag_env.retrievers.vectors.ranking import VectorSearch, nearest
from agentic_rag_env.retrievers.vectors.torch_search import TorchSearch
from agentic_rag_env.settings import COUNT, PLACE, check_settings, one_of, or_none
from agentic_rag_env.types import Passage

BACKENDS = ("auto", "faiss", "torch")
_KEPT_VECTORS = "vectors.npy"


@dataclass
class DenseConfig:
    """Settings of search by embeddings.

    Attributes:
        encoder: A registered name (`hashed_ngram`), a mapping with `name` and settings, the folder or hub id of a
            Hugging Face model (`intfloat/e5-base-v2`), a mapping with `model` and settings, or an encoder. None: the
            encoder of the index folder, or `hashed_ngram` without an index.
        index: Folder made by `agentic-rag-index dense`, or a FAISS file whose row numbers are those of the passages,
            such as the `e5_Flat.index` of Search-R1; a file needs `encoder` too. None: the passages are encoded. The
            vectors of 5,000 passages or more are made once for all processes, in the cache folder.
        corpus: File of the passages, instead of those of the dataset or the index folder.
        backend: `faiss` searches the index as it was built. `torch` searches all vectors, exactly, by matrix products.
            `auto` chooses FAISS, with three exceptions. It chooses torch, if installed, where FAISS is missing, where
            `device` names a GPU that FAISS cannot use, or where `dtype` is given.
        device: `cpu`; `cuda`, or `cuda:0,cuda:1` to hold a share on each. None: with FAISS the CPU, with torch a GPU if
            there is one. FAISS copies an index to GPUs as float16, and must have been built for them.
        nprobe: With FAISS, number of lists that an IVF index looks into; more lists find more and take longer. None:
            the number that the index was saved with.
        ef_search: With FAISS, number of candidates that an HNSW graph keeps during a search; more find more and take
            longer. None: the number that the index was saved with.
        dtype: With torch, precision in which vectors are held and candidates are found: `float32`, `float16` or
            `bfloat16`; None: the precision of the vectors on disk, float32 for those in memory. It decides memory and
            speed, not results, since candidates are scored again by the vectors themselves.
    """

    encoder: Any = None
    index: str | None = None
    corpus: str | None = None
    backend: str = "auto"
    device: str | None = None
    nprobe: int | None = None
    ef_search: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        check_settings(self, one_of(BACKENDS), "backend")
        check_settings(self, or_none(COUNT), "nprobe", "ef_search")
        check_settings(self, or_none(PLACE), "index", "corpus")
        check_settings(self, or_none(one_of(DTYPES)), "dtype")
        for name in ("nprobe", "ef_search"):
            if getattr(self, name) is not None and self.backend == "torch":
                raise ConfigurationError(f"dense {name} is a setting of backend=faiss; backend=torch searches exactly.")
        if self.dtype is not None and (self.backend == "faiss" or self.nprobe or self.ef_search):
            raise ConfigurationError(
                f"dense dtype={self.dtype} is a setting of backend=torch, which excludes backend=faiss, nprobe and "
                "ef_search; leave one or the other."
            )

    def chosen_backend(self) -> str:
        """The backend `faiss` or `torch` that `backend` names, or that `auto` chooses on this machine."""
        if self.backend != "auto":
            return self.backend
        if self.nprobe or self.ef_search or find_spec("torch") is None:
            return "faiss"
        on_gpu = self.device not in (None, "cpu")
        fits = faiss_has_gpus() if on_gpu else find_spec("faiss") is not None
        return "faiss" if fits and self.dtype is None else "torch"


@RETRIEVERS.register("dense", DenseConfig)
class DenseRetriever(CorpusRetriever):
    """Encodes queries and ranks passages by inner products.

    In memory, vectors take 4 bytes x dim x passages. On the CPU, an index stays on disk, memory-mapped. With torch, its
    vectors stay on disk too, unless another `dtype` is asked for. Exact searches rank the same with both backends.

    Args:
        config: Encoder, index and how to search it.
        corpus: The passages; their order decides ties. None: those of the index folder.

    Raises:
        ConfigurationError: There is no corpus or no encoder, the encoder gives numbers that are not finite, a library
            or a device is missing, or the index has no such parameter.
        DataError: The index is incomplete, keeps no vectors where torch needs them, is no FAISS index of inner
            products, or was built from another corpus or with another encoder.
    """

    def __init__(self, config: DenseConfig, corpus: Sequence[Passage] | None = None) -> None:
        self.config, self._given = config, corpus
        self._backend = config.chosen_backend()
        self._index_path = None if config.index is None else Path(config.index).expanduser()
        self._manifest: dict[str, Any] | None = None
        if self._index_path is not None and not self._index_path.exists():
            raise DataError(f"{config.index}: there is no such index; build one with agentic-rag-index dense.")
        if self._index_path is not None and self._index_path.is_dir():
            self._manifest = read_manifest(self._index_path, "dense")
        self.corpus = corpus_of_index("dense", config.corpus, corpus, self._manifest)
        self._encoder = self._make_encoder()
        self._search = self._in_memory() if self._index_path is None else self._on_disk(self._index_path)
        self._check_sizes()

    def __reduce__(self) -> str | tuple[Any, ...]:
        # A copy of the object opens the same files.
        return (DenseRetriever, (self.config, self._given)) if self._index_path else super().__reduce__()

    def rank(self, queries: Sequence[str], top_k: int) -> list[Ranking | RetrieverError]:
        """See `CorpusRetriever.rank`.

        A query without features (no letter or digit, for n-grams) matches nothing. One for which the encoder gives
        numbers that are not finite fails.
        """
        embeddings, failed = encode_queries(self._encoder, queries)
        if embeddings.shape[1] != self._search.dim:
            raise self._wrong_dim(embeddings.shape[1])
        found: list[Ranking | RetrieverError] = [failed.get(place, []) for place in range(len(queries))]
        searched = np.flatnonzero(embeddings.any(axis=1))
        for place, best in zip(searched, nearest(self._search, embeddings[searched], top_k), strict=True):
            found[place] = best
        return found

    def prepare(self) -> None:
        """Load what the first search for many queries needs; a server does so before it listens."""
        getattr(self._search, "prepare", lambda: None)()

    def _identity(self) -> dict[str, Any] | None:
        if not isinstance(self._encoder, StoredEncoder):
            return None
        return {"encoder": self._encoder.fingerprint, **self._search_identity()}

    def _search_identity(self) -> dict[str, Any]:
        """The settings that results depend on beside passages and encoder."""
        vectors = self._vectors_identity()
        if self._backend == "torch":
            return {"search": "exact", "vectors": vectors}
        index = None if self._index_path is None else [vectors]
        if index is not None and self._manifest is not None:
            index.append(self._manifest["index"])
        return {"search": "faiss", "index": index, "nprobe": self.config.nprobe, "ef_search": self.config.ef_search}

    def _vectors_identity(self) -> Any:
        """The identity of the vectors on disk, wherever they lie; None for vectors made in memory."""
        if self._manifest is not None:
            return self._manifest["vectors"]
        return None if self._index_path is None else _hash_of_blocks(self._index_path)

    def _make_encoder(self) -> Encoder:
        if self._manifest is not None:
            return encoder_of_index(self._manifest, self.config.encoder)
        if self._index_path is not None and self.config.encoder is None:
            raise ConfigurationError(
                f"the index {self._index_path} does not say which encoder made it; give one, such as "
                "encoder=intfloat/e5-base-v2."
            )
        return build_encoder(self.config.encoder or "hashed_ngram")

    def _in_memory(self) -> VectorSearch:
        vectors = self._kept_vectors() if len(self.corpus) >= KEPT_FROM else None
        if vectors is None:
            vectors = self._encoded()
        return self._by_torch(vectors) if self._backend == "torch" else self._by_faiss(flat_index(vectors))

    def _encoded(self) -> NDArray[np.float32]:
        texts = Texts(self.corpus)
        self._encoder.fit(texts)
        vectors = np.ascontiguousarray(self._encoder.encode_passages(texts), np.float32)
        if (bad := first_not_finite(vectors)) is not None:
            raise ConfigurationError(
                f"the encoder of retriever 'dense' gives NaN or infinity for passage {self.corpus[bad].id!r}; "
                "try dtype=float32 for the encoder."
            )
        return vectors

    def _kept_vectors(self) -> NDArray[np.float32] | None:
        """The vectors from the cache folder, with what the encoder has learned; None if they cannot be kept there."""
        encoder = self._encoder
        if not isinstance(encoder, StoredEncoder):
            return None

        def make(folder: Path) -> None:
            np.save(folder / _KEPT_VECTORS, self._encoded())
            write_json(folder / ENCODER_STATE, {"state": encoder.state()})

        key = hash_of([self.fingerprint_of_corpus, encoder.fingerprint, getattr(encoder, "precision", "float32")])
        folder = kept_or_none("vectors", key, make, f"the vectors of {len(self.corpus):,} passages")
        if folder is None:
            return None
        encoder.load_state(read_json(folder / ENCODER_STATE)["state"])
        return np.load(folder / _KEPT_VECTORS, mmap_mode="r")

    def _on_disk(self, path: Path) -> VectorSearch:
        if self._backend == "torch":
            return self._by_torch(_stored_vectors(path))
        return self._by_faiss(read_index(path / FAISS_FILE if path.is_dir() else path))

    def _by_torch(self, vectors: NDArray[np.floating]) -> VectorSearch:
        return TorchSearch(vectors, self.config.device, self.config.dtype)

    def _by_faiss(self, index: Any) -> VectorSearch:
        config = self.config
        return faiss_search(index, device=config.device, nprobe=config.nprobe, ef_search=config.ef_search)

    def _check_sizes(self) -> None:
        if self._search.num_rows != len(self.corpus):
            raise DataError(
                f"the index {self.config.index} has {self._search.num_rows} rows, but the corpus has "
                f"{len(self.corpus)} passages; rows are passages, so give the corpus that it was built from."
            )
        if self._index_path is not None and self._manifest is None:
            dim = self._encoder.encode_queries(["dimension"]).shape[1]
            if dim != self._search.dim:
                raise self._wrong_dim(dim)

    def _wrong_dim(self, dim: int) -> DataError:
        return DataError(
            f"the index {self.config.index} holds vectors of {self._search.dim} numbers, but the encoder gives {dim}; "
            "give the encoder that it was built with."
        )


def _stored_vectors(path: Path) -> NDArray[np.floating]:
    """The vectors [n, dim] of an index folder or of a flat FAISS file, memory-mapped.

    Raises:
        DataError: They are missing or damaged, or the index of the file is not flat.
    """
    if path.is_dir():
        file = path / VECTORS_FILE
        if not file.exists():
            raise DataError(
                f"{file}: is missing. backend=faiss searches without it. To make it again, delete {path / MANIFEST} "
                "and give the same agentic-rag-index dense command as before."
            )
        return load_vectors(file, "give the same agentic-rag-index dense command as before, which makes it again")
    index = read_index(path)
    if not is_flat(index):
        raise DataError(f"{path}: backend=torch needs the vectors of a flat index, got {type(index).__name__}.")
    return vectors_of_flat(index)


def _hash_of_blocks(file: Path) -> str:
    """Hash of the size of a file and of `sampled_blocks`; a file of other embeddings differs in nearly every block."""
    return hash_of([file.stat().st_size, [block.hex() for block in sampled_blocks(file)]])


RETRIEVERS.replace("torch_exact", "'dense' with backend=torch")
