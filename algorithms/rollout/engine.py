"""What a rollout engine is: rows of token ids in, actions out, every token computed once.

An engine knows no environment and no question. The player of episodes and the generator of the probes both use the
verbs of `Engine`: open rows with a prompt, write until actions end, append what came back, close. While the answers to
some rows are under way, the player lets the others advance. Ours is `cached_engine.CachedEngine`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from algorithms.rollout.config import RolloutConfig


@dataclass(frozen=True, slots=True)
class Action:
    """What a row has written.

    Attributes:
        row: Which row.
        ids: [n] int64, exactly as sampled.
        logprobs: [n] float32, nats, under the whole distribution at the engine's temperature.
        text: The action as an environment reads it, without the end-of-text token.
        ends_text: The last id is an end-of-text token.
    """

    row: int
    ids: np.ndarray
    logprobs: np.ndarray
    text: str
    ends_text: bool


class Engine(Protocol):
    """Writes actions for rows of token ids.

    A row is opened with a prompt, and `write` writes its action. Then the row is continued with `append`, or closed.
    The engine decides how many rows are computed together, and in which order. An action depends only on the row's own
    tokens and uniforms.

    Attributes:
        num_rows: Number of rows; they are numbered from 0.
        config: How the engine writes.
        tokenizer: The model's tokenizer.
        computed_tokens: Tokens that have gone through the network so far.
    """

    num_rows: int
    config: RolloutConfig
    tokenizer: PreTrainedTokenizerBase
    computed_tokens: int

    def set_weights(self, model: PreTrainedModel) -> None:
        """Write with these weights from now on. No row may be open."""
        ...

    def open(self, row: int, ids: np.ndarray, uniforms: np.ndarray | None = None) -> None:
        """Begin a row.

        Args:
            row: A row that is not open.
            ids: [p] int64, fewer than `config.max_tokens`.
            uniforms: [config.max_new_tokens] float64 in [0, 1); the n-th decides the n-th token of the action. They may
                be missing only at temperature 0.
        """
        ...

    def append(self, row: int, ids: np.ndarray, uniforms: np.ndarray | None = None) -> None:
        """Continue a row whose action was returned. The arguments are those of `open`; `ids` follow the row's tokens.

        An end-of-text token that ended the action is left out first, as in Search-R1, unless no ids are given: the
        observation follows the model's words inside the same message.
        """
        ...

    def write(self) -> list[Action]:
        """Write until some of the open rows have ended their actions.

        Returns:
            The actions of these rows, at least one if any row is open. An action ends with an end-of-text token, with
            the token that completes one of the action ends, or where `config` leaves no room for another token.
        """
        ...

    def advance(self, max_steps: int) -> None:
        """Write on in the rows that are in the middle of an action, while others are neither continued nor closed yet.

        Actions that end here are returned by the next `write`. How far each row gets may depend on the rows, but never
        on time. An engine that can't pause within an action does nothing.

        Args:
            max_steps: Most tokens that each of these rows writes.
        """
        ...

    def close(self, rows: Iterable[int]) -> None:
        """End rows. Before the next `write`, each row whose action was returned must be continued or closed."""
        ...
