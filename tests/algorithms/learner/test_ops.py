"""Every operation against an oracle: written-out sums, sequences done by hand, scipy, finite differences, TRL."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax
from scipy.stats import entropy

from agentic_rag_env.errors import ConfigurationError
from algorithms.learner import ops

INF = math.inf
TIGHT = {"rtol": 0, "atol": 1e-12}

DIVERGENCES = {
    "forward_kl": ops.forward_kl,
    "reverse_kl": ops.reverse_kl,
    "jsd_0": lambda s, z: ops.jsd(s, z, 0.0),
    "jsd_0.1": lambda s, z: ops.jsd(s, z, 0.1),
    "jsd_0.5": lambda s, z: ops.jsd(s, z, 0.5),
    "jsd_1": lambda s, z: ops.jsd(s, z, 1.0),
    "skew_forward_kl_0.1": lambda s, z: ops.skew_forward_kl(s, z, 0.1),
    "skew_reverse_kl_0.1": lambda s, z: ops.skew_reverse_kl(s, z, 0.1),
    "taid_kl_0": lambda s, z: ops.taid_kl(s, z, 0.0),
    "taid_kl_0.4": lambda s, z: ops.taid_kl(s, z, 0.4),
    "taid_kl_1": lambda s, z: ops.taid_kl(s, z, 1.0),
}


def t(values, **options) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, **options)


def normal(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kl(p, q) -> float:
    return float(rel_entr(p, q).sum())


# What each divergence is, in probabilities, for one row: p of the teacher, q of the student.
ORACLES = {
    "forward_kl": lambda p, q: kl(p, q),
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd_0": lambda p, q: kl(p, q),
    "jsd_0.1": lambda p, q: 0.1 * kl(p, 0.1 * p + 0.9 * q) + 0.9 * kl(q, 0.1 * p + 0.9 * q),
    "jsd_0.5": lambda p, q: 0.5 * kl(p, (p + q) / 2) + 0.5 * kl(q, (p + q) / 2),
    "jsd_1": lambda p, q: kl(q, p),
    "skew_forward_kl_0.1": lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    "skew_reverse_kl_0.1": lambda p, q: kl(q, 0.1 * q + 0.9 * p),
    "taid_kl_0": lambda p, q: 0.0,
    "taid_kl_0.4": lambda p, q: kl(p**0.4 * q**0.6 / (p**0.4 * q**0.6).sum(), q),
    "taid_kl_1": lambda p, q: kl(p, q),
}


# --- divergences -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIVERGENCES)
@settings(deadline=None, max_examples=25)
@given(shape=st.lists(st.integers(0, 3), max_size=2), vocab=st.integers(1, 7), seed=st.integers(0, 999))
def test_divergence_is_the_written_out_sum_for_any_leading_shape(name, shape, vocab, seed):
    student, teacher = normal(*shape, vocab, seed=seed), normal(*shape, vocab, seed=seed + 1000)
    result = DIVERGENCES[name](student, teacher)
    q, p = softmax(student.numpy(), axis=-1), softmax(teacher.numpy(), axis=-1)
    expected = np.array([ORACLES[name](p[i], q[i]) for i in np.ndindex(*shape)]).reshape(shape)
    assert result.dtype == torch.float64
    assert result.shape == tuple(shape)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_gradient_agrees_with_finite_differences(name):
    if name.startswith("taid_kl"):  # holds the student constant inside the target, so compare with a fixed target
        weight = float(name.rpartition("_")[2])
        student, teacher = normal(3, 5, seed=1).requires_grad_(), normal(3, 5, seed=2)
        target = (1 - weight) * student.detach() + weight * teacher
        DIVERGENCES[name](student, teacher).sum().backward()
        expected = torch.softmax(student.detach(), -1) - torch.softmax(target, -1)
        torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-12)
        return
    student, teacher = normal(3, 5, seed=1).requires_grad_(), normal(3, 5, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(DIVERGENCES[name], (student, teacher), eps=1e-6, atol=1e-8, rtol=1e-6)


def test_divergences_by_hand_over_two_words():
    student, teacher = t([1 / 2, 1 / 2]).log(), t([3 / 4, 1 / 4]).log()
    expected = {
        "forward_kl": 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2),
        "reverse_kl": 1 / 2 * math.log(2 / 3) + 1 / 2 * math.log(2),
        # the mixture is (5/8, 3/8)
        "jsd_0.5": (3 / 4 * math.log(6 / 5) + 1 / 4 * math.log(2 / 3) + math.log(4 / 5) / 2 + math.log(4 / 3) / 2) / 2,
    }
    for name, value in expected.items():
        assert DIVERGENCES[name](student, teacher).item() == pytest.approx(value, abs=1e-15)
    # beta = 1/4 is no symmetry point: the mixture (9/16, 7/16) shows that beta weighs the teacher, here (3/4, 1/4)
    by_hand = (
        (3 / 4 * math.log(4 / 3) + 1 / 4 * math.log(4 / 7)) / 4 + 3 / 8 * math.log(8 / 9) + 3 / 8 * math.log(8 / 7)
    )
    assert ops.jsd(student, teacher, 0.25).item() == pytest.approx(by_hand, abs=1e-15)


def test_jsd_over_beta_reproduces_published_toy_values():
    # Of all pairs over two words, this one has KL(p || q) = 2.1918 and JSD / beta = 2.1884 at beta = 1e-4.
    p, q = 0.51998638, 0.00391491
    student, teacher = t([q, 1 - q]).log(), t([p, 1 - p]).log()
    assert ops.forward_kl(student, teacher).item() == pytest.approx(2.1918, abs=1e-6)
    assert (ops.jsd(student, teacher, 1e-4) / 1e-4).item() == pytest.approx(2.1884, abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jsd_agrees_with_trl(beta):
    module = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    student, teacher = normal(2, 4, 11, seed=3), normal(2, 4, 11, seed=4)
    per_entry = module.GKDTrainer.generalized_jsd_loss(student, teacher, beta=beta, reduction="none")
    # TRL keeps the weights in the logits' dtype, so this is exact to float64.
    torch.testing.assert_close(ops.jsd(student, teacher, beta), per_entry.sum(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("constant", [-1000.0, 1000.0])
def test_divergence_ignores_a_constant_added_to_the_logits(name, constant):
    student, teacher = normal(4, 6, seed=5), normal(4, 6, seed=6)
    expected = DIVERGENCES[name](student, teacher)
    torch.testing.assert_close(DIVERGENCES[name](student + constant, teacher - constant), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_keeps_the_dtype_and_survives_extreme_logits(name, dtype):
    student = torch.tensor([[0.0, -2e4, 3e4], [5e3, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[0.0, 2e4, -3e4], [0.0, 0.0, 5e3]], dtype=dtype)
    result = DIVERGENCES[name](student, teacher)
    result.sum().backward()
    assert result.dtype == dtype
    assert torch.isfinite(result).all()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_entries_that_nobody_can_choose_change_nothing(name):
    student, teacher = normal(3, 5, seed=7), normal(3, 5, seed=8)
    nothing = torch.full((3, 2), -INF, dtype=torch.float64)
    padded = torch.cat([student, nothing], -1).requires_grad_()
    result = DIVERGENCES[name](padded, torch.cat([teacher, nothing], -1))
    torch.testing.assert_close(result, DIVERGENCES[name](student, teacher), **TIGHT)
    result.sum().backward()
    student.requires_grad_()
    DIVERGENCES[name](student, teacher).sum().backward()
    torch.testing.assert_close(padded.grad[:, :5], student.grad, **TIGHT)
    assert (padded.grad[:, 5:] == 0).all()


# Over three words; the student cannot say the last one, or the teacher cannot. p = q = 1/2 on the two that both can.
STUDENT_MUTE = (t([0.0, 0.0, -INF]), t([0.0, 0.0, math.log(2.0)]))  # p = (1/4, 1/4, 1/2), q = (1/2, 1/2, 0)
LOG2 = math.log(2)
MUTE_STUDENT_VALUES = {
    "forward_kl": INF,
    "reverse_kl": LOG2,
    "jsd_0": INF,
    # mixture (3/8, 3/8, 1/4)
    "jsd_0.5": 0.5 * (0.5 * math.log(2 / 3) + 0.5 * LOG2) + 0.5 * math.log(4 / 3),
    "jsd_1": LOG2,
    # mixture 0.1 p + 0.9 q = (0.475, 0.475, 0.05)
    "skew_forward_kl_0.1": 0.5 * math.log(0.25 / 0.475) + 0.5 * math.log(10),
    # mixture 0.1 q + 0.9 p = (0.275, 0.275, 0.45)
    "skew_reverse_kl_0.1": math.log(0.5 / 0.275),
    "taid_kl_0": 0.0,
    "taid_kl_0.4": 0.0,
    "taid_kl_1": INF,
}
MUTE_TEACHER_VALUES = {
    "forward_kl": LOG2,
    "reverse_kl": INF,
    "jsd_0": LOG2,
    "jsd_0.5": MUTE_STUDENT_VALUES["jsd_0.5"],
    "jsd_1": INF,
    "skew_forward_kl_0.1": MUTE_STUDENT_VALUES["skew_reverse_kl_0.1"],
    "skew_reverse_kl_0.1": MUTE_STUDENT_VALUES["skew_forward_kl_0.1"],
    "taid_kl_0": 0.0,
    "taid_kl_0.4": LOG2,
    "taid_kl_1": LOG2,
}


@pytest.mark.parametrize("mute", ["student", "teacher"])
@pytest.mark.parametrize("name", MUTE_STUDENT_VALUES)
def test_an_entry_that_one_side_cannot_choose(name, mute):
    student, teacher = STUDENT_MUTE if mute == "student" else STUDENT_MUTE[::-1]
    expected = (MUTE_STUDENT_VALUES if mute == "student" else MUTE_TEACHER_VALUES)[name]
    student = student.clone().requires_grad_()
    result = DIVERGENCES[name](student, teacher)
    assert result.item() == pytest.approx(expected, abs=1e-14)
    result.backward()
    assert torch.isfinite(student.grad).all()
    if expected == INF:
        assert (student.grad == 0).all()


def test_probability_that_underflows_against_one_that_is_ruled_out():
    # exp(-2000) is 0 in float64; 0 times (log 0 - log 0) must stay 0
    student, teacher = t([0.0, -INF]), t([0.0, -2000.0])
    assert ops.forward_kl(student, teacher).item() == 0
    assert ops.reverse_kl(teacher, student).item() == 0


@pytest.mark.parametrize("name", DIVERGENCES)
def test_rows_without_any_possible_entry_are_zero_not_nan(name):
    student, teacher = normal(3, 4, seed=9), normal(3, 4, seed=10)
    student[1] = teacher[1] = -INF
    student.requires_grad_()
    result = DIVERGENCES[name](student, teacher)
    result.sum().backward()
    assert result[1].item() == 0
    assert torch.isfinite(student.grad).all()
    assert (student.grad[1] == 0).all()
    torch.testing.assert_close(result[[0, 2]], DIVERGENCES[name](student[[0, 2]], teacher[[0, 2]]), **TIGHT)


def test_a_wrong_weight_or_shape_is_named():
    s = torch.zeros(2, 3)
    with pytest.raises(ConfigurationError, match=r"beta must be in \[0, 1\], got 1.5"):
        ops.jsd(s, s, 1.5)
    with pytest.raises(ConfigurationError, match=r"alpha must be in \[0, 1\], got -0.1"):
        ops.skew_forward_kl(s, s, -0.1)
    with pytest.raises(ConfigurationError, match=r"alpha must be in \[0, 1\], got 2"):
        ops.skew_reverse_kl(s, s, 2)
    with pytest.raises(ConfigurationError, match=r"t must be in \[0, 1\], got nan"):
        ops.taid_kl(s, s, math.nan)
    with pytest.raises(ConfigurationError, match=r"\(2, 3\) and \(2, 4\)"):
        ops.forward_kl(s, torch.zeros(2, 4))


# --- distributions ---------------------------------------------------------------------------------------------------


def test_token_entropy():
    logits = normal(5, 7, seed=11)
    logits[0] = 0.0
    logits[1] = t([3.0] + [-INF] * 6)
    logits[2] = -INF
    logits[3, 2:] = -INF
    probabilities = softmax(logits[3:].numpy(), axis=-1)
    logits.requires_grad_()
    result = ops.token_entropy(logits)
    result.sum().backward()
    assert result[0].item() == pytest.approx(math.log(7), abs=1e-14)
    assert result[1].item() == 0
    assert result[2].item() == 0
    np.testing.assert_allclose(result[3:].detach().numpy(), entropy(probabilities, axis=-1), atol=1e-13)
    assert torch.isfinite(logits.grad).all()
    assert torch.autograd.gradcheck(ops.token_entropy, normal(2, 4, seed=12).requires_grad_(), atol=1e-8)


def test_gather_logprobs():
    logits = normal(2, 3, 5, seed=13).requires_grad_()
    ids = torch.tensor([[0, 4, 2], [1, 1, 3]])
    result = ops.gather_logprobs(logits, ids)
    log_p = np.log(softmax(logits.detach().numpy(), axis=-1))
    expected = [[log_p[b, i, ids[b, i]] for i in range(3)] for b in range(2)]
    np.testing.assert_allclose(result.detach().numpy(), expected, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x: ops.gather_logprobs(x, ids), logits, atol=1e-8)
    assert ops.gather_logprobs(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_gather_logprobs_of_impossible_tokens_is_minus_infinity():
    logits = t([[0.0, 0.0, -INF], [0.0, 0.0, -INF], [-INF, -INF, -INF]], requires_grad=True)
    result = ops.gather_logprobs(logits, torch.tensor([0, 2, 1]))
    assert result.tolist() == [pytest.approx(-LOG2), -INF, -INF]
    result[:1].sum().backward()
    torch.testing.assert_close(logits.grad, t([[0.5, -0.5, 0.0], [0.0] * 3, [0.0] * 3]), **TIGHT)


# --- policy gradients ------------------------------------------------------------------------------------------------


def test_kl_estimates_by_hand():
    logprobs, other = t([0.5, 0.25, 0.1]).log(), t([0.25, 0.5, 0.1]).log()
    k1 = [LOG2, -LOG2, 0.0]
    torch.testing.assert_close(ops.kl_estimate(logprobs, other, "k1"), t(k1), **TIGHT)
    torch.testing.assert_close(ops.kl_estimate(logprobs, other, "k2"), t([LOG2**2 / 2, LOG2**2 / 2, 0.0]), **TIGHT)
    torch.testing.assert_close(ops.kl_estimate(logprobs, other, "k3"), t([LOG2 - 0.5, 1 - LOG2, 0.0]), **TIGHT)
    with pytest.raises(ConfigurationError, match="kl_estimator must be one of k1, k2, k3, got 'k4'"):
        ops.kl_estimate(logprobs, other, "k4")


def test_kl_estimates_are_not_clamped_and_precise_near_zero():
    assert ops.kl_estimate(t(-30.0), t(-1.0), "k1").item() == -29
    assert ops.kl_estimate(t(-30.0), t(-1.0), "k3").item() == pytest.approx(math.exp(29) - 30, rel=1e-14)
    # exp(-x) - 1 + x loses every digit of x^2 / 2 here
    assert ops.kl_estimate(t(1e-8), t(0.0), "k3").item() == pytest.approx(5e-17, rel=1e-6)


def test_what_one_side_rules_out_or_lies_far_beyond_a_bound_gives_no_nan():
    ruled_out = t([-INF])
    assert ops.kl_estimate(ruled_out, t([-1.0]), "k3").item() == INF
    assert ops.truncated_importance(ruled_out, ruled_out, 2.0).item() == 1.0
    for clip in (10.0, 30.0):
        far = torch.tensor([-100.0], requires_grad=True)
        estimate = ops.kl_estimate(far, torch.tensor([-1.0]), "k3", clip=clip)
        estimate.backward()
        assert (estimate.item(), far.grad.item()) == (clip, 0.0)


@pytest.mark.parametrize("estimator", ops.KL_ESTIMATORS)
def test_kl_estimate_where_both_rule_the_token_out_is_zero(estimator):
    logprobs = t([-INF, -1.0], requires_grad=True)
    result = ops.kl_estimate(logprobs, t([-INF, -1.0]), estimator)
    result.sum().backward()
    assert result.tolist() == [0, 0]
    assert torch.isfinite(logprobs.grad).all()
    # equal log-probabilities still have a gradient where the estimator has one
    assert logprobs.grad[1].item() == (1 if estimator == "k1" else 0)


def test_clipped_surrogate_by_hand():
    ratios = t([1.0, 1.5, 0.5, 1.5, 0.5, 1.1])
    advantages = t([2.0, 2.0, 2.0, -2.0, -2.0, -3.0])
    logprobs = ratios.log().requires_grad_()
    loss = ops.clipped_surrogate(logprobs, torch.zeros(6, dtype=torch.float64), advantages, 0.2)
    # gains are cut off at 1.2 and losses at 0.8, never the other way round
    torch.testing.assert_close(loss, t([-2.0, -2.4, -1.0, 3.0, 1.6, 3.3]), **TIGHT)
    loss.sum().backward()
    # d(-A ratio) / d logprob = -A ratio where it is not clipped
    torch.testing.assert_close(logprobs.grad, t([-2.0, 0.0, -1.0, 3.0, 0.0, 3.3]), **TIGHT)


def test_clipped_surrogate_with_another_upper_bound():
    logprobs, old = t([1.5, 1.1, 0.5]).log(), torch.zeros(3, dtype=torch.float64)
    loss = ops.clipped_surrogate(logprobs, old, t([2.0, 2.0, -2.0]), 0.2, 0.28)
    torch.testing.assert_close(loss, t([-2.56, -2.2, 1.6]), **TIGHT)


@pytest.mark.parametrize(("estimator", "expected"), [("k1", [-2.0, 2.0, 0.5]), ("k2", [2.0, 2.0, 0.125])])
def test_a_clipped_estimate_stays_within_its_bound(estimator, expected):
    other = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(ops.kl_estimate(t([-3.0, 3.0, 0.5]), other, estimator, 2.0), t(expected), **TIGHT)


def test_explained_variance_by_hand():
    returns, mask = t([1.0, 0.0, 1.0, 0.0, 77.0]), torch.tensor([True] * 4 + [False])
    assert ops.explained_variance(returns, returns, mask) == 1
    assert ops.explained_variance(returns + 5, returns, mask) == pytest.approx(1)
    assert ops.explained_variance(t([0.5] * 5), returns, mask) == 0
    # errors 0.5, 0.5, -0.5, 0.5: their variance is 0.25 - 0.25^2, that of the returns 0.25
    assert ops.explained_variance(t([0.5, -0.5, 1.5, -0.5, 0.0]), returns, mask) == pytest.approx(1 - 0.1875 / 0.25)
    assert ops.explained_variance(returns, t([1.0] * 5), mask) == 0
    assert ops.explained_variance(returns, returns, torch.zeros(5, dtype=torch.bool)) == 0


def test_clipped_surrogate_is_finite_however_far_apart():
    logprobs = t([0.0, -5000.0, 0.0, -INF], requires_grad=True)
    old = t([-5000.0, 0.0, -5000.0, -INF])
    loss = ops.clipped_surrogate(logprobs, old, t([0.0, 1.0, -1.0, 1.0]), 0.2)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logprobs.grad).all()
    assert loss[0].item() == 0
    assert loss[3].item() == -1


def test_clipped_value_loss_by_hand():
    values = t([1.0, 2.0, 2.0, -1.0], requires_grad=True)
    old, returns = t([1.0, 1.0, 1.0, 0.0]), t([3.0, 3.0, 0.0, -2.0])
    loss = ops.clipped_value_loss(values, old, returns, 0.5)
    # unclipped errors 4, 1, 4, 1; clipped values 1, 1.5, 1.5, -0.5 with errors 4, 2.25, 2.25, 2.25
    torch.testing.assert_close(loss, t([2.0, 1.125, 2.0, 1.125]), **TIGHT)
    loss.sum().backward()
    torch.testing.assert_close(values.grad, t([-2.0, 0.0, 2.0, 0.0]), **TIGHT)


# --- credit ----------------------------------------------------------------------------------------------------------


def gae_by_definition(rewards, values, discount, gae_lambda):
    """The double sum of the paper over one sequence of model-written tokens."""
    after = [*values, 0.0][1:]
    deltas = [r + discount * w - v for r, v, w in zip(rewards, values, after, strict=True)]
    return [
        sum((discount * gae_lambda) ** (u - i) * deltas[u] for u in range(i, len(deltas))) for i in range(len(deltas))
    ]


def test_gae_by_hand():
    # deltas: 1 + 0.5*4 - 2 = 1, 0 + 0.5*6 - 4 = -1, 3 - 6 = -3; each A = delta + 0.25 * next A
    rewards, values = t([[1.0, 9.0, 0.0, 3.0, 9.0]]), t([[2.0, 9.0, 4.0, 6.0, 9.0]])
    mask = torch.tensor([[True, False, True, True, False]])
    advantages, returns = ops.gae(rewards, values, mask, 0.5, 0.5)
    assert advantages.tolist() == [[1 + 0.25 * (-1 - 0.75), 0, -1 - 0.75, -3, 0]]
    assert returns.tolist() == [[0.5625 + 2, 0, 4 - 1.75, 3, 0]]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 19), min_size=1, max_size=4),
    discount=st.sampled_from([0.0, 0.9, 1.0]),
    gae_lambda=st.sampled_from([0.0, 0.7, 1.0]),
    seed=st.integers(0, 9999),
)
def test_gae_is_the_double_sum_over_model_tokens_wherever_they_lie(lengths, discount, gae_lambda, seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros((len(lengths), 30), dtype=bool)
    for row, length in zip(mask, lengths, strict=True):
        row[rng.choice(30, size=length, replace=False)] = True
    rewards, values = rng.normal(size=mask.shape), rng.normal(size=mask.shape)
    expected = np.zeros(mask.shape)
    for b, row in enumerate(mask):
        expected[b, row] = gae_by_definition(rewards[b, row], values[b, row], discount, gae_lambda)
    rewards[~mask] = values[~mask] = np.nan  # never read
    advantages, returns = ops.gae(*map(torch.from_numpy, (rewards, values, mask)), discount, gae_lambda)
    np.testing.assert_allclose(advantages.numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(returns.numpy()[mask], expected[mask] + values[mask], rtol=0, atol=1e-12)
    assert (returns.numpy()[~mask] == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 5)])
def test_gae_without_any_model_token(shape):
    zeros, mask = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
    advantages, returns = ops.gae(zeros, zeros + 7, mask, 1.0, 1.0)
    assert advantages.shape == returns.shape == shape
    assert (advantages == 0).all()
    assert (returns == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gae_keeps_the_dtype_and_carries_no_gradient(dtype):
    values = torch.ones(1, 3, dtype=dtype, requires_grad=True)
    for result in ops.gae(torch.ones(1, 3, dtype=dtype), values, torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0):
        assert result.dtype == dtype
        assert not result.requires_grad


def test_gae_refuses_shapes_and_ranges():
    x, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ConfigurationError, match=r"\(2,\), \(2, 3\) and \(2, 3\)"):
        ops.gae(torch.zeros(2), x, mask, 1.0, 1.0)
    with pytest.raises(ConfigurationError, match=r"discount must be in \[0, 1\], got 1.1"):
        ops.gae(x, x, mask, 1.1, 1.0)
    with pytest.raises(ConfigurationError, match=r"gae_lambda must be in \[0, 1\], got -1"):
        ops.gae(x, x, mask, 1.0, -1)


def test_standardize_by_hand():
    # 1, 2, 3 have mean 2 and variance 1
    x = t([[1.0, math.nan, 2.0], [3.0, INF, 50.0]])
    mask = torch.tensor([[True, False, True], [True, False, False]])
    scale = 1 / math.sqrt(1 + 1e-8)
    torch.testing.assert_close(ops.standardize(x, mask), t([[-scale, 0.0, 0.0], [scale, 0.0, 0.0]]), **TIGHT)


def test_standardize_fewer_than_two_or_equal_entries():
    x = t([[5.0, 7.0, 7.0]])
    assert ops.standardize(x, torch.zeros(1, 3, dtype=torch.bool)).tolist() == [[0, 0, 0]]
    assert ops.standardize(x, torch.tensor([[True, False, False]])).tolist() == [[0, 0, 0]]
    assert ops.standardize(x, torch.tensor([[False, True, True]])).tolist() == [[0, 0, 0]]
    assert ops.standardize(x.float(), torch.ones(1, 3, dtype=torch.bool)).dtype == torch.float32
    assert ops.standardize(x[:0], torch.ones(0, 3, dtype=torch.bool)).shape == (0, 3)


def test_group_advantages_by_hand():
    rewards = t([1.0, 0.0, 0.0, 3.0, 0.0, 0.0, 1.0])
    groups = torch.tensor([7, 7, 7, -2, 7, 7, -2])
    # group 7: one right of five, mean 1/5, variance (16/25 + 4/25) / 4 = 1/5; group -2: 3 and 1, variance 2
    deviation = math.sqrt(1 / 5) + 1e-6
    right, wrong, other = 0.8 / deviation, -0.2 / deviation, 1 / (math.sqrt(2) + 1e-6)
    expected = t([right, wrong, wrong, other, wrong, wrong, -other])
    torch.testing.assert_close(ops.group_advantages(rewards, groups), expected, **TIGHT)
    assert right == pytest.approx(1.789, abs=5e-4)
    assert wrong == pytest.approx(-0.447, abs=5e-4)
    centred = t([0.8, -0.2, -0.2, 1.0, -0.2, -0.2, -1.0])
    torch.testing.assert_close(ops.group_advantages(rewards, groups, scale="none"), centred, **TIGHT)
    # all seven rewards: mean 5/7, sum of squares 11, variance (11 - 25/7) / 6
    batch = centred / (math.sqrt((11 - 25 / 7) / 6) + 1e-6)
    torch.testing.assert_close(ops.group_advantages(rewards, groups, scale="batch"), batch, **TIGHT)


@pytest.mark.parametrize("scale", ops.REWARD_SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_group_is_exactly_zero_despite_rounding(scale, dtype):
    noisy = [0.3, 0.1 + 0.2, 0.3]  # the second is not 0.3
    rewards = torch.tensor([*noisy, 1.0, 0.0, 1e8, 1e8], dtype=dtype)
    result = ops.group_advantages(rewards, torch.tensor([0, 0, 0, 1, 1, 2, 2]), scale)
    assert result.dtype == dtype
    assert result[:3].tolist() == [0, 0, 0]
    assert result[5:].tolist() == [0, 0]
    assert result[3].item() == -result[4].item() > 0


def test_a_group_of_one_is_refused_with_the_reason():
    with pytest.raises(ConfigurationError, match=r"1 of 2 have 1 \(group_ids \[4\]\).*no baseline"):
        ops.group_advantages(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([3, 3, 4]))
    with pytest.raises(ConfigurationError, match="scale must be one of group, batch, none, got 'std'"):
        ops.group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.long), "std")


@pytest.mark.parametrize("scale", ops.REWARD_SCALES)
def test_group_advantages_of_nothing_and_of_whole_numbers(scale):
    assert ops.group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.long), scale).shape == (0,)
    whole = ops.group_advantages(torch.tensor([1, 0]), torch.tensor([0, 0]), scale)
    assert whole.dtype == torch.float32
    assert whole[0].item() > 0.4


def test_masks_of_zeros_and_ones_mean_the_same_as_bools():
    x, mask = normal(2, 6, seed=30), torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]])
    for other in (mask, mask.double()):
        assert torch.equal(ops.standardize(x, other), ops.standardize(x, mask.bool()))
        for one, two in zip(ops.gae(x, x, other, 0.9, 0.9), ops.gae(x, x, mask.bool(), 0.9, 0.9), strict=True):
            assert torch.equal(one, two)
