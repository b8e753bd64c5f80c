"""Gradients by hand are those of finite differences, and results those of the plain formulas."""

import math

import pytest
import torch

from algorithms.learner import ops
from algorithms.learner.short_gradients import logprobs_and_entropy, normed


@pytest.fixture
def logits():
    return torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()


IDS = torch.tensor([0, 6, 3, 3, 2])


def test_norm():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        expected = torch.tensor([[3 / math.sqrt(12.5 + 1e-2), 4 / math.sqrt(12.5 + 1e-2)], [0.0, 0.0]])
        torch.testing.assert_close(normed(x, 1e-2), expected.double())
    torch.testing.assert_close(normed(x, 1e-2), expected.double())
    assert torch.autograd.gradcheck(lambda x: normed(x, 1e-2), x)


def test_logprobs_and_entropy_of_a_known_distribution():
    logprobs, entropy = logprobs_and_entropy(torch.tensor([[0.5, 0.25, 0.25]]).log() + 40, torch.tensor([1]))
    assert float(logprobs) == pytest.approx(math.log(0.25), abs=1e-5)
    assert float(entropy) == pytest.approx(1.5 * math.log(2), abs=1e-5)


def test_gradients_of_both_and_of_each(logits):
    assert torch.autograd.gradcheck(lambda z: logprobs_and_entropy(z, IDS), logits)
    for number in (0, 1):
        assert torch.autograd.gradcheck(lambda z, number=number: logprobs_and_entropy(z, IDS)[number], logits)


def test_what_is_ruled_out_sends_back_no_nan(logits):
    with torch.no_grad():
        logits[0, 1:4] = -math.inf
        logits[3] = -math.inf
    ours = logprobs_and_entropy(logits, IDS)
    for mine, other in zip(ours, (ops.gather_logprobs(logits, IDS), ops.token_entropy(logits)), strict=True):
        torch.testing.assert_close(mine, other)
    assert float(ours[0][3]) == -math.inf
    assert float(ours[1][3]) == 0
    ours[1].sum().backward()
    assert logits.grad.isfinite().all()
