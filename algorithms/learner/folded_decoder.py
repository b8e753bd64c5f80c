"""A small decoder with fewer and shorter operations, in rollouts and in training.

The tensors of a small model fit into the processor's cache, so its time goes to calls and to passes over them. Here
norms are folded into the products behind them, and products that read the same states become one. The rotation of
queries and keys is one product of complex numbers. Gradients reach the model's own weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from algorithms.learner.decoder import Remember, is_readable
from algorithms.learner.short_gradients import normed

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
    """The weights of a backbone as they are now; the copies do not follow a change, but carry gradient.

    Args:
        backbone: One for which `can_fold` holds.
    """

    def __init__(self, backbone: Any) -> None:
        self._backbone = backbone
        self._layers = [_FoldedLayer(layer) for layer in backbone.layers]
        self._turns = torch.empty(0)

    def read(
        self,
        input_ids: Tensor,
        positions: Tensor,
        *,
        length: int,
        mask: Tensor | None = None,
        remember: Remember | None = None,
        at: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Compute the last hidden states; the arguments are those of `decoder.read`, and `length` bounds positions.

        The keys that are remembered have the entries of each head in another order than the model's own.
        """
        if length > len(self._turns):
            self._extend_table(length if remember is None else 2 * length)
        (rows, width), backbone = input_ids.shape, self._backbone
        hidden = backbone.embed_tokens(input_ids).flatten(0, 1)
        turns = self._turns[positions]
        for number, layer in enumerate(self._layers):
            attended = layer.attend(hidden.view(rows, width, -1), turns, mask, number, remember)
            if at is not None and number == len(self._layers) - 1:
                attended, hidden = attended[at], hidden.view(rows, width, -1)[at]
            hidden = torch.addmm(hidden, attended.flatten(0, -2), layer.out)
            gate, up = linear(normed(hidden, layer.eps_of_mlp), layer.gate_up).chunk(2, dim=-1)
            hidden = torch.addmm(hidden, silu(gate) * up, layer.down)
        hidden = normed(hidden, _eps(backbone.norm)) * backbone.norm.weight
        return hidden if at is not None else hidden.view(rows, width, -1)

    @torch.no_grad()
    def _extend_table(self, length: int) -> None:
        """Keep the rotations of the first positions, [length, 1, head_dim / 2] complex."""
        weight = self._backbone.embed_tokens.weight
        cos, sin = self._backbone.rotary_emb(weight, torch.arange(length, device=weight.device)[None])
        half = cos.shape[-1] // 2
        self._turns = torch.complex(cos[0, :, :half], sin[0, :, :half]).unsqueeze(1)


class _FoldedLayer:
    """The weights of a layer; those of a norm have gone into the product that reads it."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        first = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.heads = [projection.out_features // self.head_dim for projection in first]
        self.eps, self.eps_of_mlp = _eps(layer.input_layernorm), _eps(layer.post_attention_layernorm)
        self.qkv = self._in_pairs([each.weight for each in first]) * layer.input_layernorm.weight
        biases = [each.bias for each in first if each.bias is not None]
        self.qkv_bias = self._in_pairs(biases) if biases else None
        self.out = attention.o_proj.weight.T
        self.gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)) * layer.post_attention_layernorm.weight
        self.down = mlp.down_proj.weight.T

    def _in_pairs(self, qkv: list[Tensor]) -> Tensor:
        """Join the three. In queries and keys, the two numbers that are rotated together come to stand together."""
        query, key, value = qkv
        paired = [each.unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2).flatten(0, 2) for each in (query, key)]
        return torch.cat((*paired, value))

    def attend(
        self, hidden: Tensor, turns: Tensor, mask: Tensor | None, number: int, remember: Remember | None
    ) -> Tensor:
        """What attention has gathered, [B, T, heads * head_dim], before the output projection."""
        states = linear(normed(hidden, self.eps), self.qkv, self.qkv_bias).unflatten(-1, (-1, self.head_dim))
        turned, value = states.split((self.heads[0] + self.heads[1], self.heads[2]), dim=2)
        pairs = torch.view_as_complex(turned.unflatten(-1, (-1, 2)))
        rotated = torch.view_as_real(pairs * turns).flatten(-2)
        query, key = (part.transpose(1, 2) for part in rotated.split(self.heads[:2], dim=2))
        value = value.transpose(1, 2)
        if remember is not None:
            key, value = remember(key, value, number)
        grouped, causal = query.shape[1] != key.shape[1], mask is None
        attended = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=self.scaling, enable_gqa=grouped
        )
        return attended.transpose(1, 2).flatten(2)


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)  # the second is that of a float64 model
