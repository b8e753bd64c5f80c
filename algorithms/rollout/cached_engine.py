"""Our engine: a key-value cache that lives as long as its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from agentic_rag_env.errors import ConfigurationError
from algorithms.learner.collate import num_shared
from algorithms.learner.config import working_dtype
from algorithms.learner.decoder import pays_to_share
from algorithms.learner.networks import lm_logits, logit_width, pad_id
from algorithms.learner.precision import autocast, computes_in_bfloat16
from algorithms.learner.transfers import Arriving, send
from algorithms.rollout.bfloat16_copy import Bfloat16Copy, bfloat16_copy
from algorithms.rollout.config import RolloutConfig
from algorithms.rollout.engine import Action
from algorithms.rollout.kv_cache import EpisodeCache, check_cache
from algorithms.rollout.recorded_steps import RecordedSteps, Recorder
from algorithms.rollout.sampling import ActionEnd, sample

_MAX_PREFILL_TOKENS = 16_384


class CachedEngine:
    """An engine with a key-value cache that lives as long as its rows, in this process.

    Rows write independently of each other. `write` returns as soon as half of the open rows have ended their actions.
    The other rows pause in the middle of theirs.

    Args:
        model: The policy, with full attention in every layer.
        tokenizer: Its tokenizer.
        config: How to write.
        num_rows: Most rows at once.
        action_ends: Texts that end an action, such as closing tags.
        vocab_size: Only ids below it are sampled, and probabilities are normalized over these; None: all ids.
        precision: Precision of the computation, see `precision.autocast`.
        recorder: Makes what records decode steps, for each life of the cache; None: every step is computed anew.

    Raises:
        ConfigurationError: The model's context is too short, or its family can't be computed token by token with this
            cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: RolloutConfig,
        *,
        num_rows: int,
        action_ends: Sequence[str],
        vocab_size: int | None = None,
        precision: str = "float32",
        recorder: Callable[[], Recorder] | None = None,
    ) -> None:
        check_context(model.config.get_text_config(), config)
        check_cache(model)
        self.tokenizer, self.config, self.num_rows, self.precision = tokenizer, config, num_rows, precision
        self.vocab_size = vocab_size or logit_width(model)
        self.action_end = ActionEnd(model, tokenizer, self.vocab_size, action_ends)
        self.computed_tokens = 0
        self._pad_id, self._recorder = pad_id(tokenizer), recorder
        self._pending: dict[int, np.ndarray] = {}
        # By row: the tokens in the cache; the tokens of the action so far, and how many it may have.
        self._lengths = np.zeros(num_rows, dtype=np.int64)
        self._counts = np.zeros(num_rows, dtype=np.int64)
        self._limits = np.zeros(num_rows, dtype=np.int64)
        self._ids = np.zeros((num_rows, config.max_new_tokens), dtype=np.int64)
        self._logprobs = np.zeros((num_rows, config.max_new_tokens), dtype=working_dtype(precision))
        self._uniforms = np.zeros((num_rows, config.max_new_tokens))
        self._open: set[int] = set()
        # Rows whose action was returned, and which have been neither continued nor closed.
        self._returned: set[int] = set()
        self.set_weights(model)

    def _forget(self) -> None:
        self._cache = EpisodeCache(self.num_rows, self.config.max_tokens)
        self._recorded: RecordedSteps | None = None
        if self._recorder is not None:
            self._recorded = RecordedSteps(self._cache, self.config.max_tokens, self._recorder, self.model.device)
        # The cache's places, in the order running (in the middle of an action), waiting (action ended), closed, and
        # the row in each of them.
        self._row_at = np.arange(self.num_rows)
        self._num_running = self._num_open = 0
        # A recorded step that the device computes: the rows, and what is drawn for them.
        self._under_way: tuple[np.ndarray, Arriving] | None = None

    def set_weights(self, model: PreTrainedModel) -> None:
        """See `Engine`."""
        assert not self._open
        self.model = self._reads = model
        self._forget()
        self._copy: Bfloat16Copy | None = None
        if computes_in_bfloat16(model.device, self.precision):
            self._copy = bfloat16_copy(model)
            self._reads = self._copy.model
        self._backbone: Any = self._reads.base_model

    def open(self, row: int, ids: np.ndarray, uniforms: np.ndarray | None = None) -> None:
        """See `Engine`."""
        assert row not in self._open
        self._open.add(row)
        self._lengths[row] = 0
        self._wait(row, ids, uniforms)

    def append(self, row: int, ids: np.ndarray, uniforms: np.ndarray | None = None) -> None:
        """See `Engine`."""
        self._returned.remove(row)
        # The last token of an action is sampled but not yet read.
        last = self._ids[row, self._counts[row] - 1 : self._counts[row]]
        kept = last if len(ids) == 0 else last[~self.action_end.is_eos[last]]
        self._wait(row, np.concatenate((kept, ids)), uniforms)

    def _wait(self, row: int, ids: np.ndarray, uniforms: np.ndarray | None) -> None:
        assert uniforms is not None or self.config.temperature == 0
        self._pending[row] = ids
        if uniforms is not None:
            self._uniforms[row] = uniforms

    def close(self, rows: Iterable[int]) -> None:
        """See `Engine`."""
        closed = list(rows)
        self._open.difference_update(closed)
        self._returned.difference_update(closed)
        for row in closed:
            self._pending.pop(row, None)
        self._lengths[closed] = 0
        if self._num_running and not self._open:  # these rows are given up in the middle of their actions
            self._forget()

    def write(self) -> list[Action]:
        """See `Engine`. When no row is open, the memory of the cache is freed."""
        if not self._open:
            self._forget()
            return []
        with self._computing():
            self._read_pending()
            while self._num_running > self._num_open // 2:
                self._decode()
            self._finish_step()
        ended = self._row_at[self._num_running : self._num_open].tolist()
        self._returned.update(ended)
        return [self._action(row) for row in ended]

    def advance(self, max_steps: int) -> None:
        """See `Engine`."""
        with self._computing():
            for _ in range(max_steps):
                if self._num_running == 0:
                    break
                self._decode()
            self._finish_step()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        was_training = self._reads.training
        self._reads.eval()
        try:
            with torch.inference_mode(), autocast(self.model.device, self.precision):
                yield
        finally:
            self._reads.train(was_training)

    def _action(self, row: int) -> Action:
        ids = self._ids[row, : self._counts[row]].copy()
        logprobs = self._logprobs[row, : self._counts[row]].copy()
        return Action(row, ids, logprobs, self.action_end.text(ids), bool(self.action_end.is_eos[ids[-1]]))

    def _decode(self) -> None:
        """Draw one more token in every running row.

        A recorded step is read one step late: the device goes on with the tokens that it drew, and meanwhile the host
        looks at the step before. A row that turns out to have ended gets a token too many, which nobody takes.
        """
        rows = self._row_at[: self._num_running]
        if self._recorded is None:
            # All that the device needs goes there at once, while it has nothing to do.
            drawn = self._draw(self._tensor(self._inputs(rows)), int(self._lengths[rows].max()) + 1)
            self._take_step(rows, drawn.cpu().numpy())
            return
        places_before = None
        if self._under_way is not None:
            place_of = np.empty(self.num_rows, dtype=np.int64)
            place_of[self._under_way[0]] = np.arange(len(self._under_way[0]))
            places_before = place_of[rows]
        inputs = self._inputs(rows, ahead=int(places_before is not None))
        drawn = self._recorded.draw(self._draw, inputs, self._lengths[self._row_at], places_before)
        self._finish_step(following=(rows.copy(), Arriving(drawn)))

    def _finish_step(self, following: tuple[np.ndarray, Arriving] | None = None) -> None:
        """Take what the step under way has drawn, while the following one is computed."""
        step, self._under_way = self._under_way, following
        if step is not None:
            rows, drawn = step
            running = self._flags(self._row_at[: self._num_running])[rows]
            self._take_step(rows[running], drawn.numpy()[:, running])

    def _inputs(self, rows: np.ndarray, ahead: int = 0) -> np.ndarray:
        """What the next step reads, [3, n]: last token, place in the row, and bits of the uniform.

        Args:
            rows: [n] int64, running.
            ahead: Number of tokens that each row has beyond those that were taken; then the last one is not known here.
        """
        counts = self._counts[rows] + ahead
        uniforms = self._uniforms[rows, np.minimum(counts, self.config.max_new_tokens - 1)]
        return np.stack((self._ids[rows, counts - 1], self._lengths[rows] + ahead, uniforms.view(np.int64)))

    def _take_step(self, rows: np.ndarray, drawn: np.ndarray) -> None:
        self._lengths[rows] += 1
        self.computed_tokens += len(rows)
        self._take(rows, drawn)

    def _draw(self, inputs: Tensor, length: int) -> Tensor:
        """Compute a step on the device: inputs [3, n] as `_inputs` stacks them, to what `_sample` returns."""
        last, places, uniforms = inputs
        hidden = self._cache.forward(self._backbone, last[:, None], places[:, None], length=length)
        return self._sample(hidden[:, 0], uniforms)

    def _read_pending(self) -> None:
        """Read what was opened and appended, and draw the first token of each action."""
        assert not self._returned
        pending, self._pending = self._pending, {}
        end = self._to_front(self._flags(pending), self._num_running, self.num_rows)
        # What is open and neither running nor pending has ended its action in `advance`.
        self._num_open = self._to_front(self._flags(self._open), end, self.num_rows)
        assert self._num_open == len(self._open)
        if not pending:
            return
        self._read_shared(pending, end)
        longest = max(map(len, pending.values()))
        is_long = self._flags(row for row, ids in pending.items() if 2 * len(ids) > longest)
        # A hint of few tokens is not padded to the length of a passage.
        middle = self._to_front(is_long, self._num_running, end)
        rows = self._row_at[self._num_running : end].copy()
        uniforms = self._tensor(self._uniforms[rows, 0].view(np.int64))
        hidden = self._prefill(pending, self._num_running, middle)
        hidden += self._prefill(pending, middle, end)
        self._counts[rows] = 0
        self._limits[rows] = np.minimum(self.config.max_new_tokens, self.config.max_tokens - self._lengths[rows])
        self._num_running = end
        self._take(rows, self._sample(torch.cat(hidden), uniforms).cpu().numpy())

    def _flags(self, rows: Iterable[int]) -> np.ndarray:
        flags = np.zeros(self.num_rows, dtype=bool)
        flags[list(rows)] = True
        return flags

    def _read_shared(self, pending: dict[int, np.ndarray], end: int) -> None:
        """Read once what all rows that begin now have in common, and leave the rest of their prompts pending."""
        places = [place for place in range(self._num_running, end) if not self._lengths[self._row_at[place]]]
        begun = self._row_at[places].tolist()
        count = num_shared([pending[row] for row in begun]) if begun else 0
        if not pays_to_share(len(begun), count, self.model.device):
            return
        first, *others = places
        ids, columns = self._tensor(np.stack((pending[begun[0]][:count], np.arange(count))))
        self._cache.forward(self._backbone, ids[None], columns[None], first, length=count)
        self._cache.copy_start(first, self._tensor(np.array(others)), count)
        self._lengths[begun] = count
        self.computed_tokens += count
        for row in begun:
            pending[row] = pending[row][count:]

    def _prefill(self, pending: dict[int, np.ndarray], start: int, stop: int) -> list[Tensor]:
        """Read the pending tokens of the rows in these places.

        Returns:
            The hidden states of the last tokens, [n, d] for each portion of the rows.
        """
        hidden = []
        while start < stop:
            width = max(len(pending[row]) for row in self._row_at[start:stop])
            rows = self._row_at[start : min(stop, start + max(1, _MAX_PREFILL_TOKENS // width))]
            input_ids = np.full((len(rows), width), self._pad_id, dtype=np.int64)
            for place, row in enumerate(rows):
                input_ids[place, : len(pending[row])] = pending[row]
            # Padding stays in the last column, where no text that goes on has a token: it must not widen the context.
            positions = np.minimum(self._lengths[rows][:, None] + np.arange(width), self.config.max_tokens - 1)
            widths = np.array([len(pending[row]) for row in rows])
            ids, places = self._tensor(np.stack((input_ids, positions)))
            numbers, last = self._tensor(np.stack((np.arange(len(rows)), widths - 1)))
            length = int(positions.max()) + 1
            hidden.append(self._cache.forward(self._backbone, ids, places, start, length=length, at=(numbers, last)))
            self._lengths[rows] += widths
            self.computed_tokens += int(widths.sum())
            start += len(rows)
        return hidden

    def _sample(self, hidden: Tensor, uniforms: Tensor) -> Tensor:
        """Draw ids and their log-probabilities, [2, n] int64, the second as bits, like the uniforms, of float64."""
        logits = lm_logits(self._reads, hidden, self.vocab_size)
        ids, logprobs = sample(logits, uniforms.view(torch.float64), self.config)
        return torch.stack((ids, logprobs.double().view(torch.int64)))

    def _take(self, rows: np.ndarray, drawn: np.ndarray) -> None:
        """Give each of these running rows the token drawn for it, and set those aside whose action it ends."""
        counts = self._counts[rows]
        tokens, bits = drawn
        self._ids[rows, counts] = tokens
        self._logprobs[rows, counts] = bits.view(np.float64)
        self._counts[rows] = counts + 1
        end = self.action_end
        ended = end.is_eos[tokens] | (counts + 1 >= self._limits[rows])
        for place in np.flatnonzero(end.may_close[tokens] & ~ended):
            ended[place] = end.closes(self._ids[rows[place], : counts[place] + 1])
        if ended.any():
            self._num_running = self._to_front(~self._flags(rows[ended]), 0, self._num_running)

    def _to_front(self, chosen: np.ndarray, start: int, stop: int) -> int:
        """Swap places between `start` and `stop` so that the chosen rows come first, and return where they end."""
        flags = chosen[self._row_at[start:stop]]
        end = start + int(flags.sum())
        these = start + np.flatnonzero(~flags[: end - start])
        those = end + np.flatnonzero(flags[end - start :])
        if len(these):
            moved, back = self._tensor(np.stack((these, those)))
            self._cache.swap(moved, back, int(self._lengths.max()) + int(self._under_way is not None))
            self._row_at[these], self._row_at[those] = self._row_at[those], self._row_at[these]
        return end

    def _tensor(self, array: np.ndarray) -> Tensor:
        return send(torch.from_numpy(array), self.model.device)


def check_context(settings: PreTrainedConfig, config: RolloutConfig, name: str = "the model") -> None:
    """Make sure that a model reads episodes as long as the settings allow.

    Args:
        settings: The configuration of the language model.
        config: How to write.
        name: What the error calls the model.

    Raises:
        ConfigurationError: Its context is shorter.
    """
    names = ("max_position_embeddings", "sliding_window", "attention_chunk_size")
    bounds = {name: getattr(settings, name, None) for name in names}
    rope = getattr(settings, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # past this, other rotations hold for all tokens, those in the cache too
        bounds["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    for kind, bound in bounds.items():
        if bound is not None and config.max_tokens > bound:
            raise ConfigurationError(
                f"max_tokens is {config.max_tokens}, but {name}'s {kind} is {bound}, and an episode is read whole. "
                f"Set max_tokens to at most {bound}, or choose a model with a longer context."
            )
