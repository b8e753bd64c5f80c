"""Converts GGUF files, the format of llama.cpp, to folders that transformers can train from."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from agentic_rag_env.cache_folder import is_whole, seal_folder
from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.files import sha256


def hugging_face_folder(path: Path, cache_dir: Path) -> Path:
    """Return the folder of a GGUF file; it is made by the first call.

    Args:
        path: A GGUF file with a causal language model of a family that transformers reads, quantized or not.
        cache_dir: Holds such folders, named by the hash of the file, so that a moved file is not converted again.

    Returns:
        Its folder in the cache: weights in float32, configuration, tokenizer and chat template.

    Raises:
        ConfigurationError: There is no such file, or it can't be converted; see `convert`.
    """
    if not path.is_file():
        raise ConfigurationError(f"There is no file {path}; give the path of a .gguf file.")
    folder = cache_dir / f"{path.stem}-{sha256(path)[:16]}"
    if not is_whole(folder):
        if folder.exists():
            warnings.warn(f"{folder} is made again: it is not as it was made.", stacklevel=2)
            shutil.rmtree(folder)
        convert(path, folder)
    return folder


def convert(path: Path, folder: Path) -> None:
    """Write the weights of a GGUF file, dequantized to float32, and its tokenizer as a folder of transformers.

    transformers reads the file with the packages gguf and accelerate. This takes about 10 bytes of memory for
    each parameter.

    Args:
        path: The GGUF file.
        folder: Appears whole or not at all. It must not exist, unless another process makes it meanwhile.

    Raises:
        ConfigurationError: A package is missing, the file is damaged, or model or tokenizer are of an unknown kind.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        # The file lies alone in a folder: transformers would also read files beside it, perhaps of another model.
        alone, partial = Path(temporary) / "file" / "model.gguf", Path(temporary) / "folder"
        alone.parent.mkdir()
        alone.symlink_to(path.resolve())
        # The user gets the same message whatever error a damaged or unknown file causes in the readers.
        try:
            tokenizer, model = _read(alone)
        except ImportError as error:
            raise ConfigurationError(
                f"{path} can't be read without the packages gguf and accelerate: pip install 'agentic-rag-env[gguf]'. "
                f"({error})"
            ) from error
        except Exception as error:
            raise ConfigurationError(
                f"{path} can't be converted: {error} ({type(error).__name__}). Check that it is a whole GGUF file with "
                "a causal language model, such as Llama, Qwen2 or Mistral, or take a folder of transformers instead."
            ) from error
        tokenizer.save_pretrained(partial)
        model.save_pretrained(partial)
        seal_folder(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise


def _read(file: Path) -> tuple[Any, Any]:
    """Tokenizer and model of a GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    _mend_splitting(tokenizer, file)
    read: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        trust_remote_code=False,
        dtype=torch.float32,
        # transformers saves a model only if it counts as dequantized.
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    model, report = read
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"it lacks {len(missing)} of the model's weights, among them {missing[0]}.")
    return tokenizer, model


def _mend_splitting(tokenizer: Any, file: Path) -> None:
    """Make a byte-level tokenizer split text as it did when its merges were learned.

    The file names the rules. If transformers does not know them, it silently splits text like GPT-2.

    Raises:
        ValueError: The rules are unknown here too.
    """
    from gguf import GGUFReader
    from tokenizers import normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    rules = None if field is None else field.contents()
    if rules == "qwen2":
        backend.normalizer = normalizers.NFC()
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return
    if rules == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    elif rules != "gpt-2":
        raise ValueError(f"its tokenizer splits text by the rules {rules!r}, which can't be rebuilt from the file.")
