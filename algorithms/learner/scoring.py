"""What networks say about the tokens that a model wrote: hidden states, logits, log-probabilities and values.

Prompt, observations and padding go through the backbone only. The LM head sees only the positions that predict
model-written tokens, a chunk at a time; and what is computed from logits, be it a log-probability or the gradient of a
divergence, is computed for a block of a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from algorithms.learner import ops, ranks, sharding
from algorithms.learner.collate import micro_batches, predicting_positions
from algorithms.learner.decoder import pays_to_share
from algorithms.learner.networks import Critic, backbone_hidden, lm_logits
from algorithms.learner.precision import autocast
from algorithms.learner.transfers import send
from algorithms.learner.types import Batch, Tokens

#: Most logits of a chunk on a CPU. Beyond 32 MiB the allocator gives a tensor back to the system when it is freed, and
#: its pages are made anew for the next one, which doubles the time of a step over a large vocabulary.
_MAX_CPU_LOGITS = 8_000_000
#: A divergence and its gradient make a dozen tensors of the size of its logits. A block of an eighth of a chunk makes
#: these cheap beside the chunk; and one of 4 MB stays in the processor's cache, so that a smaller one gains nothing.
_BLOCKS_OF_CHUNK, _MIN_BLOCK_LOGITS = 8, 1_000_000


def chunk_tokens(most: int, vocab_size: int, *, on_cpu: bool) -> int:
    """Tokens that go through an LM head at once: as many as the setting allows, and on a CPU no more than are fast."""
    return max(1, min(most, _MAX_CPU_LOGITS // vocab_size)) if on_cpu else most


def slices(count: int, size: int) -> Iterator[slice]:
    """Cut a number of tokens into consecutive pieces of a size; the last one may be smaller."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


