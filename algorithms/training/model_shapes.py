"""The shape of a language model from its `config.json`: how many parameters it has, and where. No weights are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentic_rag_env.errors import ConfigurationError
from algorithms.learner.adapter_folders import ADAPTER_FILE, whole_model
from algorithms.learner.config import ALL_LINEAR, LoraConfig

#: Families whose layers are counted below, and whether query, key and value have biases; Qwen3 scales them instead.
_FAMILIES = {"llama": False, "mistral": False, "qwen2": True, "qwen3": False}
_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def _config(kind: str, sizes: tuple[int, int, int, int, int, int], tied: bool, head_dim: int) -> dict[str, Any]:
    hidden, layers, heads, kv_heads, intermediate, vocab = sizes
    return {
        "model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocab,
        "tie_word_embeddings": tied, "head_dim": head_dim,
    }  # fmt: skip


#: What stands in the config.json of the models of our presets, by a part of their hub ids. Models that were trained
#: from them have the same shape.
KNOWN = {
    "smollm2-135m": _config("llama", (576, 30, 9, 3, 1536, 49152), True, 64),
    "smollm2-360m": _config("llama", (960, 32, 15, 5, 2560, 49152), True, 64),
    "qwen2.5-0.5b": _config("qwen2", (896, 24, 14, 2, 4864, 151_936), True, 64),
    "qwen2.5-3b": _config("qwen2", (2048, 36, 16, 2, 11_008, 151_936), True, 128),
    "qwen2.5-7b": _config("qwen2", (3584, 28, 28, 4, 18_944, 152_064), False, 128),
    "llama-3.2-1b": _config("llama", (2048, 16, 32, 8, 8192, 128_256), True, 64),
    "llama-3.1-8b": _config("llama", (4096, 32, 32, 8, 14_336, 128_256), False, 128),
}


def _config_of(place: str) -> Any:
    """The content of a model's config.json, from its folder, the list above or the hub."""
    folder = Path(place).expanduser()
    try:
        if folder.is_dir():
            return json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if known := next((config for part, config in KNOWN.items() if part in place.lower()), None):
            return known
        from transformers.utils import cached_file

        from algorithms.learner.model_folders import require_model

        require_model(place)
        return json.loads(Path(str(cached_file(place, "config.json"))).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigurationError(f"{place}: config.json cannot be read ({error}).") from error


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder-only model.

    Attributes:
        hidden: Width of the residual stream.
        layers: Number of layers.
        heads: Number of query heads.
        kv_heads: Number of key and value heads.
        head_dim: Width of a head.
        intermediate: Width inside the feed-forward part.
        vocab: Width of the logits.
        tied: Whether the head is the embedding.
        biases: Parameters beside the matrices of a layer's attention.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    biases: int

    @property
    def matrices(self) -> int:
        """Parameters in the matrix products of all layers."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Widths in and out of the linear layers of one layer, by the names that they have in transformers."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, wide),
            "k_proj": (self.hidden, narrow),
            "v_proj": (self.hidden, narrow),
            "o_proj": (wide, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    def adapter(self, lora: LoraConfig) -> int:
        """Parameters of an adapter: A [r, in] and B [out, r] beside each of its layers.

        Raises:
            ConfigurationError: There is no layer of this name.
        """
        targets = self.linear if ALL_LINEAR in lora.targets else lora.targets
        if unknown := [name for name in targets if name not in self.linear]:
            raise ConfigurationError(
                f"model.lora.targets has {unknown[0]!r}; there are {', '.join(self.linear)}, and {ALL_LINEAR!r} stands "
                "for all of them."
            )
        return self.layers * (lora.rank or 0) * sum(sum(self.linear[name]) for name in targets)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocab * self.hidden

    @property
    def backbone(self) -> int:
        """Parameters without a head of its own."""
        return self.embedding + self.matrices + self.layers * (2 * self.hidden + self.biases) + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.backbone + (0 if self.tied else self.embedding)

    def kv_bytes(self, element: int) -> int:
        """Bytes of keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element


def shape_of(place: str) -> Shape:
    """Read the shape of a model.

    Args:
        place: A folder with a config.json, or a hub id. A hub id of a preset's model is not looked up.

    Raises:
        ConfigurationError: There is no such file, it is damaged, or its family is not known here.
    """
    if (Path(place).expanduser() / ADAPTER_FILE).is_file():
        place = str(whole_model(place))
    config = _config_of(place)
    if not isinstance(config, Mapping) or (kind := config.get("model_type")) not in _FAMILIES:
        found = config.get("model_type") if isinstance(config, Mapping) else config
        raise ConfigurationError(
            f"{place}: a model of type {found!r:.80} cannot be counted; known are {', '.join(_FAMILIES)}."
        )
    sizes: dict[str, Any] = {name: config.get(name) for name in _FIELDS}
    heads = sizes["num_attention_heads"]
    sizes["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigurationError(f"{place}: {name} in config.json is {size!r:.80}; it must be a positive integer.")
    head_dim = config.get("head_dim") or sizes["hidden_size"] // heads
    kv_heads = sizes["num_key_value_heads"]
    biases = (heads + 2 * kv_heads) * head_dim if _FAMILIES[kind] else 0
    return Shape(
        hidden=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=sizes["intermediate_size"],
        vocab=sizes["vocab_size"],
        tied=config.get("tie_word_embeddings", False) is True,
        biases=2 * head_dim if kind == "qwen3" else biases,
    )
