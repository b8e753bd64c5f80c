"""Random streams that depend on their key and on nothing else."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from algorithms.learner.seeding import generator, rng, seed_everything


def test_equal_keys_give_equal_streams_and_different_keys_do_not():
    keys = [(0,), (1,), (0, 0), (0, "a"), ("0",), (0, 1), (1, 0), (), ("a", 0), (10,), (1, "0")]
    draws = {key: tuple(rng(*key).integers(2**60, size=2)) for key in keys}
    assert len(set(draws.values())) == len(keys)
    assert draws == {key: tuple(rng(*key).integers(2**60, size=2)) for key in keys}
    torch_draws = {key: tuple(torch.randint(2**60, (2,), generator=generator(*key)).tolist()) for key in keys}
    assert len(set(torch_draws.values())) == len(keys)
    assert torch_draws == {key: tuple(torch.randint(2**60, (2,), generator=generator(*key)).tolist()) for key in keys}


def test_kinds_of_integers_are_one_key_and_other_types_are_refused():
    assert rng(np.int64(3), "x").random() == rng(3, "x").random() == rng(torch.tensor(3), "x").random()
    with pytest.raises(TypeError):
        rng(0.5)


def test_streams_are_the_same_in_another_process():
    code = (
        "from algorithms.learner.seeding import generator, rng; "
        "print(rng(1, 'a').random(), generator(2).initial_seed())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    ).stdout.split()
    assert printed == [str(rng(1, "a").random()), str(generator(2).initial_seed())]


def test_streams_leave_the_global_generators_alone():
    seed_everything(0)
    expected = (random.random(), np.random.rand(), torch.rand(()).item())
    seed_everything(0)
    rng(1).random(5)
    torch.rand(5, generator=generator(1))
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected
