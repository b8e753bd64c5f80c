"""The README's examples run as they stand there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from algorithms.learner.algorithm import ALGORITHMS
from algorithms.learner.types import Batch, Tokens

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
ENVIRONMENT, ALGORITHM = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_environment_loop(capsys):
    exec(ENVIRONMENT, {})
    printed = capsys.readouterr().out
    assert "<information>Doc 1(Title: Lotaven)" in printed
    assert printed.rstrip().endswith("0.0 True 0.0 1")


@pytest.fixture
def reinforce(tmp_path, monkeypatch):
    (tmp_path / "reinforce_of_the_readme.py").write_text(ALGORITHM, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("reinforce_of_the_readme")
    yield ALGORITHMS.build("reinforce")
    del ALGORITHMS._entries["reinforce"]


def test_algorithm_of_ones_own(reinforce):
    mask = torch.tensor([[False, True, True], [False, True, False]])
    batch = Batch(
        input_ids=torch.zeros(2, 3, dtype=torch.long),
        attention_mask=torch.ones(2, 3, dtype=torch.bool),
        response_mask=mask,
        old_logprobs=torch.zeros(2, 3),
        rewards=torch.tensor([1.0, 0.0]),
        correct=torch.tensor([True, False]),
        group_ids=torch.arange(2),
    )
    advantages, returns = reinforce.estimate_advantages(batch)
    assert advantages.tolist() == returns.tolist() == [[0.0, 0.5, 0.5], [0.0, -0.5, 0.0]]
    ids = torch.zeros(3, dtype=torch.long)
    tokens = Tokens(
        ids=ids,
        sequence_ids=ids,
        correct=ids.bool(),
        old_logprobs=ids.float(),
        logprobs=torch.tensor([-1.0, -2.0, -3.0]),
        advantages=advantages[mask],
    )
    assert reinforce.token_loss(tokens).tolist() == [0.5, 1.0, -1.5]
    assert reinforce.num_steps(0) == 100
