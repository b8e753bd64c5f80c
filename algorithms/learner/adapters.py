"""Low-rank adapters (LoRA, arXiv:2106.09685): a frozen model, and small trained matrices beside its linear layers.

A model with an adapter is still a causal language model of transformers, so nothing that uses it has to know. What is
copied of it, the critic's backbone and the reference, shares the frozen weights and has an adapter of its own. A saved
adapter is loaded merged into its base model, unless it is trained further.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from agentic_rag_env.errors import ConfigurationError
from algorithms.learner import sharding
from algorithms.learner.adapter_folders import ADAPTER_WEIGHTS, Adapter
from algorithms.learner.config import ALL_LINEAR, LoraConfig
from algorithms.learner.model_folders import as_folder

Network = TypeVar("Network", bound=nn.Module)

_NAME = "default"
_WEIGHT = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def add_adapter(model: PreTrainedModel, config: LoraConfig, base: str | Path, seed: int) -> PreTrainedModel:
    """Freeze a model and put an adapter on it, which changes nothing before it is trained. Returns the same model.

    Args:
        model: A model without adapters.
        config: The settings, with a rank.
        base: Folder or hub id of the model, which the saved adapter will name.
        seed: Decides the adapter's first weights. They are the same in every process.

    Raises:
        ConfigurationError: peft is not installed, no linear layer of the model's backbone has the name of a target, or
            peft takes a target for fused experts.
    """
    try:
        from peft import LoraConfig as Settings
    except ImportError as error:
        raise ConfigurationError(
            f"model.lora.rank={config.rank} needs peft: pip install 'agentic-rag-env[lora]'."
        ) from error
    assert config.rank is not None
    settings = Settings(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft only divides it by the rank
        lora_dropout=0.0,
        target_modules=_targets(model, config),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads a name that transformers has renamed
        torch.manual_seed(seed)
        model.add_adapter(settings, adapter_name=_NAME)
    if settings.target_parameters:
        raise ConfigurationError(
            f"peft takes some of model.lora.targets for the experts of {model.config.model_type!r}, which are no "
            "linear layers, and an adapter with these is not read here. Leave them out: 'model.lora.targets="
            f"[{','.join(sorted(settings.target_modules or ()))}]'."
        )
    settings.target_modules = sorted(settings.target_modules or ())  # from a set, which has no order
    folder = as_folder(base)
    settings.base_model_name_or_path = str(base) if folder is None else str(folder.resolve())
    return model.eval()


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has an adapter on it."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def twin(network: Network) -> Network:
    """Copy a network to train it on its own. What an adapter leaves frozen is not copied but shared."""
    parameters = list(network.parameters())
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    if not 0 < len(frozen) < len(parameters):  # there is no adapter
        return copy.deepcopy(network).requires_grad_(True)
    return copy.deepcopy(network, {id(parameter): parameter for parameter in frozen})


def trained_state(network: nn.Module) -> dict[str, Tensor]:
    """The state of a network without the parameters that an adapter leaves frozen."""
    frozen = _frozen(network)
    return {name: value for name, value in network.state_dict().items() if name not in frozen}


def load_trained_state(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `trained_state` returned.

    Raises:
        RuntimeError: The state does not fit the network.
    """
    own = network.state_dict()
    whole = {name: sharding.like(value, own.get(name, value)) for name, value in state.items()}
    report = network.load_state_dict(whole, strict=False)
    if wrong := [*report.unexpected_keys, *(set(report.missing_keys) - _frozen(network))]:
        raise RuntimeError(f"{len(wrong)} weights are missing or too many, among them {wrong[0]}")


def load_adapter(model: PreTrainedModel, adapter: Adapter) -> None:
    """Put the weights of a saved adapter into the adapter of a model.

    Raises:
        ConfigurationError: They are of another rank or scale, or belong to other layers.
    """
    settings: Any = model.peft_config[_NAME]
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    weights = _weights(adapter)
    targets, wanted = ({name.rpartition(".")[2] for name in names} for names in (weights, layers))
    same_scale = math.isclose(adapter.scale, settings.lora_alpha / settings.r, rel_tol=1e-6)
    if adapter.rank != settings.r or not same_scale or targets != wanted:
        raise ConfigurationError(
            f"The adapter in {str(adapter.folder)!r} is another one than model.lora describes. To train it further: "
            f"model.lora.rank={adapter.rank} model.lora.alpha={adapter.scale * adapter.rank:.9g} "
            f"'model.lora.targets=[{','.join(sorted(targets))}]'. For a new adapter on top, merge it first: python -m "
            "algorithms.merge."
        )
    if weights.keys() != layers.keys():
        raise ConfigurationError(
            f"The adapter in {str(adapter.folder)!r} covers {len(weights)} layers, and model.lora describes "
            f"{len(layers)}: all that have the names of its targets. One that covers only some can't be trained "
            "further. For a new adapter on top, merge it first: python -m algorithms.merge."
        )
    with torch.no_grad():
        for name, (down, up) in weights.items():
            layer: Any = layers[name]
            _check_shapes(adapter, name, layer, down, up)
            layer.lora_A[_NAME].weight.copy_(down)
            layer.lora_B[_NAME].weight.copy_(up)


