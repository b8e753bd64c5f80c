"""A second engine, as simple as one can be: the whole history through `generate` for every action, row by row."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from algorithms.rollout.engine import Action


class NaiveEngine:
    """See `algorithms.rollout.engine.Engine`; it keeps no cache and shares nothing with the one of the project."""

    def __init__(self, model, tokenizer, config, *, num_rows, action_ends):
        self.tokenizer, self.config, self.num_rows = tokenizer, config, num_rows
        self.action_ends, self.computed_tokens = action_ends, 0
        self.histories: dict[int, list[int]] = {}
        self.pending: dict[int, np.ndarray | None] = {}
        self.set_weights(model)

    def set_weights(self, model):
        self.model = model

    def open(self, row, ids, uniforms=None):
        assert row not in self.histories
        self.histories[row], self.pending[row] = ids.tolist(), uniforms

    def append(self, row, ids, uniforms=None):
        assert row not in self.pending
        if self.histories[row][-1] == self.tokenizer.eos_token_id:
            self.histories[row].pop()
        self.histories[row] += ids.tolist()
        self.pending[row] = uniforms

    def close(self, rows):
        for row in rows:
            del self.histories[row]
            self.pending.pop(row, None)

    def write(self):
        assert self.pending.keys() == self.histories.keys(), "every ended action is either continued or closed"
        if not self.pending:
            return []
        row = min(self.pending)
        return [self._write_one(row, self.pending.pop(row))]

    def advance(self, max_steps):
        """Do nothing: `generate` writes whole actions."""

    def _write_one(self, row, uniforms):
        history = self.histories[row]
        draw = _Draw(uniforms, self.config.temperature)
        written = self.model.generate(
            torch.tensor([history]),
            attention_mask=torch.ones(1, len(history), dtype=torch.long),
            max_new_tokens=min(self.config.max_new_tokens, self.config.max_tokens - len(history)),
            do_sample=False,
            use_cache=False,
            logits_processor=LogitsProcessorList([draw]),
            stopping_criteria=StoppingCriteriaList([_Ended(self.tokenizer, len(history), self.action_ends)]),
            pad_token_id=0,
        )[0, len(history) :].tolist()
        history += written
        told = written[:-1] if written[-1] == self.tokenizer.eos_token_id else written
        logprobs = np.array(draw.logprobs, dtype=np.float32)
        text = self.tokenizer.decode(told, clean_up_tokenization_spaces=False)
        return Action(row, np.array(written), logprobs, text, len(told) < len(written))


class _Draw(LogitsProcessor):
    """Leaves only the token that the next uniform number picks."""

    def __init__(self, uniforms, temperature):
        self.uniforms, self.temperature, self.logprobs = uniforms, temperature, []

    def __call__(self, input_ids, scores):
        probabilities = (scores[0].double() / (self.temperature or 1.0)).softmax(-1)
        if self.temperature == 0:
            token = int(probabilities.argmax())
        else:
            reached = probabilities.cumsum(0) > self.uniforms[len(self.logprobs)] * probabilities.sum()
            token = int(reached.int().argmax())
        self.logprobs.append(float(probabilities[token].log()))
        only = torch.full_like(scores, -torch.inf)
        only[0, token] = 0.0
        return only


class _Ended(StoppingCriteria):
    def __init__(self, tokenizer, start, action_ends):
        self.tokenizer, self.start, self.action_ends = tokenizer, start, action_ends

    def __call__(self, input_ids, scores, **kwargs):
        text = self.tokenizer.decode(input_ids[0, self.start :], clean_up_tokenization_spaces=False)
        return torch.tensor([any(end in text for end in self.action_ends)])
