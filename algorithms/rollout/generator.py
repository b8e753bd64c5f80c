"""A network as a `generate(prompts) -> texts` callable: greedy, many prompts at once, each up to its action's end."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from agentic_rag_env.actions import THINK_CLOSE
from agentic_rag_env.probes import Prompt
from algorithms.learner import ranks
from algorithms.rollout.engine import Engine
from algorithms.rollout.tokenization import encode_plain, encode_prompts, opened_thought


class Generator:
    """Continues prompts, up to the end of text or the first closing tag.

    The parts of a `Prompt` reach the model as in an episode. The message goes through the chat template if there is
    one, and what follows is plain text behind it. Where the template opens a thought, the text behind it goes on with
    that thought; if it begins with none, the thought is closed at once. Of several processes, the first one calls, and
    `answer` is what the others do meanwhile (see `ranks.led`).

    Args:
        engine: The engine that writes, at temperature 0.
    """

    def __init__(self, engine: Engine) -> None:
        assert engine.config.temperature == 0
        self.engine = engine
        self.opened_thought = opened_thought(engine.tokenizer)

    def __call__(self, prompts: Sequence[str]) -> list[str | None]:
        """See `agentic_rag_env.probes.Generate`. A prompt that is too long gets None, and a warning says so."""
        ranks.ask(list(prompts))
        return self.answer(prompts)

    def answer(self, prompts: Sequence[str]) -> list[str | None]:
        """Continue this process's share of the prompts, and return what all processes have written."""
        return ranks.in_order(self._continued(ranks.share(prompts)))

    def _continued(self, given: Sequence[str]) -> list[str | None]:
        prompts = [each if isinstance(each, Prompt) else Prompt(each) for each in given]
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
                    number = number_of.pop(action.row)
                    # Text that a chat template has begun for the model belongs to the model's first turn.
                    is_first = not (prompts[number].transcript or prompts[number].opening)
                    texts[number] = (self.opened_thought if is_first else "") + action.text
                    self.engine.close([action.row])
                    free.append(action.row)
        finally:
            self.engine.close(list(number_of))

    def _encode(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        messages, transcripts, openings = zip(*map(self._behind_template, prompts), strict=True)
        # Tokenized apart, as in an episode, where the environment's text and the model's are never tokenized together.
        encoded = zip(
            encode_prompts(self.engine.tokenizer, messages),
            encode_plain(self.engine.tokenizer, transcripts),
            encode_plain(self.engine.tokenizer, openings),
            strict=True,
        )
        return [np.concatenate(pieces) for pieces in encoded]

    def _behind_template(self, prompt: Prompt) -> tuple[str, str, str]:
        """The parts of a prompt, without the tag with which the chat template opens the model's reply already."""
        message, transcript, opening = prompt.message, prompt.transcript, prompt.opening
        begun = self.opened_thought
        if not begun or not (transcript or opening):
            return message, transcript, opening
        if transcript.startswith(begun):
            return message, transcript.removeprefix(begun), opening
        if not transcript and opening.startswith(begun):
            return message, transcript, opening.removeprefix(begun)
        return message, THINK_CLOSE + transcript, opening
