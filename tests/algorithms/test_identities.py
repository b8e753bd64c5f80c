"""What must hold exactly between the operations and the algorithms: limits, symmetries and special cases.

All float64 and small enough that expectations are sums over the whole vocabulary instead of samples.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from algorithms.dgpo import DGPO, DGPOConfig
from algorithms.kd import KD, KDConfig
from algorithms.learner import ops
from algorithms.learner.types import Batch, Tokens
from algorithms.ppo import PPO, PPOConfig
from algorithms.sft import SFT, SFTConfig

NINE_DIGITS = {"rtol": 0, "atol": 1e-9}
EXACT = {"rtol": 0, "atol": 0}
INF = math.inf


def normal(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(seed: int = 0, rows: int = 6, vocab: int = 7) -> tuple[Tensor, Tensor]:
    return normal(rows, vocab, seed=seed), normal(rows, vocab, seed=seed + 1)


def gradient(function, logits: Tensor) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    function(leaf).sum().backward()
    return leaf.grad


def make_batch(correct: list[bool], seed: int = 0, **fields: Tensor) -> Batch:
    """Rows of 14 columns: prompt, a turn, an observation, a turn, padding; the lengths differ from row to row."""
    size = len(correct)
    attention_mask = torch.zeros(size, 14, dtype=torch.bool)
    response_mask = torch.zeros(size, 14, dtype=torch.bool)
    for row in range(size):
        start, end = 2 + row % 2, 12 - row % 3
        attention_mask[row, : end + row % 3] = True
        response_mask[row, start : start + 3] = True
        response_mask[row, start + 5 : end] = True
    return Batch(
        **{
            "input_ids": torch.arange(size * 14).reshape(size, 14) % 7,
            "attention_mask": attention_mask,
            "response_mask": response_mask,
            "old_logprobs": -normal(size, 14, seed=seed).abs() * response_mask,
            "rewards": torch.tensor(correct, dtype=torch.float64),
            "correct": torch.tensor(correct),
            "group_ids": torch.arange(size),
            "values": normal(size, 14, seed=seed + 1),
            "ref_logprobs": -normal(size, 14, seed=seed + 2).abs(),
            "teacher_logprobs": -normal(size, 14, seed=seed + 3).abs(),
            **fields,
        }
    )


def shaped(algorithm, batch: Batch) -> Batch:
    batch.token_rewards = algorithm.shape_rewards(batch)
    batch.advantages, batch.returns = algorithm.estimate_advantages(batch)
    return batch


def assert_same_credit(left: Batch, right: Batch) -> None:
    for name in ("token_rewards", "advantages", "returns"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


def make_tokens(logits: Tensor, ids: Tensor, **fields: Tensor) -> Tokens:
    logprobs = ops.gather_logprobs(logits, ids)
    zeros = torch.zeros(len(ids), dtype=torch.long)
    return Tokens(
        **{
            "ids": ids,
            "sequence_ids": zeros,
            "correct": zeros.bool(),
            "old_logprobs": logprobs.detach(),
            "logprobs": logprobs,
            "logits": logits,
            **fields,
        }
    )


# --- divergences -----------------------------------------------------------------------------------------------------


def test_kl_is_zero_only_between_equals_and_its_gradient_is_q_minus_p():
    student, teacher = pair(rows=400)
    for divergence in (ops.forward_kl, ops.reverse_kl):
        assert (divergence(student, teacher) > 1e-3).all()
        torch.testing.assert_close(
            divergence(student, student + 3.0), torch.zeros(400, dtype=torch.float64), **NINE_DIGITS
        )
    mask = torch.arange(400) % 3 != 0
    token_mean = gradient(lambda s: (ops.forward_kl(s, teacher) * mask).sum() / mask.sum(), student)
    expected = (torch.softmax(student, -1) - torch.softmax(teacher, -1)) * mask[:, None] / mask.sum()
    torch.testing.assert_close(token_mean, expected, **NINE_DIGITS)


def test_jsd_tends_to_both_kls_when_divided_by_its_weight():
    student, teacher = pair()
    for beta in (1e-4, 1e-6):
        # the next term of the expansion in beta is beta / 2 times the chi-square distance
        p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
        chi_forward, chi_reverse = ((p - q) ** 2 / q).sum(-1), ((p - q) ** 2 / p).sum(-1)
        forward = ops.jsd(student, teacher, beta) / beta + beta / 2 * chi_forward
        reverse = ops.jsd(student, teacher, 1 - beta) / beta + beta / 2 * chi_reverse
        bound = 3 * float(((p / q).amax(-1) ** 3 + (q / p).amax(-1) ** 3).max()) * beta**2 + 1e-8
        torch.testing.assert_close(forward, ops.forward_kl(student, teacher), rtol=0, atol=bound)
        torch.testing.assert_close(reverse, ops.reverse_kl(student, teacher), rtol=0, atol=bound)
    assert (ops.jsd(student, teacher, 1e-12) < 1e-9).all()
    torch.testing.assert_close(ops.jsd(student, teacher, 0.0), ops.forward_kl(student, teacher), **EXACT)
    torch.testing.assert_close(ops.jsd(student, teacher, 1.0), ops.reverse_kl(student, teacher), **EXACT)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_jsd_is_symmetric_under_swapping_both_sides_and_the_weight(beta):
    student, teacher = pair()
    swapped = ops.jsd(teacher, student, 1 - beta)
    torch.testing.assert_close(ops.jsd(student, teacher, beta), swapped, **NINE_DIGITS)


def test_jsd_of_halves_is_at_most_log_two_and_reaches_it_for_disjoint_supports():
    student, teacher = normal(300, 5, seed=1, scale=20.0), normal(300, 5, seed=2, scale=20.0)
    assert (ops.jsd(student, teacher, 0.5) <= math.log(2) + 1e-12).all()
    left, right = torch.tensor([0.0, -INF]).double(), torch.tensor([-INF, 0.0]).double()
    assert ops.jsd(left, right, 0.5).item() == pytest.approx(math.log(2), abs=1e-15)


def test_distillm_weight_of_the_student_is_our_complement():
    student, teacher = pair()
    p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
    lam = 0.9  # DistiLLM: lam KL(q || m) + (1 - lam) KL(p || m), m = (1 - lam) p + lam q
    m = (1 - lam) * p + lam * q
    js_distance = (lam * q * (q / m).log() + (1 - lam) * p * (p / m).log()).sum(-1)
    torch.testing.assert_close(ops.jsd(student, teacher, 0.1), js_distance, **NINE_DIGITS)


def test_skew_divergences_at_their_ends_and_their_bound():
    student, teacher = normal(300, 5, seed=3, scale=9.0), normal(300, 5, seed=4, scale=9.0)
    zeros = torch.zeros(300, dtype=torch.float64)
    torch.testing.assert_close(ops.skew_forward_kl(student, teacher, 0.0), ops.forward_kl(student, teacher), **EXACT)
    torch.testing.assert_close(ops.skew_reverse_kl(student, teacher, 0.0), ops.reverse_kl(student, teacher), **EXACT)
    for skew in (ops.skew_forward_kl, ops.skew_reverse_kl):
        torch.testing.assert_close(skew(student, teacher, 1.0), zeros, **NINE_DIGITS)
        for alpha in (0.1, 0.5):
            value = skew(student, teacher, alpha)
            assert (value > -1e-12).all()
            assert (value <= -math.log(alpha) + 1e-12).all()
            assert value.max() > 0.9 * -math.log(alpha)  # near enough to the bound for it to mean something


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jsd_is_made_of_skew_divergences(beta):
    student, teacher = pair()
    sum_of_skews = beta * ops.skew_forward_kl(student, teacher, beta) + (1 - beta) * ops.skew_reverse_kl(
        student, teacher, 1 - beta
    )
    torch.testing.assert_close(ops.jsd(student, teacher, beta), sum_of_skews, **NINE_DIGITS)


def test_taid_ends_at_kd_and_starts_without_gradient():
    student, teacher = pair()
    q, p = torch.softmax(student, -1), torch.softmax(teacher, -1)
    torch.testing.assert_close(gradient(lambda s: ops.taid_kl(s, teacher, 1.0), student), q - p, **NINE_DIGITS)
    torch.testing.assert_close(gradient(lambda s: ops.taid_kl(s, teacher, 0.0), student), 0 * q, **NINE_DIGITS)
    between = torch.softmax(0.7 * student + 0.3 * teacher, -1)
    torch.testing.assert_close(gradient(lambda s: ops.taid_kl(s, teacher, 0.3), student), q - between, **NINE_DIGITS)


def test_words_outside_the_shared_vocabulary_do_not_matter_once_cut_off():
    student, teacher = pair()
    wider = torch.cat([student, normal(6, 4, seed=9, scale=50.0)], -1)
    ids = torch.arange(6)
    tokens = make_tokens(student, ids, teacher_logits=teacher)
    cut = make_tokens(wider[:, :7], ids, teacher_logits=teacher)
    loss = KD(KDConfig()).token_loss
    torch.testing.assert_close(loss(tokens), loss(cut), **EXACT)
    ruled_out = torch.full((6, 4), -INF, dtype=torch.float64)
    masked = make_tokens(torch.cat([student, ruled_out], -1), ids, teacher_logits=torch.cat([teacher, ruled_out], -1))
    torch.testing.assert_close(loss(tokens), loss(masked), **NINE_DIGITS)


# --- SFT and KD ------------------------------------------------------------------------------------------------------


def test_kd_without_divergence_is_sft_and_never_looks_at_the_teacher():
    student, teacher = pair()
    ids = torch.tensor([0, 3, 6, 2, 2, 1])
    tokens = make_tokens(student, ids, teacher_logits=teacher * math.nan)
    expected = -torch.log_softmax(student, -1)[torch.arange(6), ids]
    torch.testing.assert_close(SFT(SFTConfig()).token_loss(tokens), expected, **NINE_DIGITS)
    torch.testing.assert_close(
        KD(KDConfig(kl_coef=0.0)).token_loss(tokens), SFT(SFTConfig()).token_loss(tokens), **EXACT
    )


def test_kd_with_a_certain_teacher_counts_the_cross_entropy_twice():
    student, _ = pair()
    ids = torch.tensor([0, 3, 6, 2, 2, 1])
    certain = torch.full((6, 7), -INF, dtype=torch.float64).scatter(1, ids[:, None], 0.0)
    tokens = make_tokens(student, ids, teacher_logits=certain)
    torch.testing.assert_close(
        KD(KDConfig(kl_coef=1.0)).token_loss(tokens), 2 * SFT(SFTConfig()).token_loss(tokens), **NINE_DIGITS
    )


def test_kd_loss_and_gradient_written_out():
    student, teacher = pair()
    ids, tau, weight = torch.tensor([0, 3, 6, 2, 2, 1]), 2.0, 0.7
    algorithm = KD(KDConfig(kl_coef=weight, temperature=tau))
    q, q_soft, p_soft = torch.softmax(student, -1), torch.softmax(student / tau, -1), torch.softmax(teacher / tau, -1)
    divergence = (p_soft * (p_soft / q_soft).log()).sum(-1)
    expected = -q[torch.arange(6), ids].log() + weight * tau**2 * divergence
    loss = algorithm.token_loss(make_tokens(student, ids, teacher_logits=teacher))
    torch.testing.assert_close(loss, expected, **NINE_DIGITS)
    one_hot = torch.nn.functional.one_hot(ids, 7)
    torch.testing.assert_close(
        gradient(lambda s: algorithm.token_loss(make_tokens(s, ids, teacher_logits=teacher)), student),
        (q - one_hot) + weight * tau * (q_soft - p_soft),
        **NINE_DIGITS,
    )


def test_kd_in_the_other_parametrisation_has_a_parallel_gradient():
    student, teacher = pair()
    ids, weight = torch.tensor([0, 3, 6, 2, 2, 1]), 1.5
    r = weight / (1 + weight)
    ours = gradient(
        lambda s: KD(KDConfig(kl_coef=weight)).token_loss(make_tokens(s, ids, teacher_logits=teacher)), student
    )
    q, p = torch.softmax(student, -1), torch.softmax(teacher, -1)
    theirs = (1 - r) * (q - torch.nn.functional.one_hot(ids, 7)) + r * (q - p)
    torch.testing.assert_close(ours, (1 + weight) * theirs, **NINE_DIGITS)


def test_kd_at_high_temperature_matches_centred_logits():
    student, teacher = pair()
    ids = torch.zeros(6, dtype=torch.long)

    def divergence(s: Tensor) -> Tensor:
        tokens = make_tokens(s, ids, teacher_logits=teacher)
        return KD(KDConfig(temperature=1e6)).token_loss(tokens) - SFT(SFTConfig()).token_loss(tokens)

    difference = student - teacher
    expected = (difference - difference.mean(-1, keepdim=True)) / 7
    torch.testing.assert_close(gradient(divergence, student), expected, rtol=0, atol=1e-5)


def test_on_policy_jsd_of_weight_zero_is_kd_without_cross_entropy():
    student, teacher = pair()
    tokens = make_tokens(student, torch.zeros(6, dtype=torch.long), teacher_logits=teacher)
    term = KD(KDConfig()).token_loss(tokens) - SFT(SFTConfig()).token_loss(tokens)
    torch.testing.assert_close(ops.jsd(student, teacher, 0.0), term, **NINE_DIGITS)


def test_sft_counts_whole_passes():
    config = SFTConfig(epochs=25, batch_size=16)
    # 200 = 12 * 16 + 8: thirteen batches a pass
    assert SFT(config).num_steps(200) == 325
    assert SFT(config).num_steps(192) == 300
    assert SFT(config).num_steps(1) == 25
    assert PPO(PPOConfig(steps=7)).num_steps(200) == 7


# --- estimators of the KL --------------------------------------------------------------------------------------------


def expectation(estimator: str, logits: Tensor, other: Tensor) -> Tensor:
    """E over tokens drawn from softmax(logits), the draw itself held constant."""
    q = torch.softmax(logits, -1).detach()
    return (q * ops.kl_estimate(torch.log_softmax(logits, -1), torch.log_softmax(other, -1), estimator)).sum(-1)


def test_kl_estimates_are_unbiased_and_of_the_right_sign():
    policy, other = pair()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close(expectation(estimator, policy, other), ops.reverse_kl(policy, other), **NINE_DIGITS)
    log_q, log_p = torch.log_softmax(policy, -1), torch.log_softmax(other, -1)
    assert (ops.kl_estimate(log_q, log_p, "k3") >= 0).all()
    assert (ops.kl_estimate(log_q, log_p, "k2") >= 0).all()
    assert (ops.kl_estimate(log_q, log_p, "k1") < 0).any()
    for estimator in ops.KL_ESTIMATORS:
        assert (ops.kl_estimate(log_q, log_q, estimator) == 0).all()


def test_kl_estimates_on_samples_are_within_four_standard_errors():
    policy, other = pair(rows=1)
    ids = torch.multinomial(torch.softmax(policy[0], -1), 40_000, True, generator=torch.Generator().manual_seed(0))
    log_q, log_p = torch.log_softmax(policy[0], -1)[ids], torch.log_softmax(other[0], -1)[ids]
    for estimator in ("k1", "k3"):
        sample = ops.kl_estimate(log_q, log_p, estimator)
        error = abs(sample.mean() - ops.reverse_kl(policy, other)[0])
        assert error < 4 * sample.std() / math.sqrt(len(ids))


def test_forward_kl_is_the_importance_weighted_expectation():
    student, teacher = pair()
    q, p = torch.softmax(student, -1), torch.softmax(teacher, -1)
    w = p / q
    torch.testing.assert_close(ops.forward_kl(student, teacher), (q * (w * w.log() - w + 1)).sum(-1), **NINE_DIGITS)


def test_gradients_of_the_estimates_used_as_losses():
    policy, other = pair()
    q, p = torch.softmax(policy, -1), torch.softmax(other, -1)
    reverse = (q * (q / p).log()).sum(-1, keepdim=True)
    expected = {"k1": 0 * q, "k2": q * ((q / p).log() - reverse), "k3": q - p}
    for estimator, value in expected.items():
        torch.testing.assert_close(
            gradient(lambda s, e=estimator: expectation(e, s, other), policy), value, **NINE_DIGITS
        )
    torch.testing.assert_close(gradient(lambda s: ops.reverse_kl(s, other), policy), expected["k2"], **NINE_DIGITS)
    torch.testing.assert_close(gradient(lambda s: ops.forward_kl(s, other), policy), expected["k3"], **NINE_DIGITS)


# --- advantages ------------------------------------------------------------------------------------------------------


def test_gae_without_decay_is_return_minus_value_and_with_lambda_zero_one_step():
    rewards, values = normal(3, 9, seed=5), normal(3, 9, seed=6)
    everything = torch.ones(3, 9, dtype=torch.bool)
    advantages, returns = ops.gae(rewards, values, everything, 1.0, 1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, to_go - values, **NINE_DIGITS)
    torch.testing.assert_close(returns, to_go, **NINE_DIGITS)
    advantages, _ = ops.gae(rewards, values, everything, 0.9, 0.0)
    after = torch.cat([values[:, 1:], torch.zeros(3, 1)], 1)
    torch.testing.assert_close(advantages, rewards + 0.9 * after - values, **NINE_DIGITS)


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 1.0), (1.0, 0.9), (0.95, 0.5), (0.5, 0.0)])
@pytest.mark.parametrize("seed", range(5))
def test_inserted_tokens_of_the_environment_leave_gae_unchanged(discount, gae_lambda, seed):
    rewards, values = normal(1, 8, seed=seed), normal(1, 8, seed=seed + 50)
    alone = ops.gae(rewards, values, torch.ones(1, 8, dtype=torch.bool), discount, gae_lambda)
    places = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:8].sort().values
    long_rewards, long_values = normal(1, 20, seed=seed + 100), normal(1, 20, seed=seed + 150)
    long_rewards[:, places], long_values[:, places] = rewards, values
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[:, places] = True
    for short, long in zip(alone, ops.gae(long_rewards, long_values, mask, discount, gae_lambda), strict=True):
        torch.testing.assert_close(long[:, places], short, **EXACT)
        assert (long[~mask] == 0).all()


def test_standardized_advantages_have_mean_zero_and_variance_one_and_ignore_the_rest():
    x, mask = normal(5, 9, seed=7) + 3, normal(5, 9, seed=8) > -1
    result = ops.standardize(x, mask)
    assert result[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert result[mask].var(correction=1).item() == pytest.approx(1, abs=1e-8)
    torch.testing.assert_close(ops.standardize(torch.where(mask, x, 1e6), mask), result, **EXACT)
    assert (result[~mask] == 0).all()


def test_group_advantages_sum_to_zero_and_ignore_shift_scale_and_order():
    rewards = normal(12, seed=9)
    groups = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 2, 2, 2])
    result = ops.group_advantages(rewards, groups)
    for group in range(3):
        assert result[groups == group].sum().item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(ops.group_advantages(rewards + 5, groups), result, **NINE_DIGITS)
    # up to the 1e-6 beside the standard deviation, here about 1
    torch.testing.assert_close(ops.group_advantages(rewards * 10, groups), result, rtol=0, atol=1e-5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ops.group_advantages(rewards[order], groups[order]), result[order], **NINE_DIGITS)
    # the same question asked twice, under two ids: statistics do not mix
    apart = ops.group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64), torch.tensor([5, 5, 6, 6]))
    root = 0.5 / (math.sqrt(0.5) + 1e-6)
    torch.testing.assert_close(apart, torch.tensor([root, -root, 0.0, 0.0], dtype=torch.float64), **NINE_DIGITS)


# --- PPO -------------------------------------------------------------------------------------------------------------


def test_ppo_at_the_old_policy_is_the_policy_gradient():
    logits, ids, advantages = normal(6, 7, seed=10), torch.tensor([0, 3, 6, 2, 2, 1]), normal(6, seed=11)
    algorithm = PPO(PPOConfig(entropy_coef=0.0))

    def loss(s: Tensor, credit: Tensor) -> Tensor:
        return algorithm.token_loss(make_tokens(s, ids, advantages=credit, entropy=ops.token_entropy(s)))

    torch.testing.assert_close(loss(logits, advantages), -advantages, **NINE_DIGITS)
    one_hot = torch.nn.functional.one_hot(ids, 7)
    expected = -advantages[:, None] * (one_hot - torch.softmax(logits, -1))
    torch.testing.assert_close(gradient(lambda s: loss(s, advantages), logits), expected, **NINE_DIGITS)
    assert (gradient(lambda s: loss(s, 0 * advantages), logits) == 0).all()


def test_ppo_entropy_bonus_raises_the_entropy():
    logits, ids = normal(6, 7, seed=10), torch.zeros(6, dtype=torch.long)
    algorithm = PPO(PPOConfig(entropy_coef=0.3))

    def loss(s: Tensor) -> Tensor:
        zero = torch.zeros(6, dtype=torch.float64)
        return algorithm.token_loss(make_tokens(s, ids, advantages=zero, entropy=ops.token_entropy(s)))

    q = torch.softmax(logits, -1)
    entropy = -(q * q.log()).sum(-1, keepdim=True)
    torch.testing.assert_close(loss(logits), -0.3 * entropy[:, 0], **NINE_DIGITS)
    # dH / ds = -q (log q + H)
    torch.testing.assert_close(gradient(loss, logits), 0.3 * q * (q.log() + entropy), **NINE_DIGITS)


def test_ppo_value_loss_without_clipping_is_half_the_squared_error():
    values, old, returns = normal(9, seed=12), normal(9, seed=13), normal(9, seed=14)
    tokens = make_tokens(normal(9, 3, seed=0), torch.zeros(9, dtype=torch.long))
    tokens.values, tokens.old_values, tokens.returns = values, old, returns
    loss = PPO(PPOConfig(value_clip_range=INF)).value_loss(tokens)
    torch.testing.assert_close(loss, (values - returns) ** 2 / 2, **NINE_DIGITS)
    assert (PPO(PPOConfig(value_clip_range=0.5)).value_loss(tokens) >= loss - 1e-12).all()


@pytest.mark.parametrize("estimator", ops.KL_ESTIMATORS)
def test_ppo_rewards_written_out(estimator):
    batch = make_batch([True, False, True])
    result = PPO(PPOConfig(kl_coef=0.3, kl_estimator=estimator)).shape_rewards(batch)
    expected = torch.zeros(3, 14, dtype=torch.float64)
    for row in range(3):
        columns = batch.response_mask[row].nonzero().flatten().tolist()
        for column in columns:
            k1 = float(batch.old_logprobs[row, column] - batch.ref_logprobs[row, column])
            estimate = {"k1": k1, "k2": k1**2 / 2, "k3": math.exp(-k1) + k1 - 1}[estimator]
            expected[row, column] = -0.3 * estimate
        expected[row, columns[-1]] += float(batch.rewards[row])
    torch.testing.assert_close(result, expected, **NINE_DIGITS)


def test_ppo_advantages_are_standardized_and_returns_are_not():
    batch = shaped(PPO(PPOConfig(gae_lambda=1.0)), make_batch([True, False, True]))
    mask = batch.response_mask
    to_go = batch.token_rewards.flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(batch.returns, to_go, **NINE_DIGITS)
    raw = (to_go - batch.values)[mask]
    torch.testing.assert_close(batch.advantages[mask], (raw - raw.mean()) / raw.std(), rtol=0, atol=1e-7)
    assert (batch.advantages[~mask] == 0).all()


@pytest.mark.parametrize("make", [lambda: PPO(PPOConfig()), lambda: DGPO(DGPOConfig())])
def test_nothing_at_tokens_of_the_environment_is_ever_read(make):
    batch, disturbed = make_batch([True, False, False]), make_batch([True, False, False])
    noise = normal(3, 14, seed=20, scale=1e3).masked_fill(batch.response_mask, 0.0)
    disturbed.input_ids = torch.where(batch.response_mask, batch.input_ids, 5)
    for name in ("old_logprobs", "values", "ref_logprobs", "teacher_logprobs"):
        setattr(disturbed, name, getattr(batch, name) + noise)
    assert_same_credit(shaped(make(), batch), shaped(make(), disturbed))
    assert make().step_metrics(disturbed) == make().step_metrics(batch)


def test_a_trajectory_without_model_tokens_gets_nothing():
    batch = make_batch([True, False])
    batch.response_mask[0] = False
    for algorithm in (PPO(PPOConfig()), DGPO(DGPOConfig())):
        shaped(algorithm, batch)
        for name in ("token_rewards", "advantages", "returns"):
            assert (getattr(batch, name)[0] == 0).all()
            assert torch.isfinite(getattr(batch, name)).all()


# --- DGPO ------------------------------------------------------------------------------------------------------------

MIXED = [True, False, False, True, False]


def test_dgpo_without_penalty_is_ppo_without_penalty_to_the_bit():
    for dtype in (torch.float32, torch.float64):
        batches = []
        for algorithm in (DGPO(DGPOConfig(kl_coef=0.0, gae_lambda=1.0)), PPO(PPOConfig(kl_coef=0.0))):
            batch = make_batch(MIXED)
            for name in ("old_logprobs", "rewards", "values", "ref_logprobs", "teacher_logprobs"):
                setattr(batch, name, getattr(batch, name).to(dtype))
            batches.append(shaped(algorithm, batch))
        assert batches[0].token_rewards.dtype == dtype
        assert_same_credit(*batches)


def test_without_penalty_even_a_teacher_that_rules_a_token_out_changes_nothing():
    batch = make_batch(MIXED, teacher_logprobs=torch.full((5, 14), -INF, dtype=torch.float64))
    assert DGPO(DGPOConfig(kl_coef=0.0)).shape_rewards(batch).sum(1).tolist() == [1, 0, 0, 1, 0]


def test_dgpo_with_a_uniform_penalty_towards_the_initial_policy_is_ppo():
    uniform = DGPO(DGPOConfig(selective=False, kl_coef=0.001, gae_lambda=1.0))
    left, right = make_batch(MIXED), make_batch(MIXED)
    left.teacher_logprobs, left.ref_logprobs = right.ref_logprobs, None
    assert_same_credit(shaped(uniform, left), shaped(PPO(PPOConfig()), right))
    logits, ids = normal(6, 7, seed=3), torch.arange(6)
    tokens = make_tokens(logits, ids, advantages=normal(6, seed=4), entropy=ops.token_entropy(logits))
    tokens.old_logprobs = tokens.old_logprobs + normal(6, seed=5)
    assert torch.equal(uniform.token_loss(tokens), PPO(PPOConfig()).token_loss(tokens))


def test_dgpo_leaves_right_trajectories_alone():
    algorithm = DGPO(DGPOConfig(kl_coef=0.5))
    batch, other = make_batch([True] * 4), make_batch([True] * 4)
    other.teacher_logprobs = batch.teacher_logprobs - 3
    assert_same_credit(shaped(algorithm, batch), shaped(algorithm, other))
    assert batch.token_rewards.sum(1).tolist() == [1, 1, 1, 1]
    # in mixed company as well, and the teacher's opinion of foreign words is not asked
    batch, other = make_batch(MIXED), make_batch(MIXED)
    asked = batch.response_mask & ~batch.correct[:, None]
    other.teacher_logprobs = torch.where(asked, batch.teacher_logprobs, -77.0)
    assert_same_credit(shaped(algorithm, batch), shaped(algorithm, other))


def test_dgpo_that_is_selective_among_wrong_trajectories_penalizes_all():
    selective, uniform = make_batch([False] * 3), make_batch([False] * 3)
    shaped(DGPO(DGPOConfig()), selective)
    assert_same_credit(selective, shaped(DGPO(DGPOConfig(selective=False)), uniform))
    assert (selective.token_rewards != 0).any()


@pytest.mark.parametrize("estimator", ops.KL_ESTIMATORS)
def test_dgpo_with_itself_as_teacher_has_no_penalty(estimator):
    batch = make_batch(MIXED)
    batch.teacher_logprobs = batch.old_logprobs.clone()
    rewards = DGPO(DGPOConfig(kl_coef=0.5, kl_estimator=estimator)).shape_rewards(batch)
    assert rewards.sum(1).tolist() == [1, 0, 0, 1, 0]
    assert rewards.abs().sum().item() == 2


def test_dgpo_return_of_a_wrong_trajectory_is_minus_beta_times_the_sum_of_k1():
    batch = shaped(DGPO(DGPOConfig(kl_coef=0.5, gae_lambda=1.0)), make_batch(MIXED))
    for row, correct in enumerate(MIXED):
        mask = batch.response_mask[row]
        k1 = (batch.old_logprobs[row] - batch.teacher_logprobs[row])[mask]
        expected = 1.0 if correct else -0.5 * k1.sum().item()
        assert batch.token_rewards[row].sum().item() == pytest.approx(expected, abs=1e-12)
        assert batch.returns[row][mask][0].item() == pytest.approx(expected, abs=1e-9)
    # k1 has a sign and keeps it: where the teacher likes a wrong token better than the policy does, it pays
    assert (batch.token_rewards[~batch.correct] > 0).any()


def test_dgpo_asks_whether_the_answer_is_right_not_how_large_the_reward_is():
    batch = make_batch([True, False], rewards=torch.tensor([0.0, 0.2], dtype=torch.float64))
    rewards = DGPO(DGPOConfig(kl_coef=0.5)).shape_rewards(batch)
    k1 = ((batch.old_logprobs - batch.teacher_logprobs) * batch.response_mask).sum(1)
    assert rewards[0].tolist() == [0.0] * 14
    assert rewards[1].sum().item() == pytest.approx(0.2 - 0.5 * k1[1].item(), abs=1e-12)


def test_dgpo_reports_the_divergence_of_wrong_trajectories_only():
    batch = make_batch(MIXED)
    wrong = batch.response_mask & ~batch.correct[:, None]
    expected = (batch.old_logprobs - batch.teacher_logprobs)[wrong].mean().item()
    metrics = DGPO(DGPOConfig()).step_metrics(batch)
    assert metrics["anchor_kl"] == pytest.approx(expected, abs=1e-12)
    assert metrics["wrong_fraction"] == pytest.approx(0.6)
    no_penalty = {"penalty_mean": 0.0, "penalty_variance": 0.0}
    assert DGPO(DGPOConfig()).step_metrics(make_batch([True, True])) == {"wrong_fraction": 0.0, **no_penalty}
    everyone = (batch.old_logprobs - batch.ref_logprobs)[batch.response_mask].mean().item()
    assert PPO(PPOConfig()).step_metrics(batch)["anchor_kl"] == pytest.approx(everyone, abs=1e-12)


def test_the_penalty_that_is_logged_is_what_the_rewards_lose():
    for algorithm in (PPO(PPOConfig(kl_coef=0.3)), DGPO(DGPOConfig(kl_coef=0.3)), DGPO(DGPOConfig(kl_clip=0.1))):
        batch = make_batch(MIXED)
        paid = batch.rewards - algorithm.shape_rewards(batch).sum(1)
        metrics = algorithm.step_metrics(batch)
        assert metrics["penalty_mean"] == pytest.approx(paid.mean().item(), abs=1e-12)
        assert metrics["penalty_variance"] == pytest.approx(paid.var(correction=0).item(), abs=1e-12)
        assert metrics["penalty_variance"] > 0


def test_a_clipped_penalty_costs_no_token_more_than_its_bound():
    batch = make_batch(MIXED)
    batch.teacher_kl = batch.old_logprobs - batch.teacher_logprobs
    k1 = torch.where(batch.response_mask & ~batch.correct[:, None], batch.teacher_kl, 0.0)
    for estimator, clipped in (("k1", k1.clamp(-0.5, 0.5)), ("exact", k1.clamp(max=0.5))):
        algorithm = DGPO(DGPOConfig(kl_coef=1.0, kl_clip=0.5, kl_estimator=estimator))
        torch.testing.assert_close(algorithm.shape_rewards(batch).sum(1), batch.rewards - clipped.sum(1), **NINE_DIGITS)


def test_dgpo_with_the_reference_in_the_teachers_place_is_its_own_teacher():
    mine, theirs = make_batch(MIXED), make_batch(MIXED)
    theirs.teacher_logprobs = theirs.ref_logprobs
    mine.teacher_logprobs = None
    own = DGPO(DGPOConfig(anchor="reference", kl_coef=0.3))
    assert own.needs == {"values", "entropy", "ref_logprobs"}
    assert_same_credit(shaped(own, mine), shaped(DGPO(DGPOConfig(kl_coef=0.3)), theirs))


def test_dgpo_without_its_teacher_and_its_selection_is_ppo():
    left, right = make_batch(MIXED), make_batch(MIXED)
    without = DGPO(DGPOConfig(anchor="reference", selective=False))
    assert_same_credit(shaped(without, left), shaped(PPO(PPOConfig()), right))
    assert without.needs == PPO(PPOConfig()).needs


def test_exact_divergence_takes_the_place_of_the_estimate():
    kl = normal(5, 14, seed=9).abs()
    for make, name in ((lambda **k: DGPO(DGPOConfig(**k)), "teacher_kl"), (lambda **k: PPO(PPOConfig(**k)), "ref_kl")):
        algorithm = make(kl_estimator="exact", kl_coef=0.5)
        assert algorithm.needs == {"values", "entropy", name, name.replace("kl", "logprobs")}
        batch = make_batch(MIXED, **{name: kl})
        pays = batch.response_mask & (~batch.correct[:, None] | (name == "ref_kl"))
        rewards = algorithm.shape_rewards(batch)
        torch.testing.assert_close(rewards.sum(1), batch.rewards - 0.5 * (kl * pays).sum(1), **NINE_DIGITS)
        assert algorithm.step_metrics(batch)["anchor_kl"] == pytest.approx(kl[pays].mean().item(), abs=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k3", "exact"])
def test_the_policy_gradient_of_the_penalty_is_that_of_the_divergence(estimator, monkeypatch):
    """Over all episodes of two tokens: sum of probability, advantage and score equals the gradient of the KL."""
    monkeypatch.setattr(ops, "standardize", lambda advantages, mask: advantages)
    size = 4
    ours = normal(1 + size, size, seed=20).requires_grad_()  # of the first token, and of the second after each first
    teacher = normal(1 + size, size, seed=21).log_softmax(-1)
    first, second = (each.flatten() for each in torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij"))
    log_q = ours.log_softmax(-1)
    divergences = (log_q.exp() * (log_q - teacher)).sum(-1)

    def of_tokens(table: Tensor) -> Tensor:
        return torch.stack((torch.zeros(size**2), table[0, first], table[1 + first, second]), dim=1)

    logprobs = of_tokens(log_q)
    probabilities = logprobs.sum(1).exp()
    mask = torch.tensor([False, True, True]).expand(size**2, 3)
    batch = Batch(
        input_ids=torch.zeros(size**2, 3, dtype=torch.int64),
        attention_mask=torch.ones(size**2, 3, dtype=torch.bool),
        response_mask=mask,
        old_logprobs=logprobs.detach(),
        rewards=torch.zeros(size**2, dtype=torch.float64),
        correct=torch.zeros(size**2, dtype=torch.bool),
        group_ids=torch.arange(size**2),
        values=torch.zeros(size**2, 3, dtype=torch.float64),
        teacher_logprobs=of_tokens(teacher),
        teacher_kl=torch.stack(
            (torch.zeros(size**2), divergences[0].expand(size**2), divergences[1 + first]), 1
        ).detach(),
    )
    shaped(DGPO(DGPOConfig(kl_coef=0.3, kl_estimator=estimator)), batch)
    (found,) = torch.autograd.grad(
        (probabilities.detach()[:, None] * batch.advantages * logprobs * mask).sum(), ours, retain_graph=True
    )
    divergence = divergences[0] + (log_q[0].exp() * divergences[1:]).sum()
    (wanted,) = torch.autograd.grad(-0.3 * divergence, ours)
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(found, wanted, **NINE_DIGITS)


def test_exact_divergence_is_the_expectation_of_the_estimates():
    student, teacher = pair(rows=1)
    q = torch.softmax(student[0], -1)
    exact = ops.reverse_kl(student, teacher).item()
    for estimator in ("k1", "k3"):
        of_each = ops.kl_estimate(torch.log_softmax(student[0], -1), torch.log_softmax(teacher[0], -1), estimator)
        assert (q * of_each).sum().item() == pytest.approx(exact, abs=1e-12)


def test_length_neutral_penalty_costs_short_and_long_trajectories_the_same():
    same_kl = make_batch(MIXED, teacher_logprobs=torch.zeros(5, 14, dtype=torch.float64))
    same_kl.teacher_logprobs = same_kl.old_logprobs - 0.7
    lengths = same_kl.response_mask.sum(1).double()
    wrong = ~same_kl.correct
    assert len(set(lengths[wrong].tolist())) > 1
    summed = DGPO(DGPOConfig(kl_coef=0.1)).shape_rewards(same_kl).sum(1)
    torch.testing.assert_close(summed[wrong], -0.07 * lengths[wrong], **NINE_DIGITS)
    neutral = DGPO(DGPOConfig(kl_coef=0.1, length_neutral=True)).shape_rewards(same_kl).sum(1)
    torch.testing.assert_close(neutral[wrong], (-0.07 * lengths[wrong].mean()).expand(int(wrong.sum())), **NINE_DIGITS)
    # over all of them as large as before; right ones go free
    torch.testing.assert_close(neutral[wrong].sum(), summed[wrong].sum(), **NINE_DIGITS)
    assert neutral[~wrong].tolist() == summed[~wrong].tolist() == [1.0] * int((~wrong).sum())
    all_right = make_batch([True, True])
    assert DGPO(DGPOConfig(length_neutral=True)).shape_rewards(all_right).sum(1).tolist() == [1.0, 1.0]


def test_a_teacher_that_rules_out_a_right_token_is_not_asked():
    batch = make_batch(MIXED)
    batch.teacher_logprobs[batch.correct] = -INF
    for length_neutral in (False, True):
        rewards = DGPO(DGPOConfig(length_neutral=length_neutral)).shape_rewards(batch)
        assert torch.isfinite(rewards).all()
