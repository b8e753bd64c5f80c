"""Drawing a token from logits, and recognizing the token that ends an action."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentic_rag_env.actions import CLOSING_TAGS
from agentic_rag_env.errors import ConfigurationError
from algorithms.rollout.tokenization import decode


@dataclass
class RolloutConfig:
    """How the policy writes.

    Attributes:
        temperature: Divides the logits; 0 takes the most probable token instead of drawing one.
        top_p: Draw among the fewest tokens with at least this share of the probability, in (0, 1].
        top_k: Draw among this many most probable tokens; 0: all.
        max_new_tokens: Most tokens of one action.
        max_tokens: Most tokens of an episode: prompt, actions and observations. One that needs more is cut off,
            and earns what the reward gives an episode without an answer.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 48
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigurationError(f"temperature must be at least 0 (0: greedy), got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"top_p must be in (0, 1], got {self.top_p}; 1 switches it off.")
        if self.top_k < 0:
            raise ConfigurationError(f"top_k must be at least 0, got {self.top_k}; 0 switches it off.")
        if self.max_new_tokens < 1:
            raise ConfigurationError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if self.max_tokens < 2:
            raise ConfigurationError(f"max_tokens must be at least 2 (prompt and action), got {self.max_tokens}.")


def sample(logits: Tensor, uniforms: Tensor, config: RolloutConfig) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    The log-probabilities are those of the full distribution at the temperature, also where `top_p` or `top_k` restrict
    the draw, because that is the distribution the learner evaluates.

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
    probabilities = (logits / config.temperature).softmax(dim=-1)
    if config.top_p < 1 or config.top_k:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        ids = order.gather(1, _invert(_restrict(ordered, config), uniforms))
    else:
        ids = _invert(probabilities, uniforms)
    return ids.squeeze(1), probabilities.gather(1, ids).log().squeeze(1)


def _restrict(ordered: Tensor, config: RolloutConfig) -> Tensor:
    """Zero what `top_k` and then `top_p` leave out of probabilities in descending order."""
    if config.top_k:
        ordered = ordered[:, : config.top_k]
    before = ordered.cumsum(dim=-1) - ordered
    return ordered.masked_fill(before >= config.top_p * ordered.sum(dim=-1, keepdim=True), 0.0)


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """[n, 1] indices of the first cumulative weights above the uniforms; never one of weight zero."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    return torch.searchsorted(cumulative, torch.minimum(uniforms[:, None] * total, below_total), right=True)


class ActionEnd:
    """Recognizes the last token of an action: an end-of-text id, or the one that completes a closing tag.

    Tags are found in the text, whichever tokens spell them. Only tokens with a ">" can complete one, so only then is
    text looked at.

    Args:
        model: Its generation settings may name several end-of-text ids.
        tokenizer: Decodes; may name one more.
        vocab_size: Number of ids that can be sampled.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.eos_ids = _eos_ids(model, tokenizer)
        self.is_eos = np.isin(np.arange(vocab_size), list(self.eos_ids))
        # In its vocabulary every tokenizer spells ">" as it is, or as "<0x3E>".
        tokens = tokenizer.convert_ids_to_tokens(list(range(vocab_size)))
        self.may_close = np.array([token is not None and ">" in token for token in tokens])
        self._piece = lru_cache(maxsize=None)(lambda token_id: decode(tokenizer, [token_id]))

    def text(self, action_ids: np.ndarray) -> str:
        """The text of an action as the environment reads it, without the end-of-text token."""
        ids = action_ids[:-1] if len(action_ids) and int(action_ids[-1]) in self.eos_ids else action_ids
        return decode(self.tokenizer, ids.tolist())

    def closes(self, action_ids: np.ndarray) -> bool:
        """Whether the last of these tokens completes a closing tag."""
        # Each token of a tag holds at least one of its characters, so a tag lies within as many tokens.
        tail = "".join(map(self._piece, action_ids[-max(map(len, CLOSING_TAGS)) :].tolist()))
        return any(tag in tail for tag in CLOSING_TAGS) and any(tag in self.text(action_ids) for tag in CLOSING_TAGS)


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    named = model.generation_config.eos_token_id if model.generation_config else None
    ids = named if isinstance(named, list) else [named]
    return frozenset(token_id for token_id in (*ids, tokenizer.eos_token_id) if token_id is not None)
