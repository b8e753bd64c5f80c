"""A small decoder as rollouts read it: fewer operations for each token, because the operations are short.

A token of a small model takes some hundred operations, and most of their time goes to calling them. Here norms are
folded into the products behind them, products that read the same states become one, and the rotary table is kept.
The copies of the weights are for models whose weights are small beside everything else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from algorithms.learner.decoder import Remember, is_readable

#: Parameters from which products take most of the time, so that fewer calls save little, and copies take memory.
_MAX_PARAMETERS = 5_000_000


def can_fold(backbone: Any) -> bool:
    """Whether `FoldedDecoder` reads what the backbone does, and is worth its copies of the weights."""
    return (
        is_readable(backbone)
        and backbone.device.type == "cpu"
        and backbone.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
        and backbone.config.hidden_act == "silu"
        and backbone.rotary_emb.rope_type in ("default", "linear", "llama3")  # whose table is the same at any length
        and all(_is_plain(layer) for layer in backbone.layers)
        and sum(parameter.numel() for parameter in backbone.parameters()) < _MAX_PARAMETERS
    )


def _is_plain(layer: Any) -> bool:
    """Whether a layer has nothing but what is folded: no adapters, norms of heads, or biases after attention."""
    attention, mlp = layer.self_attn, layer.mlp
    first = (attention.q_proj, attention.k_proj, attention.v_proj)
    rest = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return (
        not hasattr(attention, "q_norm")
        and all(type(projection) is nn.Linear for projection in (*first, *rest))
        and len({projection.bias is None for projection in first}) == 1
        and all(projection.bias is None for projection in rest)
    )


class FoldedDecoder:
    """The weights of a backbone as they are now; the copies do not follow a change.

    Args:
        backbone: One for which `can_fold` holds.
    """

    def __init__(self, backbone: Any) -> None:
        self._backbone = backbone
        self._layers = [_FoldedLayer(layer) for layer in backbone.layers]
        self._cos = self._sin = backbone.embed_tokens.weight.new_zeros(0, 1, 1)

    def read(
        self,
        input_ids: Tensor,
        positions: Tensor,
        mask: Tensor,
        remember: Remember,
        length: int,
        at: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Compute the last hidden states; the arguments are those of `decoder.read`, and `length` bounds positions."""
        if length > len(self._cos):
            self._extend_table(2 * length)
        (rows, width), backbone = input_ids.shape, self._backbone
        hidden = backbone.embed_tokens(input_ids).flatten(0, 1)
        cos, sin = self._cos[positions], self._sin[positions]
        for number, layer in enumerate(self._layers):
            states = linear(_normed(hidden, layer.eps), layer.qkv, layer.qkv_bias).view(rows, width, -1, layer.head_dim)
            rotated = states[:, :, : layer.heads[0] + layer.heads[1]]
            torch.addcmul(rotated * cos, rotated.roll(layer.head_dim // 2, dims=-1), sin, out=rotated)
            query, key, value = (part.transpose(1, 2) for part in states.split(layer.heads, dim=2))
            key, value = remember(key, value, number)
            grouped = query.shape[1] != key.shape[1]
            attended = scaled_dot_product_attention(query, key, value, mask, scale=layer.scaling, enable_gqa=grouped)
            attended = attended.transpose(1, 2).flatten(2)
            if at is not None and number == len(self._layers) - 1:
                attended, hidden = attended[at], hidden.view(rows, width, -1)[at]
            hidden = torch.addmm(hidden, attended.flatten(0, -2), layer.out)
            gate, up = linear(_normed(hidden, layer.eps_of_mlp), layer.gate_up).chunk(2, dim=-1)
            hidden = torch.addmm(hidden, silu(gate).mul_(up), layer.down)
        hidden = _normed(hidden, _eps(backbone.norm)) * backbone.norm.weight
        return hidden if at is not None else hidden.view(rows, width, -1)

    def _extend_table(self, length: int) -> None:
        """Keep the rotary table of the first positions, [length, 1, head_dim]; the first half of `sin` is negated."""
        weight = self._backbone.embed_tokens.weight
        cos, sin = self._backbone.rotary_emb(weight, torch.arange(length, device=weight.device)[None])
        first, second = sin[0].chunk(2, dim=-1)
        self._cos, self._sin = cos[0].unsqueeze(1), torch.cat((-first, second), dim=-1).unsqueeze(1)


class _FoldedLayer:
    """The weights of a layer; those of a norm have gone into the product that reads it."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        first = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.heads = [projection.out_features // self.head_dim for projection in first]
        self.eps, self.eps_of_mlp = _eps(layer.input_layernorm), _eps(layer.post_attention_layernorm)
        self.qkv = torch.cat([projection.weight for projection in first]) * layer.input_layernorm.weight
        biases = [projection.bias for projection in first if projection.bias is not None]
        self.qkv_bias = torch.cat(biases) if biases else None
        self.out = attention.o_proj.weight.T
        self.gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)) * layer.post_attention_layernorm.weight
        self.down = mlp.down_proj.weight.T


def _normed(x: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square, which leaves the norm's weight out."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)  # the second is that of a float64 model
