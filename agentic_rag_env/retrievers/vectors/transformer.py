"""Loads the models of Hugging Face transformers with which a retriever reads texts, and tells them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

from agentic_rag_env.errors import ConfigurationError, required_library
from agentic_rag_env.weight_files import require_own_weights


class Pretrained(NamedTuple):
    """A model on the CPU in the precision of its file, so that a hash of it does not depend on where it is used.

    Attributes:
        tokenizer, model: The objects of transformers.
        missing: Names of the weights that are not in the file and therefore random.
        device, dtype: Where and in which precision the model is to be used.
        positions: Most tokens that the model can read; None if it has no bound.
    """

    tokenizer: Any
    model: Any
    missing: Set[str]
    device: Any
    dtype: Any
    positions: int | None


def load_pretrained(
    auto_class: str, model: str, device: str | None, dtype: str | None, *, user: str, without_libraries: str
) -> Pretrained:
    """Load a model and its tokenizer; code that comes with a model is never executed.

    Args:
        auto_class: Name of the class of transformers that makes the model.
        model: Folder or hub id.
        device: Device of the model, such as `cpu` or `cuda:0`; None chooses a GPU if there is one.
        dtype: `float32`, `float16` or `bfloat16`; None chooses bfloat16 on a GPU and float32 elsewhere.
        user: The part that needs it, for errors.
        without_libraries: Error where torch or transformers is missing.

    Raises:
        ConfigurationError: torch or transformers is missing, or the model cannot be loaded.
    """
    with required_library(without_libraries):
        import torch
        import transformers
    place = fixed_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = getattr(torch, dtype or ("bfloat16" if place.type == "cuda" else "float32"))
    try:
        require_own_weights(model)
        # A model's own code is never executed, nor a pickle read; left unset, the library would ask at the terminal.
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        loaded, loading = getattr(transformers, auto_class).from_pretrained(
            model, dtype="auto", output_loading_info=True, use_safetensors=True, trust_remote_code=False
        )
        width = loaded.get_input_embeddings().weight.shape[0]
    except ConfigurationError as error:
        raise ConfigurationError(f"{user} model {model!r} cannot be used. {error}") from error
    except (OSError, ValueError, NotImplementedError) as error:
        raise ConfigurationError(
            f"{user} model {model!r} cannot be loaded; give a folder made by save_pretrained or a hub id. {error}"
        ) from error
    token, last = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if last >= width:
        raise ConfigurationError(
            f"{user} model {model!r}: its tokenizer has ids up to {last} ({token!r}), but its embedding has "
            f"only {width} rows. Call model.resize_token_embeddings(len(tokenizer)) and save both, or take it out."
        )
    return Pretrained(tokenizer, loaded, set(loading["missing_keys"]), place, precision, _positions(loaded))


def fixed_device(name: str) -> Any:
    """The device of this name. "cuda" is the present GPU of this thread; threads begun later start on the first one."""
    import torch

    place = torch.device(name)
    is_open = place.type == "cuda" and place.index is None and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if is_open else place


def _positions(model: Any) -> int | None:
    rows = getattr(model.config, "max_position_embeddings", None)
    embeddings = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    # RoBERTa and its kin begin to count positions after the one of padding.
    padding = getattr(next(embeddings, None), "padding_idx", None)
    return rows if rows is None or padding is None else rows - padding - 1


def hash_of_weights(weights: Mapping[str, Any], without: Set[str] = frozenset()) -> str:
    """Hash of named tensors without those that were not in the file and are therefore random."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights.keys() - without):
        tensor = weights[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
