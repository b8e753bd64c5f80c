"""The forward pass of decoders built like Llama, with fewer operations than in `transformers`, and the same results.

It calls the model's own layers (projections, embeddings, rotary table), so that adapters in their place count. Two
things differ. Norms and rotation take fewer operations. And the last layer, once attention is over, goes on only with
the positions that somebody reads: for a small model, most of that layer's work falls on prompts and observations,
whose last hidden states nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import rms_norm
from transformers import LlamaModel, MistralModel, Qwen2Model, Qwen3Model
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from algorithms.learner.short_gradients import normed

#: Takes keys and values [B, heads, T, head_dim] of the tokens, and the number of the layer; returns those to attend to.
Remember = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
#: Takes a layer's attention, with queries, keys and values as above; returns what was gathered [B, T, heads, head_dim].
Attend = Callable[..., Tensor]

#: Fewest columns in common that make up for what it takes to share them.
_MIN_SHARED = 64
_BUILT_LIKE_LLAMA = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)


def is_readable(backbone: Any) -> bool:
    """Whether `read` computes what the backbone does: one of the known families, as a run uses it."""
    config = backbone.config
    return (
        type(backbone) in _BUILT_LIKE_LLAMA
        and not isinstance(backbone.layers[0], FSDPModule)  # whose weights are there only while the layer is called
        and config._attn_implementation == "sdpa"
        and not backbone.gradient_checkpointing  # which recomputes whole layers
        and (getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True))
        and not (backbone.training and config.attention_dropout)
    )


def read(
    backbone: Any,
    input_ids: Tensor,
    positions: Tensor,
    *,
    mask: Tensor | None = None,
    remember: Remember | None = None,
    attend: Attend | None = None,
    at: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute the last hidden states, final norm included.

    Args:
        backbone: A backbone that `is_readable`.
        input_ids: [B, T] int64.
        positions: [B or 1, T] int64.
        mask: [B, 1, T, S], added to the scores of attention; None: causal, each token sees those before it.
        remember: Takes each layer's keys and values in, and returns those of all S columns; None: those of the tokens.
        attend: Takes the place of attention, with its own idea of what each token sees.
        at: Rows and columns, each [n] int64, of the positions that are read; None: all.

    Returns:
        [B, T, d], or [n, d] at the positions.
    """
    hidden = backbone.embed_tokens(input_ids)
    cos, sin = (table.unsqueeze(1) for table in backbone.rotary_emb(hidden, positions))
    first, second = sin.chunk(2, dim=-1)
    sin = torch.cat((-first, second), dim=-1)
    for number, layer in enumerate(backbone.layers):
        states = _rotated(layer.self_attn, _norm(layer.input_layernorm, hidden), cos, sin)
        if remember is not None:
            states = states[0], *remember(*states[1:], number)
        if attend is None:
            attended = sdpa_attention_forward(layer.self_attn, *states, mask, scaling=layer.self_attn.scaling)[0]
        else:
            attended = attend(layer.self_attn, *states)
        attended = attended.flatten(2)
        if at is not None and number == len(backbone.layers) - 1:
            attended, hidden = attended[at], hidden[at]
        hidden = hidden + layer.self_attn.o_proj(attended)
        hidden = hidden + layer.mlp(_norm(layer.post_attention_layernorm, hidden))
    return _norm(backbone.norm, hidden)


def pays_to_share(num_rows: int, num_shared: int, device: torch.device) -> bool:
    """Whether it saves time to compute once what rows have in common. On a GPU, one pass less may count for more.

    Args:
        num_rows: Number of rows.
        num_shared: Leading columns that are the same in all of them.
        device: Where they are computed.
    """
    return device.type == "cpu" and num_rows > 1 and num_shared >= _MIN_SHARED


def read_shared(backbone: Any, input_ids: Tensor, num_shared: int, at: tuple[Tensor, Tensor]) -> Tensor:
    """Compute the last hidden states of rows that begin alike; what they have in common is computed once.

    All but attention sees a single row: the shared tokens, and behind them the others of each row.

    Args:
        backbone: A backbone that `is_readable`.
        input_ids: [B, T] int64.
        num_shared: Leading columns that are the same in all rows.
        at: Rows and columns, each [n] int64, of the positions that are read, all behind the shared columns.

    Returns:
        [n, d]. Gradients flow into the shared columns from all rows.
    """
    (num_rows, length), device = input_ids.shape, input_ids.device
    width = length - num_shared
    columns = torch.arange(length, device=device)
    ids = torch.cat((input_ids[0, :num_shared], input_ids[:, num_shared:].flatten()))[None]
    positions = torch.cat((columns[:num_shared], columns[num_shared:].repeat(num_rows)))[None]
    mask = (columns <= columns[num_shared:, None])[None, None]

    def attend(attention: Any, *states: Tensor) -> Tensor:
        query, key, value = (each[:, :, :num_shared] for each in states)
        before = sdpa_attention_forward(attention, query, key, value, None, scaling=attention.scaling)[0]
        query, *own = (each[0, :, num_shared:].unflatten(1, (num_rows, width)).transpose(0, 1) for each in states)
        begun = (each.expand(num_rows, -1, -1, -1) for each in (key, value))
        key, value = (torch.cat(parts, dim=2) for parts in zip(begun, own, strict=True))
        behind = sdpa_attention_forward(attention, query, key, value, mask, scaling=attention.scaling)[0]
        return torch.cat((before.flatten(0, 1), behind.flatten(0, 1)))[None]

    place = at[0] * width + at[1]
    return read(backbone, ids, positions, attend=attend, at=(torch.zeros_like(place), place))


def _rotated(attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each [B, heads, T, head_dim]; the first two know their positions."""
    shape = (*x.shape[:-1], -1, attention.head_dim)
    query, key = attention.q_proj(x).view(shape), attention.k_proj(x).view(shape)
    if hasattr(attention, "q_norm"):
        query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
    query, key = (_rotate(states.transpose(1, 2), cos, sin) for states in (query, key))
    return query, key, attention.v_proj(x).view(shape).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding; the first half of `sin` has its sign turned, so that no half of x needs to."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def _norm(norm: Any, x: Tensor) -> Tensor:
    if isinstance(norm, nn.RMSNorm):  # that of a float64 model
        return norm(x)
    if x.device.type == "cpu" and x.dtype.itemsize >= 4:  # where rms_norm is put together from single operations
        return normed(x, norm.variance_epsilon) * norm.weight
    return rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
