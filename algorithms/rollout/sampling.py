"""Drawing a token from logits, and recognizing the token that ends an action."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from algorithms.rollout.config import RolloutConfig
from algorithms.rollout.tokenization import decode

#: A draw among at least so many ids looks for a block of ids first: a cumulative sum over all of them takes more time
#: than everything else in `sample`, and in float64 as much memory.
_MIN_FOR_BLOCKS, _BLOCK = 16_384, 256


def sample(logits: Tensor, uniforms: Tensor, config: RolloutConfig) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    The log-probabilities are those of the full distribution at the temperature, because the learner evaluates that
    distribution. This holds also where `top_p` or `top_k` restrict the draw.

    Args:
        logits: [n, V] float32.
        uniforms: [n] float64 in [0, 1), one for each draw; unused at temperature 0.
        config: Temperature (0 counts as 1 for the log-probabilities), `top_p` and `top_k`.

    Returns:
        Ids [n] int64 and their log-probabilities [n] float32, nats.
    """
    if config.temperature == 0:
        ids = logits.argmax(dim=-1, keepdim=True)
        return ids.squeeze(1), logits.log_softmax(dim=-1).gather(1, ids).squeeze(1)
    # Dividing by 1 would cost a copy of all logits.
    scaled = logits if config.temperature == 1 else logits / config.temperature
    probabilities = scaled.softmax(dim=-1)
    if config.top_p < 1 or config.top_k:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        ids = order.gather(1, _invert(_restrict(ordered, config), uniforms))
    else:
        ids = _invert(probabilities, uniforms)
    return ids.squeeze(1), probabilities.gather(1, ids).log().squeeze(1)


def _restrict(ordered: Tensor, config: RolloutConfig) -> Tensor:
    """Set to zero what `top_k` and then `top_p` leave out; the probabilities are in descending order."""
    if config.top_k:
        ordered = ordered[:, : config.top_k]
    before = ordered.cumsum(dim=-1) - ordered
    return ordered.masked_fill(before >= config.top_p * ordered.sum(dim=-1, keepdim=True), 0.0)


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Find the indices [n, 1] of the first cumulative weights above the uniforms; none of them has weight zero.

    Among many weights it finds a block first, by the blocks' sums, and then the place inside. These sums round, so that
    another index may be found where a uniform lies within 1e-6 of the border between two of them.
    """
    if weights.shape[1] < _MIN_FOR_BLOCKS:
        cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
        return _first_above(cumulative, uniforms[:, None] * cumulative[:, -1:])
    of_blocks = _sums_of_blocks(weights).cumsum(dim=-1, dtype=torch.float64)
    shares = uniforms[:, None] * of_blocks[:, -1:]
    block = _first_above(of_blocks, shares)
    columns = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=weights.shape[1] - 1))
    inside = inside.masked_fill(columns >= weights.shape[1], 0.0).cumsum(dim=-1, dtype=torch.float64)
    before = pad(of_blocks, (1, 0)).gather(1, block)
    return block * _BLOCK + _first_above(inside, shares - before)


def _sums_of_blocks(weights: Tensor) -> Tensor:
    """Add up neighbouring weights, [n, number of blocks]; the last block may be shorter."""
    number, rest = divmod(weights.shape[1], _BLOCK)
    sums = weights[:, : number * _BLOCK].unflatten(1, (number, _BLOCK)).sum(dim=-1)
    return torch.cat((sums, weights[:, -rest:].sum(dim=-1, keepdim=True)), dim=1) if rest else sums


def _first_above(cumulative: Tensor, shares: Tensor) -> Tensor:
    """Find the indices [n, 1] of the first cumulative weights above the shares; one of all counts as a little less."""
    total = cumulative[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(cumulative, torch.minimum(shares, below_total), right=True)


class ActionEnd:
    """Recognizes the last token of an action: an end-of-text id, or one that completes a text that ends actions.

    These texts, such as closing tags, are found in the decoded action, whichever tokens spell them. Only a token that
    holds a text's last character can complete it, so text is decoded only after such a token.

    Args:
        model: The model, whose generation settings may name several end-of-text ids.
        tokenizer: Decodes ids; it may name one more end-of-text id.
        vocab_size: Number of ids that can be sampled.
        action_ends: The texts that end an action, none of them empty.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocab_size: int, action_ends: Sequence[str]
    ) -> None:
        self.action_ends = tuple(action_ends)
        self.tokenizer = tokenizer
        self.eos_ids = _eos_ids(model, tokenizer)
        self.is_eos = np.isin(np.arange(vocab_size), list(self.eos_ids))
        self.may_close = _may_complete(tokenizer, vocab_size, {text[-1] for text in action_ends})
        # Each token of such a text holds at least one of its bytes; one more, since a decoder may drop a leading blank.
        self._most_tokens = 1 + max((len(text.encode()) for text in self.action_ends), default=0)

    def text(self, action_ids: np.ndarray) -> str:
        """Decode an action as the environment reads it, without the end-of-text token."""
        ids = action_ids[:-1] if len(action_ids) and int(action_ids[-1]) in self.eos_ids else action_ids
        return decode(self.tokenizer, ids.tolist())

    def closes(self, action_ids: np.ndarray) -> bool:
        """Whether the last of these tokens completes a text that ends actions."""
        tail = decode(self.tokenizer, action_ids[-self._most_tokens :].tolist())
        if not any(end in tail for end in self.action_ends):
            return False
        text = self.text(action_ids)
        return any(end in text for end in self.action_ends)


def _may_complete(tokenizer: PreTrainedTokenizerBase, vocab_size: int, characters: set[str]) -> np.ndarray:
    """Find the ids that have one of these characters in their text, [vocab_size] bool."""
    if not all(character.isascii() and character.isprintable() and character != " " for character in characters):
        return np.ones(vocab_size, dtype=bool)  # a character that vocabularies spell in ways of their own
    # In its vocabulary every tokenizer spells such a character as it is, or as "<0x3E>".
    spelled = [*characters, *(f"<0x{ord(character):02X}>" for character in characters)]
    tokens = tokenizer.convert_ids_to_tokens(list(range(vocab_size)))
    return np.array([token is not None and any(part in token for part in spelled) for token in tokens])


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    named = model.generation_config.eos_token_id if model.generation_config else None
    ids = named if isinstance(named, list) else [named]
    return frozenset(token_id for token_id in (*ids, tokenizer.eos_token_id) if token_id is not None)
