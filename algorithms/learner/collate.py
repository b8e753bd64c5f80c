"""Trajectories become rectangular tensors. Only here does a token meet the position that predicts it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from algorithms.learner.config import working_dtype
from algorithms.learner.types import Batch, Trajectory

#: What a pass through a network costs beside its tokens, in tokens. The speed is the same with 100 and with 500.
_PASS_TOKENS = 500


def collate(
    trajectories: Sequence[Trajectory], pad_id: int, device: torch.device | str = "cpu", precision: str = "auto"
) -> Batch:
    """Lay trajectories side by side, padded on the right.

    Args:
        trajectories: B trajectories, at least one.
        pad_id: What fills `input_ids` beyond the end of a trajectory. It may be a real token, because the masks decide.
        device: Where the tensors go.
        precision: Precision of the computation, see `working_dtype`.

    Returns:
        The sampled part of a `Batch`; the optional fields are None.
    """
    shape = (len(trajectories), max(trajectory.num_tokens for trajectory in trajectories))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=bool)
    response_mask = np.zeros(shape, dtype=bool)
    written_ids = np.full(shape, pad_id, dtype=np.int64)
    old_logprobs = np.zeros(shape, dtype=working_dtype(precision))
    for row, trajectory in enumerate(trajectories):
        end = len(trajectory.prompt_ids)
        input_ids[row, :end] = trajectory.prompt_ids
        for turn in trajectory.turns:
            written = slice(end, end + len(turn.action_ids))
            written_ids[row, written] = turn.action_ids
            response_mask[row, written] = True
            old_logprobs[row, written] = turn.action_logprobs
            start, end = end, end + turn.num_read
            input_ids[row, start:end] = turn.read_ids
        attention_mask[row, :end] = True
    rewards = np.array([trajectory.reward for trajectory in trajectories], dtype=old_logprobs.dtype)
    return Batch(
        input_ids=torch.from_numpy(input_ids).to(device),
        attention_mask=torch.from_numpy(attention_mask).to(device),
        response_mask=torch.from_numpy(response_mask).to(device),
        written_ids=torch.from_numpy(written_ids).to(device),
        old_logprobs=torch.from_numpy(old_logprobs).to(device),
        rewards=torch.from_numpy(rewards).to(device),
        correct=torch.tensor([trajectory.correct for trajectory in trajectories], dtype=torch.bool, device=device),
        group_ids=torch.tensor([trajectory.group_id for trajectory in trajectories], dtype=torch.int64, device=device),
        num_shared=num_shared([trajectory.prompt_ids for trajectory in trajectories]),
    )


def num_shared(prompts: Sequence[np.ndarray]) -> int:
    """Count the leading tokens that are the same in all prompts; the last token of a prompt is its own."""
    shortest = min(map(len, prompts)) - 1
    differs = np.any([prompt[:shortest] != prompts[0][:shortest] for prompt in prompts], axis=0)
    return int(differs.argmax()) if differs.any() else shortest


def predicting_positions(response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Find the position that predicts each model-written token: one to the left of it.

    Args:
        response_mask: [B, T] bool, with N True entries.

    Returns:
        Rows and columns, each [N] int64, in the order in which `tensor[response_mask]` lists the tokens.
    """
    rows, columns = torch.nonzero(response_mask, as_tuple=True)
    assert not response_mask[:, 0].any(), "nothing predicts column 0; a trajectory starts with its prompt"
    return rows, columns - 1


def micro_batches(lengths: Sequence[int], max_tokens: int, num_shared: int = 0) -> list[list[int]]:
    """Split trajectories into groups of similar length whose padded size fits a budget, with the least work.

    The work of a group is its padded size plus `_PASS_TOKENS` for the pass itself.

    Args:
        lengths: Tokens of each trajectory, more than `num_shared`.
        max_tokens: Most tokens of a group, padding included. A longer trajectory gets a group of its own.
        num_shared: Leading tokens of all trajectories that a group computes once.

    Returns:
        Row indices of each group, longest first, so that a budget too large for the memory fails on the first group.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    # The least work for the first rows of `order`, and where the last group of these rows begins.
    work, begins = np.full(len(order) + 1, np.inf), np.zeros(len(order) + 1, dtype=np.int64)
    work[0] = 0
    for start, row in enumerate(order):
        own = lengths[row] - num_shared
        most = max(1, (max_tokens - num_shared) // own)
        sizes = np.arange(1, min(len(order) - start, most) + 1)
        with_group = work[start] + _PASS_TOKENS + num_shared + sizes * own
        better = start + sizes[with_group < work[start + sizes]]
        work[better], begins[better] = with_group[better - start - 1], start
    groups, end = [], len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups[::-1]
