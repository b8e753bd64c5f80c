"""What the teacher computes of stored trajectories: once, and not anew in every pass over them.

The states before the teacher's head are kept, not its logits: [N, d] instead of [N, V]. The head's product gives the
logits of all ids exactly, and costs little beside the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from algorithms.learner import ops, ranks, sharding
from algorithms.learner.scoring import Part, Scorer
from algorithms.learner.types import Batch, Trajectory

#: Bytes of states that are kept at most; where there are more, the teacher reads each batch anew.
MAX_BYTES = 2**29
#: Trajectories that are collated at once. Always the same ones stand together, so that a resumed run rounds alike.
_BLOCK = 256


class TeacherStates:
    """The teacher's last hidden states before the model-written tokens of stored trajectories.

    Args:
        trajectories: Those that are trained on again and again; they must stay the same objects.
        collate: Makes a batch of some of them.
        scorer: Makes the forward passes; the processes share them.
        teacher: The teacher.

    Attributes:
        num_tokens: Tokens that the teacher has read.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        collate: Callable[[Sequence[Trajectory]], Batch],
        scorer: Scorer,
        teacher: PreTrainedModel,
    ) -> None:
        self.num_tokens = sum(each.num_tokens for each in trajectories)
        self._first: dict[int, int] = {}
        count = 0
        for each in trajectories:
            self._first[id(each)] = count
            count += each.num_action_tokens
        blocks = [trajectories[start : start + _BLOCK] for start in range(0, len(trajectories), _BLOCK)]
        self._states = torch.cat([_read(collate(block), scorer, teacher) for block in blocks])

    @staticmethod
    def fit(trajectories: Sequence[Trajectory], teacher: PreTrainedModel) -> bool:
        """Whether there is something to keep, and no more than may be kept."""
        count = sum(each.num_action_tokens for each in trajectories)
        width = teacher.get_output_embeddings().weight.shape[1]
        return 0 < count * width * teacher.dtype.itemsize <= MAX_BYTES

    def mark(self, batch: Batch, trajectories: Sequence[Trajectory]) -> None:
        """Note in a batch where the states of its trajectories are kept."""
        batch.first_states = batch.group_ids.new_tensor([self._first[id(each)] for each in trajectories])

    def of(self, part: Part) -> Tensor:
        """The states [n, d] at the positions of a part of a marked batch."""
        rows, columns = part.at
        number = part.micro.response_mask.cumsum(dim=1)[rows, columns + 1] - 1  # of the token in its trajectory
        return self._states[part.micro.first_states[rows] + number]


@torch.no_grad()
def _read(batch: Batch, scorer: Scorer, teacher: PreTrainedModel) -> Tensor:
    """Compute the states [N, d] of all model-written tokens of a batch, in the order of its rows."""
    mask, width = batch.response_mask, teacher.get_output_embeddings().weight.shape[1]
    number = (mask.flatten().cumsum(dim=0) - 1).view_as(mask)
    states = batch.old_logprobs.new_zeros(int(mask.sum()), width)
    dtype = None
    for part in scorer.split(batch):
        rows, columns = part.at
        hidden = scorer.hidden_of_teacher(teacher, part.micro, rows, columns)
        dtype = hidden.dtype
        if part.counts:
            states[number[part.rows[rows], columns + 1]] = ops.at_least_float32(hidden)
    sharding.release(teacher)
    dtype = next(each for each in ranks.gathered(dtype) if each is not None)  # a process may have had no share
    return ranks.summed(states).to(dtype)
