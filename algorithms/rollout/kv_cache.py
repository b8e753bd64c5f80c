"""A key-value cache in which every row has its own length, so that episodes of different lengths share one batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from agentic_rag_env.errors import ConfigurationError
from algorithms.learner import decoder
from algorithms.learner.folded_decoder import FoldedDecoder, can_fold
from algorithms.learner.networks import backbone_hidden, logit_width

_FIRST_CAPACITY = 64


class EpisodeCache(Cache):
    """Keys and values of R rows over whole episodes, in tensors that are written in place and grow when full.

    A token's column is its position, so there are no holes. Padding that a forward pass computes beside real tokens
    lies beyond the end of its row. There causality hides it, and the row's next tokens overwrite it. A row is emptied
    by starting again at position 0. A pass reads neighbouring rows as a view, and `swap` makes the rows of a pass
    neighbours. The weights must stay the same as long as the cache lives.

    Args:
        num_rows: Number of rows, R.
        max_length: Most tokens of a row, beyond which no memory is taken; None: not known.
    """

    def __init__(self, num_rows: int, max_length: int | None = None) -> None:
        super().__init__(layers=[])
        self.num_rows = num_rows
        self.max_length = max_length
        #: Keys and values, each [L, R, capacity, heads, head_dim], so that a token is written in one piece, and rows
        #: are swapped in all layers at once. Empty before the first pass.
        self.stored: tuple[Tensor, ...] = ()
        self._layers: list[tuple[Tensor, ...]] = []
        self.rows = slice(0, num_rows)
        self.places = torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 0, dtype=torch.long)
        self.length = 0
        self._num_layers = 0
        self._folded: FoldedDecoder | None = None

    def forward(
        self,
        backbone: Any,
        input_ids: Tensor,
        positions: Tensor,
        first_row: int = 0,
        *,
        length: int,
        at: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Append tokens to rows and compute their hidden states.

        Args:
            backbone: A model without its head.
            input_ids: [n, W] int64, the next tokens of rows `first_row` to `first_row + n`, padded on the right.
            positions: [n, W] int64, contiguous, from the row's length on.
            first_row: The first row.
            length: The largest position plus one.
            at: Rows and columns of `input_ids`, each [m] int64, whose hidden states are wanted; None: all.

        Returns:
            [n, W, d] hidden states in the model's dtype, meaningless on padding; or [m, d] at the positions.
        """
        self.rows = slice(first_row, first_row + len(input_ids))
        self.places = torch.arange(len(input_ids), device=positions.device)[:, None], positions
        self.length, self._num_layers = length, backbone.config.get_text_config().num_hidden_layers
        self.reserve(length)
        if self._folded is None and can_fold(backbone):
            self._folded = FoldedDecoder(backbone)
        if self._folded is not None:
            mask = self._mask(backbone, positions)
            return self._folded.read(input_ids, positions, length=length, mask=mask, remember=self.update, at=at)
        if decoder.is_readable(backbone):
            mask = self._mask(backbone, positions)
            return decoder.read(backbone, input_ids, positions, mask=mask, remember=self.update, at=at)
        hidden = backbone(
            input_ids=input_ids,
            attention_mask=self._hidden_columns(backbone, positions),
            position_ids=positions,
            past_key_values=self,
            use_cache=True,
        ).last_hidden_state
        return hidden if at is None else hidden[at]

    def _mask(self, backbone: Any, positions: Tensor) -> Tensor | None:
        """What `decoder.read` takes: rows that begin here need no mask, because causality alone hides half the work."""
        return None if positions.shape[1] == self.length else self._hidden_columns(backbone, positions)

    def _hidden_columns(self, backbone: Any, positions: Tensor) -> Tensor:
        hidden_from = torch.arange(self.length, device=positions.device) > positions[:, :, None]
        mask = torch.zeros(hidden_from.shape, dtype=backbone.dtype, device=positions.device)
        return mask.masked_fill_(hidden_from, torch.finfo(backbone.dtype).min)[:, None]

    def copy_start(self, source: int, targets: Tensor, length: int) -> None:
        """Let rows begin as another one does.

        Args:
            source: The row that has been read.
            targets: [k] int64, empty rows.
            length: Number of columns that they take over.
        """
        for stored in self.stored:
            stored[:, targets, :length] = stored[:, source, None, :length].clone()

    def swap(self, these: Tensor, those: Tensor, length: int) -> None:
        """Exchange rows pairwise.

        Args:
            these: [k] int64.
            those: [k] int64, none of them among `these`.
            length: Columns in use; the other columns are not moved.
        """
        to, source = torch.cat((these, those)), torch.cat((those, these))
        for stored in self.stored:
            stored[:, to, :length] = stored[:, source, :length]

    def reserve(self, length: int) -> None:
        """Make room for so many columns. If there was too little, everything lies in other places afterwards."""
        if self.stored and length > (capacity := self.stored[0].shape[2]):
            # By doubling, because the old places are free only after the copy. One by one for the same reason.
            keys, values = self.stored
            wide = max(length, min(2 * capacity, self.max_length or 2 * capacity))
            self._hold(())
            keys = _widened(keys, wide)
            self._hold((keys, _widened(values, wide)))

    def _hold(self, stored: tuple[Tensor, ...]) -> None:
        self.stored, self._layers = stored, list(zip(*stored, strict=True))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the attention of each layer; see `Cache.update`."""
        both = key_states.transpose(1, 2), value_states.transpose(1, 2)
        if not self.stored:
            shape = self._num_layers, self.num_rows, max(_FIRST_CAPACITY, self.length)
            # Zeros, because a masked column still takes part with weight 0, and 0 * NaN is NaN. Keys have the dtype of
            # the values: under autocast rotary embeddings make them float32, and attention would round them each time.
            self._hold(tuple(value_states.new_zeros(*shape, *states.shape[2:]) for states in both))
        keys, values = self._layers[layer_idx]
        for stored, states in zip((keys, values), both, strict=True):
            # Not by `scatter_`, which on a CPU copies all of a bfloat16 tensor to write one column of it.
            stored[self.rows][self.places] = states.to(stored.dtype)
        keys, values = (stored[self.rows, : self.length].transpose(1, 2) for stored in (keys, values))
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in use."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns in use, and the first one's index."""
        return self.length, 0


