"""Checks where the weights of a Hugging Face model are, before transformers reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.files import read_object

#: Says which of several files holds which weight.
WEIGHT_INDEX = "model.safetensors.index.json"
_SAFE_NAME = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)
_MAX_BYTES = 2**26


def require_own_weights(model: str) -> None:
    """Make sure that the files of a model lead to safetensors files beside them, and nowhere else.

    transformers opens what they name as it stands, whether it lies in another folder or is a pickle.

    Args:
        model: Folder or hub id.

    Raises:
        ConfigurationError: The model is an adapter; or a file names weights that are no safetensors file beside it, or
            is damaged.
        OSError: The hub does not have the model or can't be reached, and there is no copy here.
    """
    if _find(model, "adapter_config.json") is not None:
        raise ConfigurationError(
            f"{model!r} holds an adapter (adapter_config.json), and a whole model is wanted here. The base model that "
            "it names is not looked up. Merge the two with peft (merge_and_unload, then save_pretrained)."
        )
    if (named := _read(model, "config.json").get("transformers_weights")) is not None:
        raise ConfigurationError(
            f"config.json of {model!r} names a file of its own for the weights (transformers_weights={named!r:.120}), "
            f"which is not followed. Take that entry out, and call the file model.safetensors, or {WEIGHT_INDEX} if it "
            "is an index."
        )
    index = _read(model, WEIGHT_INDEX)
    if index and not all(isinstance(index.get(part), dict) for part in ("metadata", "weight_map")):
        raise ConfigurationError(f"{WEIGHT_INDEX} of {model!r} is damaged: it lacks weight_map or metadata.")
    for name in index.get("weight_map", {}).values():
        if not isinstance(name, str) or not _SAFE_NAME.fullmatch(name):
            raise ConfigurationError(
                f"{WEIGHT_INDEX} of {model!r} names {name!r:.120}, which is no safetensors file beside it. Other "
                "folders and pickles are never read for a model. Save it with save_pretrained, and give that folder."
            )


def _read(model: str, name: str) -> dict[str, Any]:
    """The content of a file of a model; empty if there is none."""
    if (file := _find(model, name)) is None:
        return {}
    try:
        return read_object(file, _MAX_BYTES)
    except ValueError as error:
        raise ConfigurationError(f"{name} of {model!r} is damaged ({error}). Put the model's own file back.") from error


def _find(model: str, name: str) -> Path | None:
    from transformers.utils import cached_file

    optional = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    found = cached_file(model, name, **optional)
    return None if found is None else Path(found)
