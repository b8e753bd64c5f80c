"""The protocol of engines, held by two: ours with its cache, and a naive one behind the same player and generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from naive_engine import NaiveEngine
from toy_policy import SPELLINGS, make_envs, make_policy, make_tokenizer

from agentic_rag_env.actions import CLOSING_TAGS
from agentic_rag_env.probes import Prompt
from algorithms.rollout.cached_engine import CachedEngine
from algorithms.rollout.config import RolloutConfig
from algorithms.rollout.generator import Generator
from algorithms.rollout.player import Player

ENGINES = (CachedEngine, NaiveEngine)


def make(engine, spelling="whole", num_rows=3, action_ends=CLOSING_TAGS, **settings):
    config = RolloutConfig(**{"max_new_tokens": 16, "max_tokens": 300, **settings})
    model = make_policy(spelling, seed=4)
    return engine(model, make_tokenizer(spelling), config, num_rows=num_rows, action_ends=action_ends)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_both_engines_play_the_same_episodes(spelling, temperature):
    played = []
    for engine in ENGINES:
        player = Player(make(engine, spelling, temperature=temperature), make_envs(3))
        played.append(player.rollout(range(8), seed=(1, 2))[0])
    for ours, naive in zip(*played, strict=True):
        assert [turn.info for turn in ours.turns] == [turn.info for turn in naive.turns]
        for one, other in zip(ours.turns, naive.turns, strict=True):
            assert one.action_ids.tolist() == other.action_ids.tolist()
            assert one.observation_ids.tolist() == other.observation_ids.tolist()
            np.testing.assert_allclose(one.action_logprobs, other.action_logprobs, atol=1e-4)
        assert (ours.reward, ours.correct, ours.terminated) == (naive.reward, naive.correct, naive.terminated)
    assert temperature == 0 or any(len(trajectory.turns) > 1 for trajectory in played[0])


def test_both_engines_generate_the_same_texts():
    prompts = [Prompt(f"who{' ada' * count} lives?\n", "\n\nin oslo", "<answer>") for count in range(7)] + [" bob"]
    ours, naive = (Generator(make(engine, temperature=0.0))(prompts) for engine in ENGINES)
    assert ours == naive
    assert len(set(ours)) > 1


@pytest.mark.parametrize("engine", ENGINES)
def test_an_action_depends_on_its_row_alone(engine):
    draws = np.random.default_rng(0).random((4, 16))
    prompts = [np.array(make_tokenizer("whole").encode(text)) for text in ("who", "where ada", "who bob lives", "?")]
    alone = []
    for prompt, uniforms in zip(prompts, draws, strict=True):
        one = make(engine, num_rows=1)
        one.open(0, prompt, uniforms)
        (action,) = one.write()
        one.append(0, prompt, uniforms)
        alone.append((action.ids.tolist(), one.write()[0].ids.tolist()))
    together, found = make(engine, num_rows=4), {row: [] for row in range(4)}
    for row in (2, 0, 3, 1):
        together.open(row, prompts[row], draws[row])
    while actions := together.write():
        for action in actions:
            found[action.row].append(action.ids.tolist())
            if len(found[action.row]) == 1:
                together.append(action.row, prompts[action.row], draws[action.row])
            else:
                together.close([action.row])
    assert [tuple(found[row]) for row in range(4)] == alone


def test_instructions_that_rows_begin_with_are_read_once():
    instructions, draws = np.arange(70) % 23, np.random.default_rng(0).random((4, 16))
    texts = "who ada", "where bob", "?", "who"
    prompts = [np.append(instructions, make_tokenizer("whole").encode(text)) for text in texts]
    found = []
    for engine in ENGINES:
        rows, written = make(engine, num_rows=4), {}
        rows.open(1, prompts[0], draws[0])
        rows.write()
        computed = rows.computed_tokens
        rows.append(1, prompts[0], draws[0])
        for row, number in ((0, 1), (3, 2), (2, 3)):  # three rows begin while another one goes on
            rows.open(row, prompts[number], draws[number])
        while actions := rows.write():
            written |= {action.row: action.ids.tolist() for action in actions}
            rows.close([action.row for action in actions])
        found.append((written, rows.computed_tokens - computed))
    (ours, num_computed), (naive, _) = found
    assert ours == naive
    # The last token of row 1's first action is read now, and the last one of each action never.
    assert num_computed == sum(map(len, [*prompts, *ours.values()])) - 2 * len(instructions) + 1 - 4


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_that_were_given_up_leave_nothing_behind(engine):
    rows = make(engine, temperature=0.0)
    prompt = np.array(make_tokenizer("whole").encode("who ada"))
    for row in range(3):
        rows.open(row, np.concatenate([prompt] * (row + 1)))
    expected = {action.row: action.ids.tolist() for action in rows.write()}
    rows.close(range(3))
    assert rows.write() == []
    rows.open(0, prompt)
    (action,) = rows.write()
    assert action.ids.tolist() == expected.get(0, action.ids.tolist())


@pytest.mark.parametrize("engine", ENGINES)
def test_new_weights_are_written_with(engine):
    rows = make(engine, temperature=0.0)
    prompt = np.array(make_tokenizer("whole").encode("who ada"))
    other = make_policy("whole", seed=11)
    found = []
    for model in (rows.model, other):
        rows.set_weights(model)
        rows.open(0, prompt)
        found.append(rows.write()[0])
        rows.close([0])
        assert rows.write() == []
    with torch.no_grad():
        expected = other(torch.tensor([prompt.tolist()])).logits[0, -1].argmax()
    assert found[1].ids[0] == expected


@pytest.mark.parametrize("ends", [("t",), ("ada", "b"), (" r", "\u00e9"), ("\n",)])
def test_any_texts_can_end_an_action(ends):
    uniforms = np.random.default_rng(3).random((3, 60))
    prompt, written = np.array(make_tokenizer("bytes").encode("who ada")), []
    for engine in ENGINES:
        rows, found = make(engine, "bytes", action_ends=ends, max_new_tokens=60), {}
        for row in range(3):
            rows.open(row, prompt, uniforms[row])
        while actions := rows.write():
            found |= {action.row: (action.ids.tolist(), action.text) for action in actions}
            rows.close([action.row for action in actions])
        written.append(found)
    assert written[0] == written[1]
    assert len(written[0]) == 3