def _widened(stored: Tensor, capacity: int) -> Tensor:
    wide = stored.new_zeros(*stored.shape[:2], capacity, *stored.shape[3:])
    wide[:, :, : stored.shape[2]] = stored
    return wide


@torch.no_grad()
def check_cache(model: PreTrainedModel) -> None:
    """Make sure that computing a model token by token through an `EpisodeCache` gives what one plain pass gives.

    Raises:
        ConfigurationError: The results differ: the family ignores positions or masks, or keeps state of another kind.
    """
    width = logit_width(model)
    input_ids = (torch.arange(16, device=model.device) * 7919 % width).view(2, 8)
    columns = torch.arange(8, device=model.device).expand(2, 8)
    plain = backbone_hidden(model, input_ids, torch.ones_like(input_ids, dtype=torch.bool))
    try:
        hidden = _in_steps(model, input_ids, columns)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigurationError(f"{_unsupported(model)} ({type(error).__name__}: {error})") from error
    difference = float((plain - hidden).abs().max() / plain.abs().max())
    tolerance = 0.05 if model.dtype.itemsize < 4 else 1e-3
    if not difference <= tolerance:
        raise ConfigurationError(f"{_unsupported(model)} (hidden states differ by {difference:.3g} of the largest)")


def _in_steps(model: PreTrainedModel, input_ids: Tensor, columns: Tensor) -> Tensor:
    """Compute row 0 in portions of 5, 1, 1 and 1 tokens, and row 1 in portions of 3 (padded to 5), 1, 1, 1 and 2."""
    cache, backbone = EpisodeCache(2), model.base_model
    first = cache.forward(backbone, input_ids[:, :5], columns[:, :5], length=5)
    hidden = torch.zeros(2, 8, first.shape[-1], dtype=first.dtype, device=first.device)
    hidden[0, :5], hidden[1, :3] = first[0], first[1, :3]
    lengths = torch.tensor([[5], [3]], device=input_ids.device)
    for step_number in range(3):
        step = cache.forward(backbone, input_ids.gather(1, lengths), lengths, length=6 + step_number)
        hidden.scatter_(1, lengths[:, :, None].expand_as(step), step)
        lengths += 1
    hidden[1:, 6:] = cache.forward(backbone, input_ids[1:, 6:], columns[1:, 6:], first_row=1, length=8)
    return hidden


def _unsupported(model: PreTrainedModel) -> str:
    return (
        f"Models of type {model.config.model_type!r} with attention {model.config._attn_implementation!r} can't be "
        "computed token by token with padding. Load with attn_implementation='sdpa' or 'eager', or choose a family "
        "with rotary positions and full attention, such as Qwen, Llama or Mistral."
    )
