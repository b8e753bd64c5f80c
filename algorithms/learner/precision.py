"""In which precision networks compute."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

#: Parameters from which bfloat16 is faster on a CPU that multiplies matrices in it.
_MIN_BFLOAT16_PARAMETERS = 10_000_000


def decided_precision(precision: str, model: PreTrainedModel) -> tuple[str, str]:
    """Find the precision that a setting stands for: "auto" is the faster one on the model's device.

    Args:
        precision: The setting, see `LearnerConfig`.
        model: The model on its device.

    Returns:
        "float32", "bfloat16" or "float64"; and the reason, for people.
    """
    if precision != "auto":
        return precision, f"learner.precision={precision}"
    if model.device.type != "cpu":
        return "bfloat16", "auto, on a GPU"
    if not torch.cpu._is_amx_tile_supported():
        return "float32", "auto: this processor has no matrix units for bfloat16 (AMX)"
    if model.num_parameters() < _MIN_BFLOAT16_PARAMETERS:
        # Casting the weights of a small network costs more than its matrix products save.
        return "float32", f"auto: bfloat16 pays from {_MIN_BFLOAT16_PARAMETERS:,} parameters on"
    return "bfloat16", "auto: this processor has matrix units for it (AMX)"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which networks compute.

    Args:
        device: Where the networks are.
        precision: "float32", "bfloat16", or "auto": bfloat16 on a GPU.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bfloat16(device, precision))


def computes_in_bfloat16(device: torch.device, precision: str) -> bool:
    """Whether `autocast` casts to bfloat16; the arguments are the same."""
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
