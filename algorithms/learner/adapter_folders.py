"""Adapter folders in the format of peft, read as data: what an adapter belongs to, and whether it is a plain LoRA.

The folder may be a stranger's. peft itself never sees a foreign configuration, because it would import modules and
match patterns that are named there. The base model counts if it is named by a hub id. A path counts only in a
checkpoint of a run directory, or where the caller gives the base.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.files import read_object
from algorithms.learner.model_folders import as_folder, file_on_hub
from algorithms.training.run_files import CONFIG_FILE

ADAPTER_FILE = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_MAX_BYTES, _MAX_RANK = 2**20, 2**14
_HUB_ID = re.compile(r"(?:[\w-][\w.-]{0,95}/)?[\w-][\w.-]{0,95}", re.ASCII)
#: Entries that change nothing in a trained LoRA, whatever they say: which layers have one is seen by the weights.
_WITHOUT_MEANING = frozenset(
    "peft_type task_type base_model_name_or_path r lora_alpha use_rslora revision bias init_lora_weights "
    "auto_mapping peft_version inference_mode target_modules exclude_modules layers_to_transform layers_pattern "
    "lora_dropout loftq_config eva_config megatron_core qalora_group_size ensure_weight_tying".split()
)


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA (arXiv:2106.09685): matrices A [r, in] and B [out, r] beside linear layers.

    Attributes:
        folder: Where its files are.
        base: The model that it belongs to, a folder or a hub id.
        rank: r.
        scale: The layer's weight has `scale * B @ A` added.
    """

    folder: Path
    base: str
    rank: int
    scale: float


def find_adapter(path: str | Path, base: str | None = None) -> Adapter | None:
    """Read what an adapter says of itself; None if the place is no adapter.

    Args:
        path: A folder or a hub id.
        base: Folder or hub id of the model that the adapter belongs to; None: the one that it names.

    Raises:
        ConfigurationError: The folder also holds a whole model, the adapter is no plain LoRA or is damaged, or its base
            model is not to be had; the message says what to do.
    """
    file = _file(path, ADAPTER_FILE)
    if file is None:
        return None
    if _file(path, "config.json") is not None:
        raise ConfigurationError(
            f"{str(path)!r} holds a whole model and an adapter ({ADAPTER_FILE}), and nothing says whether the weights "
            f"have the adapter in them. Remove {ADAPTER_FILE} if they have, or the model's files if they have not."
        )
    settings = _read(file, path)
    reason = _reason_to_refuse(settings)
    if reason is None and base is None and settings.get("revision") not in (None, "", "main"):
        reason = f"it belongs to revision {settings['revision']!r:.80} of its base model"
    if reason is not None:
        raise ConfigurationError(
            f"The adapter in {str(path)!r} can't be used: {reason}. Only plain LoRA is read here. Merge it into its "
            "base model with peft (merge_and_unload, then save_pretrained), and give the folder that this writes."
        )
    rank, alpha = settings["r"], float(settings["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    if _file(path, ADAPTER_WEIGHTS) is None:
        raise ConfigurationError(
            f"{str(path)!r} has no {ADAPTER_WEIGHTS}, and pickles (.bin) are never read, because reading one can "
            "execute what is in it. Save the adapter with save_pretrained of peft, which writes that file."
        )
    return Adapter(file.parent, _base(path, settings, base), rank, scale)


def require_adapter(path: str | Path) -> Adapter:
    """Read what an adapter says of itself, where there must be one; see `find_adapter`."""
    if (adapter := find_adapter(path)) is None:
        raise ConfigurationError(
            f"{str(path)!r} holds no adapter ({ADAPTER_FILE}), and model.lora.rank asks to go on with one."
        )
    return adapter


def whole_model(path: str | Path, base: str | None = None) -> str | Path:
    """The place of a whole model: the base model of an adapter, or the place itself. See `find_adapter`."""
    adapter = find_adapter(path, base)
    return path if adapter is None else adapter.base


def _file(path: str | Path, name: str) -> Path | None:
    folder = as_folder(path)
    if folder is None:
        return file_on_hub(str(path), name)
    return folder / name if (folder / name).is_file() else None


def _read(file: Path, path: str | Path) -> dict[str, Any]:
    try:
        return read_object(file, _MAX_BYTES)
    except ValueError as error:
        raise ConfigurationError(
            f"{ADAPTER_FILE} in {str(path)!r} is damaged ({error}). Put the file of this adapter back."
        ) from error


def _reason_to_refuse(settings: dict[str, Any]) -> str | None:
    """Say why an adapter is no plain LoRA; None if it is one."""
    if settings.get("peft_type") != "LORA":
        return f"it is of type {settings.get('peft_type')!r:.80}"
    if settings.get("bias", "none") != "none":
        return f"it trains biases (bias={settings['bias']!r:.80})"
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        return f"its base model was changed by init_lora_weights={settings['init_lora_weights']!r:.80}"
    for name, value in settings.items():
        if name not in _WITHOUT_MEANING and value not in (None, False, "", [], {}):
            return f"{name!r:.80} is {value!r:.80}"
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= _MAX_RANK:
        return f"r must be a whole number in [1, {_MAX_RANK}], and is {rank!r:.80}"
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= 1e6:
        return f"lora_alpha must be a number, and is {alpha!r:.80}"
    return None


def _base(path: str | Path, settings: dict[str, Any], given: str | None) -> str:
    """The place of the base model, which the caller has given or the adapter names."""
    named = settings.get("base_model_name_or_path") if given is None else given
    merge = f"python -m algorithms.merge {shlex.quote(str(path))} --base <folder or hub id> --out DIR, and give DIR"
    if not isinstance(named, str) or not named or "\0" in named or len(named) > 4096:
        raise ConfigurationError(
            f"The adapter in {str(path)!r} does not say which model it belongs to (base_model_name_or_path in "
            f"{ADAPTER_FILE}). Merge it once: {merge}."
        )
    folder = as_folder(named)
    if given is None and not _of_a_run(path) and (folder is not None or not _HUB_ID.fullmatch(named)):
        raise ConfigurationError(
            f"The adapter in {str(path)!r} belongs to the model {named!r:.200}, which is no hub id. A path that stands "
            f"in a model folder is not followed, because the folder may be a stranger's. Merge it once: {merge}."
        )
    if folder is not None and not folder.is_dir():
        raise ConfigurationError(
            f"The adapter in {str(path)!r} belongs to the model {named!r:.200}, and there is no such folder. Merge it "
            f"once with the model where it is now: {merge}."
        )
    if _file(named, ADAPTER_FILE) is not None:
        raise ConfigurationError(
            f"The adapter in {str(path)!r} belongs to {named!r:.200}, which is an adapter itself. Merge that one first "
            "(python -m algorithms.merge), and name the folder that this writes by --base."
        )
    return named


def _of_a_run(path: str | Path) -> bool:
    """Whether a folder is a checkpoint in a run directory, whose settings name a model by its path as well."""
    folder = as_folder(path)
    if folder is None:
        return False
    folder = folder.absolute()
    return folder.parent.name == "checkpoints" and (folder.parent.parent / CONFIG_FILE).is_file()
