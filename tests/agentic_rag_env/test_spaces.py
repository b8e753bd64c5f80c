from __future__ import annotations

import json
import pickle

import pytest
from gymnasium.spaces import Text
from gymnasium.vector.utils import batch_space

from agentic_rag_env.actions import Answer, Malformed, Search, parse_action
from agentic_rag_env.spaces import FreeText


@pytest.mark.parametrize("text", ["", " ", "a b", "東京", "\ud800", "\x00\x1b[31m", "\u202e", "x" * 10_000])
def test_every_string_is_inside(text: str) -> None:
    assert text in FreeText()


@pytest.mark.parametrize("thing", [None, 1, b"x", ["x"], {"x": 1}])
def test_nothing_else_is(thing: object) -> None:
    assert thing not in FreeText()


def test_samples_repeat_with_the_seed_and_speak_the_protocol() -> None:
    first, second = FreeText(seed=3), FreeText(seed=3)
    samples = [first.sample() for _ in range(300)]
    assert samples == [second.sample() for _ in range(300)]
    assert samples != [FreeText(seed=4).sample() for _ in range(300)]
    assert {type(parse_action(sample)) for sample in samples} == {Search, Answer, Malformed}
    assert all(type(sample) is str and len(sample) < 200 for sample in samples)
    space = FreeText()
    assert space.seed(5) == 5
    again = space.sample()
    space.seed(5)
    assert space.sample() == again


def test_equality_and_copies() -> None:
    assert FreeText(seed=1) == FreeText(seed=2) == pickle.loads(pickle.dumps(FreeText()))
    assert FreeText() != Text(5)
    assert repr(FreeText()) == "FreeText()"
    assert not FreeText().is_np_flattenable


def test_jsonable_round_trip() -> None:
    space = FreeText(seed=0)
    samples = [space.sample(), "\ud800", "é"]
    assert space.from_jsonable(json.loads(json.dumps(space.to_jsonable(samples)))) == samples


def test_batched_by_gymnasium() -> None:
    batched = batch_space(FreeText(), 3)
    batched.seed(0)
    texts = batched.sample()
    assert texts in batched
    assert ("a", "", "b") in batched
    assert ("a", None, "b") not in batched
    assert batched == batch_space(FreeText(), 3)


def test_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="neither mask nor probability"):
        FreeText().sample(mask=(1, None))
