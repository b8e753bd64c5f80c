"""From trajectories to rectangular tensors, and the one place where a token meets the position that predicts it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from algorithms.learner.types import Batch, Trajectory


def collate(trajectories: Sequence[Trajectory], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Lay trajectories side by side, padded on the right.

    Args:
        trajectories: B of them, at least one.
        pad_id: What fills `input_ids` beyond the end of a trajectory; may be a real token, as the masks decide.
        device: Where the tensors go.

    Returns:
        The sampled part of a `Batch`; the optional fields are None.
    """
    shape = (len(trajectories), max(trajectory.num_tokens for trajectory in trajectories))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=bool)
    response_mask = np.zeros(shape, dtype=bool)
    old_logprobs = np.zeros(shape, dtype=np.float32)
    for row, trajectory in enumerate(trajectories):
        end = len(trajectory.prompt_ids)
        input_ids[row, :end] = trajectory.prompt_ids
        for turn in trajectory.turns:
            start, end = end, end + len(turn.action_ids)
            input_ids[row, start:end] = turn.action_ids
            response_mask[row, start:end] = True
            old_logprobs[row, start:end] = turn.action_logprobs
            start, end = end, end + len(turn.observation_ids)
            input_ids[row, start:end] = turn.observation_ids
        attention_mask[row, :end] = True
    return Batch(
        input_ids=torch.from_numpy(input_ids).to(device),
        attention_mask=torch.from_numpy(attention_mask).to(device),
        response_mask=torch.from_numpy(response_mask).to(device),
        old_logprobs=torch.from_numpy(old_logprobs).to(device),
        rewards=torch.tensor([trajectory.reward for trajectory in trajectories], dtype=torch.float32, device=device),
        correct=torch.tensor([trajectory.correct for trajectory in trajectories], dtype=torch.bool, device=device),
        group_ids=torch.tensor([trajectory.group_id for trajectory in trajectories], dtype=torch.int64, device=device),
    )


def predicting_positions(response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where the model predicts each model-written token: one position to the left of it.

    Args:
        response_mask: [B, T] bool, with N True entries.

    Returns:
        Rows and columns, each [N] int64, in the order in which `tensor[response_mask]` lists the tokens.
    """
    rows, columns = torch.nonzero(response_mask, as_tuple=True)
    assert not response_mask[:, 0].any(), "nothing predicts column 0; a trajectory starts with its prompt"
    return rows, columns - 1


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split trajectories into groups of similar length whose padded size fits a budget.

    Args:
        lengths: Tokens of each trajectory.
        max_tokens: Most tokens of a group, padding included. A longer trajectory gets a group of its own.

    Returns:
        Row indices of each group, longest first, so that a budget too large for the memory fails on the first group.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
