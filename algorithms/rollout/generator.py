"""A network as a `generate(prompts) -> texts` callable: greedy, many prompts at once, each up to its action's end."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from agentic_rag_env.probes import Prompt
from algorithms.learner import ranks
from algorithms.rollout.engine import Engine
from algorithms.rollout.tokenization import encode_plain, encode_prompts


class Generator:
    """Continues prompts, up to the end of text or the first closing tag.

    The parts of a `Prompt` reach the model as in an episode. The message goes through the chat template if there is
    one, and what follows is plain text behind it. Of several processes, the first one calls, and `answer` is what the
    others do meanwhile (see `ranks.led`).

    Args:
        engine: The engine that writes, at temperature 0.
    """

    def __init__(self, engine: Engine) -> None:
        assert engine.config.temperature == 0
        self.engine = engine

    def __call__(self, prompts: Sequence[str]) -> list[str | None]:
        """See `agentic_rag_env.probes.Generate`. A prompt that is too long gets None, and a warning says so."""
        ranks.ask(list(prompts))
        return self.answer(prompts)

    def answer(self, prompts: Sequence[str]) -> list[str | None]:
        """Continue this process's share of the prompts, and return what all processes have written."""
        return ranks.in_order(self._continued(ranks.share(prompts)))

    def _continued(self, prompts: Sequence[str]) -> list[str | None]:
        encoded = self._encode(prompts) if prompts else []
        max_tokens = self.engine.config.max_tokens
        fitting = [number for number, ids in enumerate(encoded) if len(ids) < max_tokens]
        if len(fitting) < len(prompts):
            warnings.warn(
                f"{len(prompts) - len(fitting)} of {len(prompts)} prompts have at least max_tokens={max_tokens} "
                "tokens and stay without an answer; raise rollout.max_tokens.",
                stacklevel=2,
            )
        # Prompts of similar length are read together, the longest first, so that memory runs out at once if it does.
        waiting = sorted(fitting, key=lambda number: len(encoded[number]))
        texts: list[str | None] = [None] * len(prompts)
        number_of: dict[int, int] = {}
        free = list(range(self.engine.num_rows))
        try:
            while True:
                while free and waiting:
                    row, number = free.pop(), waiting.pop()
                    self.engine.open(row, encoded[number])
                    number_of[row] = number
                if not (actions := self.engine.write()):
                    return texts
                for action in actions:
                    texts[number_of.pop(action.row)] = action.text
                    self.engine.close([action.row])
                    free.append(action.row)
        finally:
            self.engine.close(list(number_of))

    def _encode(self, prompts: Sequence[str]) -> list[np.ndarray]:
        parts = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
        # Tokenized apart, as in an episode, where the environment's text and the model's are never tokenized together.
        encoded = zip(
            encode_prompts(self.engine.tokenizer, [prompt.message for prompt in parts]),
            encode_plain(self.engine.tokenizer, [prompt.transcript for prompt in parts]),
            encode_plain(self.engine.tokenizer, [prompt.opening for prompt in parts]),
            strict=True,
        )
        return [np.concatenate(pieces) for pieces in encoded]
