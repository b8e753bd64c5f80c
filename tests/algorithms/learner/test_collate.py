"""Batches, positions and micro-batches against numbers written out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms.learner.collate import collate, micro_batches, num_shared, predicting_positions
from algorithms.learner.types import Trajectory, Turn

PAD = 7


def turn(action, logprobs, observation):
    return Turn(np.array(action), np.array(logprobs, dtype=np.float32), np.array(observation, dtype=np.int64), {})


def two_trajectories():
    """The first acts, reads and acts again; the second acts once. The padding id also occurs as a real token."""
    first = Trajectory(
        np.array([1, PAD]),
        [turn([3, 4], [-0.5, -0.25], [PAD, 5]), turn([6], [-1.0], [])],
        9,
        "policy",
        1.0,
        True,
        True,
        False,
    )
    second = Trajectory(np.array([2, 2, 2]), [turn([PAD], [-2.0], [])], 4, "teacher", 0.0, False, False, True)
    return [first, second]


def test_an_end_of_text_that_is_not_read_is_written_where_the_reply_begins():
    ended = turn([3, 9], [-0.5, -0.25], [4, 5])
    ended.end_unread = True
    alone = turn([9], [-0.75], [4])
    alone.end_unread = True
    trajectory = Trajectory(
        np.array([1, 2]), [ended, alone, turn([6, 9], [-1, -2], [])], 0, "policy", 0.0, False, True, False
    )
    batch = collate([trajectory, two_trajectories()[1]], PAD)
    assert batch.input_ids[0].tolist() == [1, 2, 3, 4, 5, 4, 6, 9]
    assert batch.response_mask[0].int().tolist() == [0, 0, 1, 1, 0, 1, 1, 1]
    assert batch.written_ids[0][batch.response_mask[0]].tolist() == [3, 9, 9, 6, 9]
    assert batch.old_logprobs[0].tolist() == [0, 0, -0.5, -0.25, 0, -0.75, -1, -2]
    assert batch.attention_mask.sum(dim=1).tolist() == [trajectory.num_tokens, 4] == [8, 4]
    assert trajectory.num_action_tokens == 5


def test_prompts_share_all_but_their_last_token():
    numbers = [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),  # what the last token predicts is each row's own
        ([[1, 2, 3, 4], [1, 2]], 1),
        ([[1, 2, 3], [1, 5, 3], [1, 2, 3]], 1),
        ([[4, 2, 3], [1, 2, 3]], 0),
        ([[1], [1, 2]], 0),
        ([[1, 2, 3]], 2),
    ]
    for prompts, count in numbers:
        assert num_shared([np.array(prompt) for prompt in prompts]) == count
    batch = collate(two_trajectories()[:1] * 2, PAD)
    assert batch.num_shared == batch.select([1]).num_shared == 1


def test_collate_by_hand():
    batch = collate(two_trajectories(), PAD)
    assert batch.input_ids.tolist() == [[1, PAD, 3, 4, PAD, 5, 6], [2, 2, 2, PAD, PAD, PAD, PAD]]
    assert batch.attention_mask.int().tolist() == [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]
    assert batch.response_mask.int().tolist() == [[0, 0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0, 0]]
    assert batch.old_logprobs.tolist() == [[0, 0, -0.5, -0.25, 0, 0, -1.0], [0, 0, 0, -2.0, 0, 0, 0]]
    assert batch.rewards.tolist() == [1.0, 0.0]
    assert batch.correct.tolist() == [True, False]
    assert batch.group_ids.tolist() == [9, 4]
    assert [batch.input_ids.dtype, batch.attention_mask.dtype, batch.response_mask.dtype] == [
        torch.int64,
        torch.bool,
        torch.bool,
    ]
    assert [batch.old_logprobs.dtype, batch.rewards.dtype, batch.group_ids.dtype] == [
        torch.float32,
        torch.float32,
        torch.int64,
    ]
    assert batch.values is batch.ref_logprobs is batch.teacher_logprobs is batch.advantages is None


def test_select_cuts_the_padding_nobody_needs():
    batch = collate(two_trajectories(), PAD).select([1])
    assert batch.input_ids.tolist() == [[2, 2, 2, PAD]]
    assert batch.group_ids.tolist() == [4]


def test_each_model_written_token_is_predicted_one_column_earlier_in_its_own_row():
    batch = collate(two_trajectories(), PAD)
    rows, columns = predicting_positions(batch.response_mask)
    assert rows.tolist() == [0, 0, 0, 1]
    assert columns.tolist() == [1, 2, 5, 2]
    assert batch.input_ids[batch.response_mask].tolist() == batch.input_ids[rows, columns + 1].tolist()


def test_nothing_predicts_the_first_column():
    with pytest.raises(AssertionError, match="column 0"):
        predicting_positions(torch.tensor([[False, True], [True, False]]))


def test_micro_batches_by_hand():
    assert micro_batches([5, 9, 2, 4, 4], max_tokens=10) == [[1], [0, 3], [4, 2]]
    assert micro_batches([5, 9, 2, 4, 4], max_tokens=1) == [[1], [0], [3], [4], [2]]
    assert micro_batches([3, 3], max_tokens=6) == [[0, 1]]
    assert micro_batches([], max_tokens=6) == []
    assert micro_batches([100, 90], max_tokens=10_000) == [[0, 1]], "ten tokens of padding are less work than a pass"
    assert micro_batches([100, 2000, 100], max_tokens=10_000) == [[1], [0, 2]], "and these 3,800 are more"


def test_what_a_micro_batch_computes_once_counts_once():
    lengths = [300, 300, 280]
    assert micro_batches(lengths, max_tokens=600) == [[0, 1], [2]]
    assert micro_batches(lengths, max_tokens=600, num_shared=150) == [[0, 1, 2]], "150 + 3 * 150"
    assert micro_batches(lengths, max_tokens=599, num_shared=150) == [[0, 1], [2]]
    assert micro_batches(lengths, max_tokens=100, num_shared=150) == [[0], [1], [2]], "one row is always let through"


@given(lengths=st.lists(st.integers(1, 50), max_size=30), max_tokens=st.integers(1, 200))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, max_tokens):
    groups = micro_batches(lengths, max_tokens)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        padded = len(group) * max(lengths[row] for row in group)
        assert padded <= max_tokens or len(group) == 1
    longest = [lengths[group[0]] for group in groups]
    assert longest == sorted(longest, reverse=True)


@given(lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=7), max_tokens=st.integers(1, 10_000))
def test_no_other_split_into_micro_batches_is_less_work(lengths, max_tokens):
    def work(groups):
        return sum(500 + len(group) * max(lengths[row] for row in group) for group in groups)

    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    allowed = []
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        ends = [end for end, cut in enumerate(cuts, start=1) if cut]
        groups = [order[start:end] for start, end in itertools.pairwise([0, *ends, len(lengths)])]
        if all(len(group) == 1 or len(group) * lengths[group[0]] <= max_tokens for group in groups):
            allowed.append(work(groups))
    assert work(micro_batches(lengths, max_tokens)) == min(allowed)