@torch.no_grad()
def merge(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """Add an adapter to the weights of its base model, in place. Returns the same model.

    Args:
        model: The base model, float32 or float64.
        adapter: The adapter.

    Raises:
        ConfigurationError: The adapter is damaged or does not fit the model.
    """
    modules = dict(model.named_modules())
    embedding: Any = model.get_input_embeddings()
    for name, (down, up) in _weights(adapter).items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            raise ConfigurationError(f"{_unfit(adapter)}, which has no linear layer {name!r:.120}.")
        if layer.weight is embedding.weight:
            raise ConfigurationError(
                f"{_unfit(adapter)}: it changes the head, whose weights are those of the embedding as well, so it "
                "can't be merged. Train an adapter that leaves the head out."
            )
        _check_shapes(adapter, name, layer, down, up)
        layer.weight += adapter.scale * (up.to(layer.weight) @ down.to(layer.weight))
    return model


def _targets(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """The names of the layers that get an adapter: linear layers of the backbone, whose weights are no one else's."""
    modules = [(name.rpartition(".")[2], module) for name, module in model.base_model.named_modules()]
    known = sorted({name for name, module in modules if isinstance(module, nn.Linear)})
    if not known:
        raise ConfigurationError(
            f"Models of type {model.config.model_type!r} have no linear layers (torch.nn.Linear) in their backbone, so "
            "there is no place for an adapter. Train all weights (model.lora.rank=null), or choose another model."
        )
    if wrong := [target for target in config.targets if target not in (ALL_LINEAR, *known)]:
        raise ConfigurationError(
            f"model.lora.targets has {wrong[0]!r}, which is no linear layer of this model; there are {', '.join(known)}"
            f", and {ALL_LINEAR!r} stands for all of them."
        )
    # peft's own "all-linear" means more: fused experts, and layers that are no torch.nn.Linear.
    return known if ALL_LINEAR in config.targets else list(config.targets)


def _frozen(network: nn.Module) -> set[str]:
    return {name for name, parameter in network.named_parameters() if not parameter.requires_grad}


def _weights(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """The matrices A and B by the name of their layer in the whole model."""
    file = adapter.folder / ADAPTER_WEIGHTS
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigurationError(f"{file} is damaged ({' '.join(str(error).split())[:200]}).") from error
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (match := _WEIGHT.fullmatch(name)) is None:
            raise ConfigurationError(
                f"The adapter in {str(adapter.folder)!r} holds more than the matrices A and B of linear layers: "
                f"{name!r:.120}. Merge it into its base model with peft (merge_and_unload, then save_pretrained), and "
                "give the folder that this writes."
            )
        found.setdefault(match[1], {})[match[2]] = tensor
    if not found or any(len(pair) != 2 for pair in found.values()):
        raise ConfigurationError(f"{file} is not whole: each layer must have an A and a B, and there must be a layer.")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _check_shapes(adapter: Adapter, name: str, layer: Any, down: Tensor, up: Tensor) -> None:
    rank, wanted = adapter.rank, (layer.in_features, layer.out_features)
    if (tuple(down.shape), tuple(up.shape)) != ((rank, wanted[0]), (wanted[1], rank)):
        raise ConfigurationError(
            f"{_unfit(adapter)}: at {name!r:.120} it has {list(down.shape)} and {list(up.shape)}, and rank {rank} "
            f"beside a layer from {wanted[0]} to {wanted[1]} takes {[rank, wanted[0]]} and {[wanted[1], rank]}."
        )


def _unfit(adapter: Adapter) -> str:
    return f"The adapter in {str(adapter.folder)!r} does not fit its base model {adapter.base!r:.200}"
