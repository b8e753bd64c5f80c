"""A network as a `generate(prompts) -> texts` callable: greedy, many prompts at once, each until its action ends."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from agentic_rag_env.probes import Prompt
from algorithms.learner.networks import autocast, lm_logits
from algorithms.rollout.kv_cache import EpisodeCache
from algorithms.rollout.player import RolloutEngine
from algorithms.rollout.tokenization import encode_plain, encode_prompts

_MAX_PREFILL_TOKENS = 16_384


class Generator:
    """Continues prompts greedily, up to the end of text or the first closing tag.

    The parts of a `Prompt` reach the model as in an episode: the message through the chat template if there is one,
    what follows as plain text behind it.

    Args:
        engine: Whose model is read, with its limits of tokens; its temperature plays no part, and as many prompts are
            continued at once as it plays episodes.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """See `agentic_rag_env.probes.Generate`. A prompt that is too long gets no text, and a warning says so."""
        if not prompts:
            return []
        encoded = self._encode(prompts)
        fitting = [row for row, ids in enumerate(encoded) if len(ids) < self.engine.config.max_tokens]
        if len(fitting) < len(prompts):
            warnings.warn(
                f"{len(prompts) - len(fitting)} of {len(prompts)} prompts have at least max_tokens="
                f"{self.engine.config.max_tokens} tokens and stay without an answer; raise rollout.max_tokens.",
                stacklevel=2,
            )
        fitting.sort(key=lambda row: len(encoded[row]))
        texts = [""] * len(prompts)
        model, batch_size = self.engine.model, self.engine.envs.num_envs
        was_training = model.training
        model.eval()
        try:
            with torch.inference_mode(), autocast(model.device, self.engine.precision):
                for start in range(0, len(fitting), batch_size):
                    rows = fitting[start : start + batch_size]
                    for row, ids in zip(rows, self._continue([encoded[row] for row in rows]), strict=True):
                        texts[row] = self.engine.action_end.text(ids)
        finally:
            model.train(was_training)
        return texts

    def _encode(self, prompts: Sequence[str]) -> list[np.ndarray]:
        parts = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
        # Apart, as in an episode, where the environment's text and the model's are never tokenized together.
        encoded = zip(
            encode_prompts(self.engine.tokenizer, [prompt.message for prompt in parts]),
            encode_plain(self.engine.tokenizer, [prompt.transcript for prompt in parts]),
            encode_plain(self.engine.tokenizer, [prompt.opening for prompt in parts]),
            strict=True,
        )
        return [np.concatenate(pieces) for pieces in encoded]

    def _continue(self, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The ids that follow some prompts, which are all computed together."""
        engine = self.engine
        lengths = np.array([len(ids) for ids in prompts])
        limits = np.minimum(engine.config.max_new_tokens, engine.config.max_tokens - lengths)
        cache = EpisodeCache(len(prompts))
        hidden = self._prefill(cache, prompts, lengths)
        written = np.zeros((len(prompts), limits.max()), dtype=np.int64)
        counts = np.zeros(len(prompts), dtype=np.int64)
        # Prompts whose text goes on, in the order of the cache's rows; the rows behind them are done.
        running = np.arange(len(prompts))
        while True:
            tokens = lm_logits(engine.model, hidden, engine.vocab_size).argmax(dim=-1).cpu().numpy()
            written[running, counts[running]] = tokens
            counts[running] += 1
            running = self._drop_ended(cache, running, self._ended(running, written, counts, limits), lengths, counts)
            if not len(running):
                return [written[row, :count] for row, count in enumerate(counts)]
            last = written[running, counts[running] - 1]
            hidden = self._forward(cache, last[:, None], (lengths + counts)[running][:, None] - 1)[:, 0]

    def _prefill(self, cache: EpisodeCache, prompts: Sequence[np.ndarray], lengths: np.ndarray) -> Tensor:
        """Compute prompts; returns the hidden states [n, d] of their last tokens."""
        hidden = []
        portion = max(1, _MAX_PREFILL_TOKENS // int(lengths.max()))
        for start in range(0, len(prompts), portion):
            chosen = lengths[start : start + portion]
            input_ids = np.full((len(chosen), chosen.max()), self.engine.pad_id, dtype=np.int64)
            for row, ids in enumerate(prompts[start : start + portion]):
                input_ids[row, : len(ids)] = ids
            positions = np.broadcast_to(np.arange(input_ids.shape[1]), input_ids.shape)
            states = self._forward(cache, input_ids, positions, start)
            hidden.append(states[self._tensor(np.arange(len(chosen))), self._tensor(chosen - 1)])
        return torch.cat(hidden)

    def _ended(self, running: np.ndarray, written: np.ndarray, counts: np.ndarray, limits: np.ndarray) -> np.ndarray:
        """Which of the running texts end with the token just written."""
        tokens = written[running, counts[running] - 1]
        ended = self.engine.action_end.is_eos[tokens] | (counts[running] >= limits[running])
        for row in np.flatnonzero(self.engine.action_end.may_close[tokens] & ~ended):
            ended[row] = self.engine.action_end.closes(written[running[row], : counts[running[row]]])
        return ended

    def _drop_ended(
        self, cache: EpisodeCache, running: np.ndarray, ended: np.ndarray, lengths: np.ndarray, counts: np.ndarray
    ) -> np.ndarray:
        """Move the rows of the texts that go on to the front; returns these texts in their new order."""
        num_left = int((~ended).sum())
        these = np.flatnonzero(ended[:num_left])
        those = num_left + np.flatnonzero(~ended[num_left:])
        if len(these):
            cache.swap(self._tensor(these), self._tensor(those), int((lengths + counts)[running].max()))
            running = running.copy()
            running[these] = running[those]
        return running[:num_left]

    def _forward(self, cache: EpisodeCache, input_ids: np.ndarray, positions: np.ndarray, first_row: int = 0) -> Tensor:
        return cache.forward(self.engine.backbone, self._tensor(input_ids), self._tensor(positions), first_row)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=self.engine.model.device)