@dataclass(frozen=True, slots=True)
class Part:
    """A micro-batch of this process's share of a batch.

    Attributes:
        rows: [b] int64, its rows in the batch.
        micro: The trajectories, [b, t].
        at: Rows and columns in `micro` of the positions that predict model-written tokens, each [n] int64.
        counts: False: it is another process's, computed here again only so that all make as many passes.
    """

    rows: Tensor
    micro: Batch
    at: tuple[Tensor, Tensor]
    counts: bool = True


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Makes forward passes over the model-written tokens, alike for every network.

    Attributes:
        vocab_size: V; logits beyond it are cut off before any softmax.
        temperature: Logits are divided by it.
        precision: Precision of the computation, see `precision.autocast`.
        micro_batch_tokens: Tokens, padding included, that go through a backbone at once. A start that trajectories
            have in common counts once where it is computed once.
        chunk_tokens: Model-written tokens that go through an LM head at once.
        in_step: Every process computes as many micro-batches as any other, as sharded networks need it.
        reads_once: The networks compute a start in common once, where that pays.
    """

    vocab_size: int
    temperature: float = 1.0
    precision: str = "float32"
    micro_batch_tokens: int = 4096
    chunk_tokens: int = 1024
    in_step: bool = False
    reads_once: bool = True

    @torch.no_grad()
    def logprobs(
        self, network: PreTrainedModel, batch: Batch, is_teacher: bool = False, only: Tensor | None = None
    ) -> Tensor:
        """Log-probabilities of the model-written tokens, [B, T] float32 in nats, 0 elsewhere.

        With `only`, [B] bool, they are computed for these trajectories, and are 0 in the others.
        """
        read = self.hidden_of_teacher if is_teacher else self.hidden

        def compute(micro: Batch, rows: Tensor, columns: Tensor) -> Tensor:
            return self._logprobs(network, read(network, micro, rows, columns), micro.written_ids[rows, columns + 1])

        return self._at_model_tokens(batch, compute, network, only=only)

    @torch.no_grad()
    def logprobs_and_values(self, policy: PreTrainedModel, critic: Critic, batch: Batch) -> tuple[Tensor, Tensor]:
        """The policy's `logprobs`, and the `values` of a critic that shares its hidden states, in one forward pass."""

        def compute(micro: Batch, rows: Tensor, columns: Tensor) -> Tensor:
            hidden = self.hidden(policy, micro, rows, columns)
            logprobs = self._logprobs(policy, hidden, micro.written_ids[rows, columns + 1])
            return torch.stack((logprobs, critic.read(hidden)))

        logprobs, values = self._at_model_tokens(batch, compute, policy, outputs=(2,))
        return logprobs, values

    def _logprobs(self, network: PreTrainedModel, hidden: Tensor, ids: Tensor) -> Tensor:
        chunks = zip(hidden.split(self.chunk_tokens), ids.split(self.chunk_tokens), strict=True)
        logprobs_of = ops.gather_logprobs
        return torch.cat([self._in_blocks(logprobs_of, self.logits(network, part), each) for part, each in chunks])

    @torch.no_grad()
    def kl_and_logprobs(
        self,
        policy: PreTrainedModel,
        other: PreTrainedModel,
        batch: Batch,
        is_teacher: bool = False,
        only: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """KL(policy || other) over the vocabulary where a model wrote, and the other's `logprobs`, in the same passes.

        Both are [B, T] float32 in nats, 0 elsewhere.

        With `only`, [B] bool, they are computed for these trajectories, and are 0 in the others.
        """
        read_by_other = self.hidden_of_teacher if is_teacher else self.hidden

        def compute(micro: Batch, rows: Tensor, columns: Tensor) -> Tensor:
            readings = (self.hidden, policy), (read_by_other, other)
            hidden = (read(network, micro, rows, columns).split(self.chunk_tokens) for read, network in readings)
            ids = micro.written_ids[rows, columns + 1].split(self.chunk_tokens)
            computed = []
            for part, other_part, each in zip(*hidden, ids, strict=True):
                theirs = self.logits(other, other_part)
                divergence = self._in_blocks(ops.reverse_kl, self.logits(policy, part), theirs)
                computed.append(torch.stack((divergence, self._in_blocks(ops.gather_logprobs, theirs, each))))
            return torch.cat(computed, dim=1)

        divergence, logprobs = self._at_model_tokens(batch, compute, policy, other, only=only, outputs=(2,))
        return divergence, logprobs

    @torch.no_grad()
    def values(self, critic: Critic, batch: Batch) -> Tensor:
        """The critic's values before the model-written tokens, [B, T] float32, 0 elsewhere."""
        return self._at_model_tokens(batch, lambda micro, *at: self.values_at(critic, micro, *at), critic)

    def values_at(self, critic: Critic, micro: Batch, rows: Tensor, columns: Tensor) -> Tensor:
        """Values [n] float32 of the states at the given positions; they carry gradient."""
        with autocast(micro.input_ids.device, self.precision):
            read = (micro.input_ids, None, rows, columns, micro.num_shared)
            values = sharding.gathered(critic, lambda: critic.values(*read))
        return ops.at_least_float32(values)

    def hidden(self, network: PreTrainedModel, micro: Batch, rows: Tensor, columns: Tensor) -> Tensor:
        """Hidden states [n, d]: the backbone's output at the given positions."""
        with autocast(micro.input_ids.device, self.precision):
            read = (network, micro.input_ids, None, (rows, columns), micro.num_shared)
            return sharding.gathered(network, lambda: backbone_hidden(*read))

    def hidden_of_teacher(self, teacher: PreTrainedModel, micro: Batch, rows: Tensor, columns: Tensor) -> Tensor:
        """The teacher's hidden states for the same tokens, behind the prompts that the teacher reads."""
        if (read := micro.read_by_teacher) is None:
            return self.hidden(teacher, micro, rows, columns)
        return self.hidden(teacher, read, *predicting_positions(read.response_mask))

    def logits(self, network: PreTrainedModel, hidden: Tensor) -> Tensor:
        """Logits [n, V] float32 from hidden states [n, d], temperature applied."""
        with autocast(hidden.device, self.precision):
            logits = lm_logits(network, hidden, self.vocab_size)
        return logits if self.temperature == 1 else logits / self.temperature

    @property
    def block_tokens(self) -> int:
        """Tokens of a chunk for which a loss and its gradient are computed at once."""
        return max(1, self.chunk_tokens // _BLOCKS_OF_CHUNK, _MIN_BLOCK_LOGITS // self.vocab_size)

    def _in_blocks(self, function: Callable[..., Tensor], *of_tokens: Tensor) -> Tensor:
        """Compute a function of tensors [n, ...] that answers [n], block by block."""
        blocks = slices(len(of_tokens[0]), self.block_tokens)
        return torch.cat([function(*(each[block] for each in of_tokens)) for block in blocks])

    def split(self, batch: Batch, only: Tensor | None = None) -> Iterator[Part]:
        """Split this process's share of a batch into micro-batches that hold model-written tokens.

        The masks are read once. From them the host knows lengths and positions, and never waits for the device between
        the micro-batches.

        Args:
            batch: The trajectories.
            only: [B] bool, the trajectories that count; None: all.
        """
        device = batch.input_ids.device
        attention_mask, response_mask = torch.stack((batch.attention_mask, batch.response_mask)).cpu()
        assert (attention_mask[:, 1:] <= attention_mask[:, :-1]).all(), "a batch is padded on the right"
        lengths, has_words = attention_mask.sum(dim=1).tolist(), response_mask.any(dim=1).tolist()
        counted = range(len(lengths)) if only is None else only.nonzero()[:, 0].tolist()
        own = ranks.share(sorted((row for row in counted if has_words[row]), key=lambda row: -lengths[row]))
        num_shared = batch.num_shared if self.reads_once and pays_to_share(len(own), batch.num_shared, device) else 0
        parts = [
            [own[place] for place in places]
            for places in micro_batches([lengths[row] for row in own], self.micro_batch_tokens, num_shared)
        ]
        num_own = len(parts)
        if self.in_step and (missing := max(ranks.gathered(num_own)) - num_own):
            parts += missing * [[min((row for row in range(len(lengths)) if has_words[row]), key=lengths.__getitem__)]]
        for number, picked in enumerate(parts):
            here, length = torch.tensor(picked), max(lengths[row] for row in picked)
            at = send(torch.stack(predicting_positions(response_mask[here, :length])), device)
            rows = send(here, device)
            yield Part(rows, batch.select(rows, length), (at[0], at[1]), counts=number < num_own)

    def _at_model_tokens(
        self,
        batch: Batch,
        compute: Callable[[Batch, Tensor, Tensor], Tensor],
        *networks: nn.Module,
        only: Tensor | None = None,
        outputs: tuple[int, ...] = (),
    ) -> Tensor:
        result = batch.old_logprobs.new_zeros((*outputs, *batch.old_logprobs.shape))
        for part in self.split(batch, only):
            rows, columns = part.at
            computed = compute(part.micro, rows, columns)
            if part.counts:
                result[..., part.rows[rows], columns + 1] = computed.to(result.dtype)
        sharding.release(*networks)
        return ranks.summed(result)


def gather_tokens(micro: Batch, sequence_ids: Tensor, rows: Tensor, columns: Tensor) -> Tokens:
    """Gather the model-written tokens of a micro-batch.

    Args:
        micro: The micro-batch, b trajectories.
        sequence_ids: [b] int64.
        rows: [n] int64, rows of the positions that predict the tokens.
        columns: [n] int64, columns of these positions.
    """

    def pick(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows, columns + 1]

    return Tokens(
        ids=micro.written_ids[rows, columns + 1],
        sequence_ids=sequence_ids[rows],
        correct=micro.correct[rows],
        old_logprobs=micro.old_logprobs[rows, columns + 1],
        sampled_logprobs=pick(micro.sampled_logprobs),
        old_values=pick(micro.values),
        advantages=pick(micro.advantages),
        returns=pick(micro.returns),
        ref_logprobs=pick(micro.ref_logprobs),
        teacher_logprobs=pick(micro.teacher_logprobs),
    )


def slice_tokens(tokens: Tokens, part: slice) -> Tokens:
    """Take consecutive tokens of a micro-batch."""
    sliced: dict[str, Any] = {}
    for field in fields(Tokens):
        value = getattr(tokens, field.name)
        sliced[field.name] = None if value is None else value[part]
    return Tokens(**sliced)
