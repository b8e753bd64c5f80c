"""How a policy writes: settings alone, without the libraries that use them."""

from __future__ import annotations

from dataclasses import dataclass

from agentic_rag_env.errors import ConfigurationError


@dataclass
class RolloutConfig:
    """How the policy writes.

    Attributes:
        temperature: Divides the logits; 0 takes the most probable token instead of drawing one.
        top_p: Draw among the fewest tokens with at least this share of the probability, in (0, 1].
        top_k: Draw among this many most probable tokens; 0: all.
        max_new_tokens: Most tokens of one action.
        max_tokens: Most tokens of an episode: prompt, actions and observations. An episode that needs more is cut off,
            and earns what the reward gives without an answer.
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
