"""Checks of a model folder or hub id before anything of it is loaded, because the model may be a stranger's."""

from __future__ import annotations

import difflib
import functools
from pathlib import Path

from agentic_rag_env.errors import ConfigurationError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_HUB_TIMEOUT_S = 10.0


def as_folder(path: str | Path) -> Path | None:
    """Return the path if it is meant as a folder, and None if it is a hub id: `name` or `owner/name`."""
    folder = Path(path).expanduser()
    text = str(path)
    looks_local = isinstance(path, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1
    # Where there is a folder `outputs`, `outputs/dgpo` is a misspelled folder and not a model of an owner `outputs`.
    looks_local = looks_local or ("/" in text and Path(text.partition("/")[0]).is_dir())
    return folder if looks_local or folder.exists() else None


def require_model(path: str | Path) -> None:
    """Make sure that there is a model, in a folder or on the hub.

    Raises:
        ConfigurationError: There is no such folder. Or the hub does not know the name or can't be reached.
    """
    folder = as_folder(path)
    if folder is None:
        _require_on_hub(str(path))
    elif not folder.is_dir():
        near = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        close = difflib.get_close_matches(folder.name, near, n=1)
        hint = f" Did you mean {str(folder.parent / close[0])!r}?" if close else ""
        raise ConfigurationError(f"There is no folder {str(path)!r}.{hint}")


def is_cached(name: str, *files: str) -> bool:
    """Whether the hub's cache on this machine has one of these files of a model."""
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def file_on_hub(name: str, file: str) -> Path | None:
    """Find a file of a model on the hub, or of its copy in the hub's cache; None if it has none.

    Raises:
        ConfigurationError: The hub does not know the name; or it can't be reached, and there is no copy of the model.
    """
    from transformers.utils import cached_file

    _require_on_hub(name)
    missing_is_none = {
        f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")
    }
    try:
        found = cached_file(name, file, **missing_is_none)
    except Exception as error:  # several libraries take part, each with errors of its own
        raise ConfigurationError(f"Cannot load {name!r}. {hint_for(name, error)}") from error
    return None if found is None else Path(found)


def has_tokenizer(path: str | Path) -> bool:
    """Whether a folder, or a model on the hub, holds a tokenizer."""
    folder = as_folder(path)
    if folder is None:
        return any(file_on_hub(str(path), name) for name in _TOKENIZER_FILES)
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def require_tokenizer(path: str | Path) -> None:
    """Make sure that a folder holds a tokenizer.

    Raises:
        ConfigurationError: It does not.
    """
    if as_folder(path) and not has_tokenizer(path):
        raise ConfigurationError(
            f"{str(path)!r} holds no tokenizer: none of {', '.join(_TOKENIZER_FILES)} is there. Copy these files "
            "from the model that the weights come from, or save them there with tokenizer.save_pretrained."
        )


def require_config(path: str | Path) -> None:
    """Make sure that a folder holds the settings of a model.

    Raises:
        ConfigurationError: It does not.
    """
    if (folder := as_folder(path)) and not (folder / "config.json").is_file():
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8])
        raise ConfigurationError(
            f"{str(path)!r} is no Hugging Face model: config.json is missing (found: {found or 'nothing'}). Give a "
            "folder written by save_pretrained, such as checkpoints/<step> of a run, or a hub id."
        )


def refuse_pickles(path: str | Path) -> None:
    """Make sure that the weights of a folder can be read without executing anything.

    Raises:
        ConfigurationError: The weights are only there as pickles.
    """
    folder = as_folder(path)
    if folder and not any(folder.glob("*.safetensors")) and (pickled := sorted(folder.glob("*.bin"))):
        raise ConfigurationError(
            f"{str(path)!r} holds its weights as a pickle only ({pickled[0].name}), and reading a pickle can execute "
            "what is in it, so it is never read. Take the model's safetensors files instead; or, if you trust the "
            "folder, convert it yourself: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(another)."
        )


def hint_for(path: str | Path, error: Exception) -> str:
    """Say what may be wrong when a model can't be loaded."""
    if "trust_remote_code" in str(error):
        return "It brings code of its own, which is never run; give a model of a family that transformers knows."
    if as_folder(path):
        return f"The files there are incomplete or of an unknown kind. ({error})"
    return (
        "It is neither a folder here nor reachable on the Hugging Face hub. Check the spelling and the network, or "
        f"download it once with `hf download` and give the folder. ({error})"
    )


@functools.cache  # which keeps no errors
def _require_on_hub(name: str) -> None:
    """Ask the hub once and report its answer. The loaders by themselves would try for most of a minute."""
    from huggingface_hub import HfApi

    try:
        if is_cached(name, "config.json", "adapter_config.json"):
            return
        print(f"{name} is no folder here; asking the Hugging Face hub for it.", flush=True)
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # several libraries take part, each with errors of its own
        raise ConfigurationError(f"Cannot load {name!r}. {hint_for(name, error)}") from error
