"""Text as token ids: the environment for learners whose observations and actions are arrays of integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces

from agentic_rag_env.settings import COUNT, check_value
from agentic_rag_env.types import StepInfo
from agentic_rag_env.wrappers.view import View


class Tokenizer(Protocol):
    """Translates between text and ids, as the tokenizers of transformers do."""

    def encode(self, text: str, add_special_tokens: bool = False) -> Sequence[int]:
        """Ids of a text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        ...


class TokenIds(View[np.ndarray, np.ndarray]):
    """A view of `AgenticRAGEnv` in which the agent reads and writes token ids.

    ## Action Space
    `MultiDiscrete([V + 1] * n)`, one whole turn of n = `max_action_tokens` tokens. V = `vocab_size` stands for no
    token: the turn ends before the first of them.

    ## Observation Space
    `Box(0, V, [m], int64)`, the last m = `max_observation_tokens` tokens of the transcript so far, prompt, turns and
    replies; V on the right where it is shorter. The agent's own tokens stand there as it chose them.

    ## Starting State, Rewards, Episode End, Information
    Those of the environment.

    ## Arguments
    ```python
    tokenizer = transformers.AutoTokenizer.from_pretrained(...)
    env = TokenIds(gymnasium.make("AgenticRAG-v0"), tokenizer, vocab_size=len(tokenizer))
    ids, info = env.reset(seed=0)
    ```

    Args:
        env: The environment to view.
        tokenizer: An object with `encode(text, add_special_tokens=False)` and `decode(ids)`.
        vocab_size: V, above every id that the tokenizer knows.
        max_action_tokens: n, at least 1.
        max_observation_tokens: m, at least 1.

    Raises:
        ConfigurationError: A setting can't work.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        tokenizer: Tokenizer,
        vocab_size: int,
        max_action_tokens: int = 32,
        max_observation_tokens: int = 512,
    ) -> None:
        super().__init__(env)
        check_value("vocab_size", vocab_size, COUNT)
        check_value("max_action_tokens", max_action_tokens, COUNT)
        check_value("max_observation_tokens", max_observation_tokens, COUNT)
        self.tokenizer = tokenizer
        self.no_token = vocab_size
        self.action_space = spaces.MultiDiscrete([vocab_size + 1] * max_action_tokens)
        self.observation_space = spaces.Box(0, vocab_size, (max_observation_tokens,), np.int64)
        self._ids: list[int] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, StepInfo]:  # type: ignore[override]
        """Begin an episode; see `AgenticRAGEnv.reset`."""
        super().reset(seed=seed)
        prompt, info = self.env.reset(seed=seed, options=options)
        self._ids = self._encode(prompt)
        return self._observe(), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, StepInfo]:  # type: ignore[override]
        """Take one turn.

        Args:
            action: [n] ids.
        """
        ids = np.asarray(action).tolist()
        written = ids[: ids.index(self.no_token)] if self.no_token in ids else ids
        reply, reward, terminated, truncated, info = self.env.step(self.tokenizer.decode(written))
        self._ids += written + self._encode(reply)
        return self._observe(), float(reward), terminated, truncated, info

    def _encode(self, text: str) -> list[int]:
        # A question or a passage that spells a control token stays text, where the tokenizer can be told so.
        plain = {"split_special_tokens": True} if hasattr(self.tokenizer, "all_special_tokens") else {}
        return list(self.tokenizer.encode(text, add_special_tokens=False, **plain))

    def _observe(self) -> np.ndarray:
        length = self.observation_space.shape[0]  # type: ignore[index]
        observation = np.full(length, self.no_token, dtype=np.int64)
        shown = self._ids[-length:]
        observation[: len(shown)] = shown
        return observation
