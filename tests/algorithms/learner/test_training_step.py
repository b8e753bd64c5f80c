"""The chunked training step against a plain one that builds [B, T, V], and the invariances a step must have."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_learner import VOCAB, make_batch, make_learner, make_model, sgd_free
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from agentic_rag_env.errors import ConfigurationError
from algorithms.dgpo import DGPO, DGPOConfig
from algorithms.dgpo_grpo import DGPOGRPO, DGPOGRPOConfig
from algorithms.gkd import GKD, GKDConfig
from algorithms.grpo import GRPO, GRPOConfig
from algorithms.kd import KD, KDConfig
from algorithms.learner import checkpointing, scoring
from algorithms.learner.algorithm import Algorithm, AlgorithmConfig, OptimizerConfig
from algorithms.learner.collate import collate
from algorithms.learner.config import LearnerConfig
from algorithms.learner.networks import freeze
from algorithms.learner.training_step import Learner
from algorithms.learner.types import Batch, Tokens, Trajectory, Turn
from algorithms.ppo import PPO, PPOConfig
from algorithms.sft import SFT, SFTConfig


def make_ppo(**settings) -> PPO:
    defaults = {"num_minibatches": 1, "critic_warmup_steps": 0, "optimizer": sgd_free(), "critic_optimizer": sgd_free()}
    return PPO(PPOConfig(**{**defaults, **settings}))


def make_kd(**settings) -> KD:
    return KD(KDConfig(**{"optimizer": sgd_free(), **settings}))


@pytest.fixture(params=[1, 10**6])
def blocks(request, monkeypatch):
    """The least size of a block of logits: tokens go through the losses two at a time, or a chunk at a time."""
    monkeypatch.setattr(scoring, "_BLOCKS_OF_CHUNK", 2)
    monkeypatch.setattr(scoring, "_MIN_BLOCK_LOGITS", request.param)


def full_logits(model, batch: Batch, temperature: float = 1.0) -> Tensor:
    """[B, T, V]: entry t is the distribution of token t, entry 0 is meaningless."""
    positions = (batch.attention_mask.long().cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), position_ids=positions).logits
    return torch.roll(logits, 1, dims=1) / temperature


def naive_logprobs(model, batch: Batch, temperature: float = 1.0) -> Tensor:
    table = full_logits(model, batch, temperature).log_softmax(-1)
    return table.gather(-1, batch.input_ids[..., None])[..., 0]


def gradients(learner: Learner, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
    """What the optimizers saw in the last minibatch of an update."""
    found = {}

    def watch(optimizer, network, prefix):
        apply = optimizer.apply

        def record(*args):
            found.update({prefix + name: p.grad.clone() for name, p in network.named_parameters()})
            return apply(*args)

        optimizer.apply = record

    watch(learner.policy_optimizer, learner.policy, "")
    if learner.critic is not None:
        watch(learner.critic_optimizer, learner.critic, "critic.")
    learner.score(batch)
    learner.update(batch, np.random.default_rng(seed))
    return found


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(value / scale, second[name] / scale, atol=tolerance, rtol=0, msg=name)


# --- against the plain implementation --------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean"])
def test_cross_entropy_gradient_equals_the_plain_one(reduction):
    batch = make_batch()
    found = gradients(
        make_learner(SFT(SFTConfig(optimizer=sgd_free(), loss_reduction=reduction)), chunk_tokens=5), batch
    )
    model = make_model(0)
    losses = -naive_logprobs(model, batch)
    mask = batch.response_mask
    if reduction == "token-mean":
        loss = losses[mask].mean()
    else:
        loss = torch.stack([row[m].mean() for row, m in zip(losses, mask, strict=True)]).mean()
    loss.backward()
    assert_same(found, {name: p.grad for name, p in model.named_parameters()})


def test_an_end_of_text_that_no_later_token_reads_is_trained_all_the_same():
    """The gradient is that of two plain sequences: one up to the end of the first text, one without that end."""
    eos, prompt, words, reply, answer = 22, [1, 2, 3], [4, 5], [6, 7], [8, 9]
    logprobs = np.full(3, -1.0, dtype=np.float32)
    turns = [
        Turn(np.array([*words, eos]), logprobs, np.array(reply), {}, end_unread=True),
        Turn(np.array(answer), logprobs[:2], np.array([], dtype=np.int64), {}),
    ]
    batch = collate([Trajectory(np.array(prompt), turns, 0, "policy", 1.0, True, True, False)], pad_id=0)
    found = gradients(make_learner(SFT(SFTConfig(optimizer=sgd_free())), chunk_tokens=2), batch)
    model = make_model(0)

    def logprobs_of_last(count: int, ids: list[int]) -> Tensor:
        table = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return table[range(len(ids) - count - 1, len(ids) - 1), ids[-count:]]

    ended = logprobs_of_last(3, [*prompt, *words, eos])
    went_on = logprobs_of_last(2, [*prompt, *words, *reply, *answer])
    (-torch.cat((ended, went_on)).mean()).backward()
    assert_same(found, {name: p.grad for name, p in model.named_parameters()})


def test_ends_of_text_that_lose_become_rarer():
    """A policy that may stop too early learns not to, though the episode goes on after such a stop."""
    eos, prompt = 22, [1, 2, 3]
    reply, nothing = np.array([6, 7]), np.array([], dtype=np.int64)
    one, two = (np.full(count, -np.log(VOCAB), dtype=np.float32) for count in (1, 2))  # about uniform
    lost = [Turn(np.array([4, eos]), two, reply, {}, end_unread=True), Turn(np.array([8]), one, nothing, {})]
    won = [Turn(np.array([4, 5]), two, reply, {}), Turn(np.array([8]), one, nothing, {})]
    batch = collate(
        [
            Trajectory(np.array(prompt), turns, 0, "policy", float(right), right, True, False)
            for turns, right in ((lost, False), (won, True))
        ],
        pad_id=0,
    )
    settings = {"batch_size": 2, "rollouts_per_prompt": 2, "num_minibatches": 1, "kl_coef": 0.0, "entropy_coef": 0.0}
    learner = make_learner(GRPO(GRPOConfig(**settings, optimizer=sgd_free(0.01))))
    context = torch.tensor([[*prompt, 4]])

    def chance() -> float:
        return float(learner.policy(input_ids=context).logits[0, -1].softmax(-1)[eos])

    before = chance()
    learner.score(batch)
    learner.update(batch, np.random.default_rng(0))
    assert chance() < 0.95 * before


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kd_gradient_equals_the_plain_one(temperature, blocks):
    batch = make_batch()
    learner = make_learner(make_kd(kl_coef=0.5), temperature=temperature, chunk_tokens=4, micro_batch_tokens=40)
    found = gradients(learner, batch)
    model = make_model(0)
    log_q = full_logits(model, batch, temperature).log_softmax(-1)
    log_p = full_logits(make_model(200), batch, temperature).log_softmax(-1).detach()
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    cross_entropy = -log_q.gather(-1, batch.input_ids[..., None])[..., 0]
    (cross_entropy + 0.5 * divergence)[batch.response_mask].mean().backward()
    assert_same(found, {name: p.grad for name, p in model.named_parameters()})


@pytest.mark.parametrize(("shared", "value_coef"), [(False, 0.3), (True, 0.0), (True, 0.3), (True, 1.0)])
def test_ppo_gradient_equals_the_plain_one(shared, value_coef, blocks):
    """A shared backbone gets `value_coef` of the value loss's gradient, and a head of its own optimizer gets it all."""
    batch = make_batch()
    algorithm = make_ppo(entropy_coef=0.1, kl_coef=0.05, gae_lambda=0.9)
    learner = make_learner(algorithm, shared=shared, chunk_tokens=4, micro_batch_tokens=40, value_coef=value_coef)
    torch.nn.init.normal_(learner.critic.head.weight, std=0.3)
    head = copy.deepcopy(learner.critic.head)
    found = gradients(learner, batch)

    model, trunk, mask = make_model(0), make_model(0), batch.response_mask
    torch.testing.assert_close(batch.ref_logprobs[mask], naive_logprobs(make_model(100), batch)[mask])
    assert not batch.ref_logprobs[~mask].any()
    assert not batch.values[~mask].any()
    log_q = full_logits(model, batch).log_softmax(-1)
    logprobs = log_q.gather(-1, batch.input_ids[..., None])[..., 0]
    entropy = -(log_q.exp() * log_q).sum(-1)
    ratio = (logprobs - batch.old_logprobs).exp()
    surrogate = -torch.minimum(ratio * batch.advantages, ratio.clamp(0.8, 1.2) * batch.advantages)
    policy_loss = (surrogate - 0.1 * entropy)[mask].mean()
    values_of = model if shared else trunk
    hidden = values_of.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).last_hidden_state
    of_backbone = hidden.detach() + value_coef * (hidden - hidden.detach()) if shared else hidden
    values = torch.roll(head(of_backbone)[..., 0], 1, dims=1)
    torch.testing.assert_close(batch.values[mask], values[mask].detach())
    value_loss = 0.5 * (values - batch.returns)[mask].square().mean()
    (policy_loss + value_loss).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    if not shared:
        expected |= {f"critic.backbone.{name}": p.grad for name, p in trunk.model.named_parameters()}
    expected |= {f"critic.head.{name}": p.grad for name, p in head.named_parameters()}
    assert_same(found, expected)


# --- invariances -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_kd, make_ppo])
@pytest.mark.parametrize("settings", [{"chunk_tokens": 1}, {"micro_batch_tokens": 1}, {"gradient_checkpointing": True}])
def test_splitting_changes_nothing(make, settings):
    whole = gradients(make_learner(make()), make_batch())
    assert_same(whole, gradients(make_learner(make(), **settings), make_batch()))


def test_checkpointing_recomputes_layers_and_is_off_outside_the_update():
    learner, batch = make_learner(make_ppo(), gradient_checkpointing=True), make_batch()
    calls = []
    for network in (learner.policy, learner.critic):
        for layer in network.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.mlp.register_forward_pre_hook(lambda module, *_: calls.append(module.training))
    learner.score(batch)
    calls.clear()
    learner.update(batch, np.random.default_rng(0))
    assert calls == [False] * 8  # 2 networks, 2 layers, forward and again in backward; dropout stays off
    assert not any(module.training for module in learner.policy.modules())


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.5}),
        ("falcon", {"hidden_dropout": 0.5}),
        ("llama", {"intermediate_size": 32, "attention_dropout": 0.5}),
    ],
)
def test_checkpointing_turns_no_dropout_on(family, sizes):
    """Layers of OPT and Falcon drop by a function, which looks at the layer's own mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **sizes
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids, found = torch.arange(24).view(2, 12), []
    for checkpointed in (False, True):
        if checkpointed:
            checkpointing.enable(model)
        model.zero_grad()
        with checkpointing.active([model] if checkpointed else []):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        found.append({name: each.grad.clone() for name, each in model.named_parameters()} | {"loss": loss.detach()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("make", [make_kd, make_ppo])
def test_padding_and_order_change_nothing(make):
    batch = make_batch()
    whole = gradients(make_learner(make()), batch)
    assert_same(whole, gradients(make_learner(make()), make_batch(extra_padding=9)))
    shuffled = make_batch().select([5, 3, 0, 1, 4, 2])
    assert_same(whole, gradients(make_learner(make()), shuffled, seed=3))


@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean"])
def test_a_trajectory_without_model_tokens_is_harmless(reduction):
    batch = make_batch()
    batch.response_mask[3] = False
    batch.old_logprobs[3] = 0
    algorithm = SFT(SFTConfig(optimizer=sgd_free(), loss_reduction=reduction))
    found = gradients(make_learner(algorithm, micro_batch_tokens=1), batch)
    others = gradients(make_learner(algorithm), batch.select([0, 1, 2, 4, 5]))
    share = 5 / 6 if reduction == "seq-mean" else 1.0
    assert_same(found, {name: value * share for name, value in others.items()})


def test_labels_after_the_last_model_token_and_padding_never_matter():
    batch, other = make_batch(), make_batch()
    last = torch.where(batch.response_mask, torch.arange(18), -1).amax(dim=1)
    after = torch.arange(18) > last[:, None]
    assert after.any()
    other.input_ids[after] = 7
    other.old_logprobs[~other.response_mask] = 5.0
    assert_same(gradients(make_learner(make_ppo()), batch), gradients(make_learner(make_ppo()), other), 0.0)


def test_logits_where_the_model_did_not_write_are_not_computed(monkeypatch):
    seen = []
    original = scoring.lm_logits
    monkeypatch.setattr(scoring, "lm_logits", lambda *a: seen.append(original(*a)) or seen[-1])
    batch = make_batch()
    gradients(make_learner(SFT(SFTConfig(optimizer=sgd_free()))), batch)
    assert sum(len(logits) for logits in seen) == int(batch.response_mask.sum())


def test_context_text_does_matter():
    batch, other = make_batch(), make_batch()
    other.input_ids[:, 8] = (other.input_ids[:, 8] + 1) % VOCAB
    first, second = gradients(make_learner(make_kd()), batch), gradients(make_learner(make_kd()), other)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(first[name], second[name])


def test_vocabulary_beyond_the_shared_part_changes_nothing():
    batch, wide = make_batch(), make_model(0, VOCAB + 4)
    with torch.no_grad():
        for (name, target), source in zip(wide.named_parameters(), make_model(0).parameters(), strict=True):
            target[: len(source)] = source
            if name == "model.embed_tokens.weight":
                target[VOCAB:] = 50.0
    found = gradients(make_learner(make_ppo(), policy=wide), batch)
    narrow = gradients(make_learner(make_ppo()), make_batch())
    name = "model.embed_tokens.weight"
    assert not found[name][VOCAB:].any()
    for each in (name, f"critic.backbone.{name.removeprefix('model.')}"):
        found[each] = found[each][:VOCAB]
    assert_same(found, narrow)


def test_teacher_does_not_matter_to_dgpo_if_all_is_correct():
    def run(teacher_seed: int) -> dict[str, Tensor]:
        batch = make_batch()
        batch.correct[:], batch.rewards[:] = True, 1.0
        settings = {"num_minibatches": 1, "critic_warmup_steps": 0, "optimizer": sgd_free()}
        learner = make_learner(DGPO(DGPOConfig(**settings)))
        learner.teacher = freeze(make_model(teacher_seed))
        return gradients(learner, batch)

    assert_same(run(200), run(300), 0.0)


# --- PPO at the policy that sampled ----------------------------------------------------------------------------------


def on_policy_batch() -> Batch:
    batch = make_batch()
    batch.old_logprobs = torch.where(batch.response_mask, naive_logprobs(make_model(0), batch).detach(), 0.0)
    return batch


def test_ratio_is_one_at_the_sampling_policy():
    batch, learner = on_policy_batch(), make_learner(make_ppo())
    learner.score(batch)
    metrics = learner.update(batch, np.random.default_rng(0))
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["clip_fraction"] == 0.0
    assert metrics["rollout/logprob_gap_max"] < 1e-6
    assert abs(metrics["approx_kl"]) < 1e-6
    with torch.no_grad():
        log_q = full_logits(make_model(0), batch).log_softmax(-1)[batch.response_mask]
    assert metrics["entropy"] == pytest.approx(float(-(log_q.exp() * log_q).sum(-1).mean()), abs=1e-5)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_gap_to_the_sampler_is_that_before_the_first_step(cap):
    """With a cap the learner scores the old log-probabilities; the gap is still that of the sampled ones."""
    batch = make_batch()
    learner = make_learner(make_ppo(optimizer=sgd_free(0.1), importance_sampling_cap=cap))
    with torch.no_grad():
        expected = (naive_logprobs(make_model(0), batch) - batch.old_logprobs)[batch.response_mask].abs()
    learner.algorithm.config.num_epochs = 3
    learner.score(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        metrics = learner.update(batch, np.random.default_rng(0))
    assert metrics["rollout/logprob_gap_mean"] == pytest.approx(float(expected.mean()), abs=1e-5)
    assert metrics["rollout/logprob_gap_max"] == pytest.approx(float(expected.max()), abs=1e-5)


def test_past_a_gap_the_learner_scores_old_logprobs_from_the_next_batch_on():
    def doctored(learner, gap):
        """A fresh batch of the policy as it is, whose sampler was `gap` off at every token."""
        batch = make_batch()
        exact = torch.where(batch.response_mask, naive_logprobs(learner.policy, batch).detach(), 0.0)
        batch.old_logprobs = exact - gap * batch.response_mask
        return batch, exact

    learner = make_learner(make_ppo())
    for gap in (0.004, 0.006):  # on both sides of 5e-3
        batch, _ = doctored(learner, gap)
        learner.score(batch)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert learner.update(batch, np.random.default_rng(0))["ratio"] == pytest.approx(math.exp(gap), abs=2e-3)
        assert len(said) == (gap > 0.005), [str(one.message) for one in said]
    assert "differ from those of the training pass by 0.006 nats" in str(said[0].message)

    resumed = make_learner(make_ppo(), policy=learner.policy)
    resumed.load_state_dict(learner.state_dict())
    for one in (learner, resumed):
        batch, exact = doctored(one, 0.3)
        one.score(batch)
        torch.testing.assert_close(batch.old_logprobs, exact, atol=1e-5, rtol=0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            metrics = one.update(batch, np.random.default_rng(0))
        assert metrics["rollout/logprob_gap_mean"] == pytest.approx(0.3, abs=1e-4)
        assert metrics["ratio"] == pytest.approx(1.0, abs=2e-3)

    stored, _ = doctored(learner, 0.3)
    before = stored.old_logprobs.clone()
    learner.score(stored, fresh=False)
    assert torch.equal(stored.old_logprobs, before), "another policy sampled it, so this one can't know"


def test_a_gap_does_not_matter_where_old_logprobs_are_in_no_loss():
    learner = make_learner(GKD(GKDConfig(optimizer=sgd_free())))
    for _ in range(2):
        batch = make_batch()
        batch.old_logprobs -= 0.3 * batch.response_mask
        learner.score(batch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            learner.update(batch, np.random.default_rng(0))
    assert not learner.rescores


def test_a_critic_on_the_hidden_states_of_the_policy_reads_them_with_the_old_logprobs():
    """One forward pass gives both, and they are those of a pass each."""
    learner = make_learner(make_ppo(importance_sampling_cap=2.0), shared=True, micro_batch_tokens=40, chunk_tokens=4)
    torch.nn.init.normal_(learner.critic.head.weight)
    batch, passes = make_batch(), []
    with torch.no_grad():
        logprobs, values = learner.scorer.logprobs(learner.policy, batch), learner.scorer.values(learner.critic, batch)
    learner.policy.base_model.embed_tokens.register_forward_hook(lambda *_: passes.append(1))
    learner.score(batch)
    torch.testing.assert_close(batch.old_logprobs, logprobs, atol=0, rtol=0)
    torch.testing.assert_close(batch.values, values, atol=0, rtol=0)
    assert values.any()
    assert len(passes) == len(list(learner.scorer.split(batch))) > 1


def test_truncated_importance_weighs_advantages_by_hand():
    """A sampler of twice, half and a tenth of the policy's probability gives weights of 1/2, 2 and the cap, 2."""
    factors = torch.tensor([0.5, 2.0, 10.0])
    batch, cap = on_policy_batch(), 2.0
    exact = batch.old_logprobs.clone()
    column = torch.arange(batch.input_ids.shape[1]) % 3
    batch.old_logprobs = torch.where(batch.response_mask, exact - factors.log()[column], 0.0)
    plain = on_policy_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for one, setting in ((plain, None), (batch, cap)):
            learner = make_learner(make_ppo(importance_sampling_cap=setting))
            learner.score(one)
            learner.update(one, np.random.default_rng(0))
    weights = torch.tensor([0.5, 2.0, 2.0])[column]
    torch.testing.assert_close(batch.advantages, plain.advantages * weights * batch.response_mask, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch.returns, plain.returns, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.old_logprobs, exact, atol=1e-5, rtol=0)


def test_zero_advantages_give_no_policy_gradient():
    class Flat(PPO):
        def estimate_advantages(self, batch):
            zeros = torch.zeros_like(batch.old_logprobs)
            return zeros, zeros

    learner = make_learner(Flat(make_ppo(entropy_coef=0.0).config))
    found = gradients(learner, on_policy_batch())
    assert not any(value.any() for name, value in found.items() if not name.startswith("critic."))


@pytest.mark.parametrize("shared", [False, True])
def test_only_the_critic_trains_during_its_warm_up(shared):
    learner, batch = make_learner(make_ppo(critic_warmup_steps=1), shared=shared), make_batch()
    before = copy.deepcopy(learner.policy.state_dict())
    learner.score(batch)
    metrics = learner.update(batch, np.random.default_rng(0))
    assert all(torch.equal(value, before[name]) for name, value in learner.policy.state_dict().items())
    assert learner.critic.head.weight.any()
    assert "loss" not in metrics
    assert metrics["learning_rate"] == 0
    assert metrics["value_loss"] > 0
    learner.score(batch)
    assert "loss" in learner.update(batch, np.random.default_rng(0))
    assert not torch.equal(learner.policy.model.norm.weight, before["model.norm.weight"])


# --- steps, schedule, resume -----------------------------------------------------------------------------------------


def test_constant_reduction_divides_the_sum_by_a_length_of_its_own():
    batch = make_batch()
    policy = make_model(0)
    expected = -naive_logprobs(policy, batch)[batch.response_mask].sum().item() / (len(batch) * 50)
    config = SFTConfig(optimizer=sgd_free(), loss_reduction="constant", reduction_length=50)
    metrics = make_learner(SFT(config), policy=policy).update(batch, np.random.default_rng(0))
    assert metrics["loss"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_exact_divergence_of_the_networks_is_the_sum_over_the_vocabulary(temperature, blocks):
    batch, policy, teacher = make_batch(), make_model(0), make_model(200)
    algorithm = DGPO(DGPOConfig(kl_estimator="exact", selective=False))
    learner = make_learner(algorithm, policy=policy, temperature=temperature, chunk_tokens=4, micro_batch_tokens=40)
    learner.score(batch)
    log_q = full_logits(policy, batch, temperature).log_softmax(-1)
    log_p = full_logits(teacher, batch, temperature).log_softmax(-1)
    expected = torch.where(batch.response_mask, (log_q.exp() * (log_q - log_p)).sum(-1), 0.0)
    torch.testing.assert_close(batch.teacher_kl, expected, rtol=0, atol=1e-5)
    alone = learner.scorer.logprobs(teacher, batch)
    torch.testing.assert_close(batch.teacher_logprobs, alone, rtol=0, atol=1e-5)


def test_validation_is_the_mean_loss_and_changes_nothing(blocks):
    batch, policy = make_batch(), make_model(0)
    before = copy.deepcopy(policy.state_dict())
    learner = make_learner(make_kd(), policy=policy, chunk_tokens=4, micro_batch_tokens=30)
    loss = learner.validate(batch)
    teacher = make_model(200)
    log_q, log_p = (full_logits(model, batch).log_softmax(-1) for model in (policy, teacher))
    per_token = -naive_logprobs(policy, batch) + (log_p.exp() * (log_p - log_q)).sum(-1)
    assert loss == pytest.approx(per_token[batch.response_mask].mean().item(), abs=1e-5)
    assert all(torch.equal(before[name], value) for name, value in policy.state_dict().items())
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_every_row_is_used_once_per_epoch():
    @dataclass(kw_only=True)
    class Config(AlgorithmConfig):
        optimizer: OptimizerConfig = field(default_factory=sgd_free)

    class Recorder(Algorithm):
        def __init__(self, config):
            super().__init__(config)
            self.seen, self.steps = [], 0

        def num_steps(self, num_demonstrations):
            return 1

        def token_loss(self, tokens):
            self.seen.append(torch.stack([tokens.sequence_ids, tokens.ids]))
            return -tokens.logprobs

        def after_step(self, metrics):
            self.steps += 1

    algorithm, batch = Recorder(Config(num_epochs=2, num_minibatches=3)), make_batch()
    learner = make_learner(algorithm, chunk_tokens=3, micro_batch_tokens=30)
    metrics = learner.update(batch, np.random.default_rng(0), fresh=False)
    rows, _ = torch.nonzero(batch.response_mask, as_tuple=True)
    expected = torch.stack([rows, batch.input_ids[batch.response_mask]]).repeat(1, 2)
    found = torch.cat(algorithm.seen, dim=1)
    assert sorted(map(tuple, found.T.tolist())) == sorted(map(tuple, expected.T.tolist()))
    assert (algorithm.steps, learner.step) == (1, 1)
    assert set(metrics) == {"loss", "entropy", "grad_norm", "learning_rate"}


def test_loss_is_the_mean_over_minibatches():
    batch = make_batch()
    algorithm = SFT(SFTConfig(optimizer=sgd_free(1e-12)))
    algorithm.config.num_minibatches = 3
    learner = make_learner(algorithm)
    metrics = learner.update(batch, np.random.default_rng(5))
    losses = -naive_logprobs(make_model(0), batch).detach()
    parts = np.array_split(np.random.default_rng(5).permutation(6), 3)
    expected = np.mean([float(losses[part][batch.response_mask[part]].mean()) for part in parts])
    assert metrics["loss"] == pytest.approx(expected, abs=1e-6)


def test_resume_is_bit_identical():
    def start() -> Learner:
        optimizer = OptimizerConfig(learning_rate=1e-2, warmup_fraction=0.3, schedule="cosine", weight_decay=0.1)
        algorithm = make_ppo(num_minibatches=2, optimizer=optimizer, critic_optimizer=optimizer)
        return make_learner(algorithm, micro_batch_tokens=40)

    def train(learner: Learner, steps: range) -> list[dict[str, float]]:
        history = []
        for step in steps:
            batch = make_batch(step)
            learner.score(batch)
            history.append(learner.update(batch, np.random.default_rng(step)))
        return history

    straight = start()
    whole = train(straight, range(6))
    first = start()
    train(first, range(3))
    second = start()
    second.load_state_dict(first.state_dict())
    second.policy.load_state_dict(first.policy.state_dict())
    second.critic.load_state_dict(first.critic.state_dict())
    assert train(second, range(3, 6)) == whole[3:]
    for one, other in ((straight.policy, second.policy), (straight.critic, second.critic)):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_metrics_follow_the_schedule():
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.4, schedule="cosine")
    learner = make_learner(SFT(SFTConfig(optimizer=optimizer)))
    rates = [learner.policy_optimizer.learning_rate(step) for step in range(11)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[5:] == pytest.approx([(1 + np.cos(np.pi * k / 6)) / 2 for k in range(1, 7)], abs=1e-12)
    assert learner.update(make_batch(), np.random.default_rng(0))["learning_rate"] == 0.25
    assert learner.update(make_batch(), np.random.default_rng(0))["learning_rate"] == 0.5
    assert {group["lr"] for group in learner.policy_optimizer.adamw.param_groups} == {0.5}
    learner.policy_optimizer.config.schedule = "constant"
    assert [learner.policy_optimizer.learning_rate(step) for step in (3, 4, 9)] == [1.0, 1.0, 1.0]


def test_the_schedule_of_a_policy_begins_after_the_warm_up_of_its_critic():
    optimizer = OptimizerConfig(learning_rate=1.0, warmup_fraction=0.25, schedule="cosine")
    settings = {"critic_warmup_steps": 2, "optimizer": optimizer, "critic_optimizer": optimizer}
    learner = make_learner(make_ppo(**settings))  # of 10 steps
    policy, critic = learner.policy_optimizer.learning_rate, learner.critic_optimizer.learning_rate
    falling = [(1 + np.cos(np.pi * k / 6)) / 2 for k in range(7)]
    assert [policy(step) for step in range(11)] == pytest.approx([0, 0, 0.5, 1, *falling], abs=1e-12)
    assert [critic(step) for step in range(3)] == [0.5, 1.0, 1.0]
    rates = []
    for _ in range(4):
        batch = make_batch()
        learner.score(batch)
        rates.append(learner.update(batch, np.random.default_rng(0))["learning_rate"])
    assert rates == [0, 0, 0.5, 1]
    assert {group["lr"] for group in learner.policy_optimizer.adamw.param_groups} == {1.0}


def test_clipping_bounds_the_step_and_reports_the_norm_before():
    learner = make_learner(SFT(SFTConfig(optimizer=OptimizerConfig(max_grad_norm=1e-3))))
    adamw = learner.policy_optimizer.adamw
    norms = []
    adamw.register_step_pre_hook(
        lambda *_: norms.append(torch.stack([p.grad.norm() for p in learner.policy.parameters()]).norm())
    )
    metrics = learner.update(make_batch(), np.random.default_rng(0))
    assert [float(norm) for norm in norms] == pytest.approx([1e-3], rel=1e-3)
    assert metrics["grad_norm"] > 0.1


def test_weight_decay_spares_vectors():
    optimizer = OptimizerConfig(learning_rate=1e-3, weight_decay=0.5)
    groups = make_learner(SFT(SFTConfig(optimizer=optimizer))).policy_optimizer.adamw.param_groups
    decay = {p.dim(): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {2: 0.5, 1: 0.0}


# --- memory ----------------------------------------------------------------------------------------------------------


def test_no_more_than_a_chunk_of_logits_is_computed_at_once():
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                # [d, V] is the gradient of the head, which must exist.
                if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape[-1] == VOCAB and len(tensor) != 16:
                    largest = max(largest, tensor.numel())
            return out

    learner, batch = make_learner(make_kd(), chunk_tokens=3), make_batch()
    with Watch():
        learner.update(batch, np.random.default_rng(0))
    assert largest == 3 * VOCAB


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_weights(value):
    class Broken(SFT):
        def token_loss(self, tokens):
            return super().token_loss(tokens) * value

    learner = make_learner(Broken(SFTConfig(optimizer=sgd_free())))
    before = copy.deepcopy(learner.policy.state_dict())
    with pytest.raises(FloatingPointError, match=r"Training step 1: the loss of the policy is .* lower learning rate"):
        learner.update(make_batch(), np.random.default_rng(0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.policy.state_dict().items())


def test_a_loss_that_is_not_finite_claims_nothing_of_the_other_network():
    class Broken(PPO):
        def token_loss(self, tokens):
            return super().token_loss(tokens) * float("nan")

    learner = make_learner(Broken(make_ppo().config))
    batch, critic = make_batch(), copy.deepcopy(learner.critic.state_dict())
    learner.score(batch)
    with pytest.raises(FloatingPointError, match=r"This minibatch did not change the policy\."):
        learner.update(batch, np.random.default_rng(0))
    assert any(not torch.equal(tensor, critic[name]) for name, tensor in learner.critic.state_dict().items())


def test_errors_say_what_to_do():
    with pytest.raises(ConfigurationError, match="KD needs teacher_logits, so the learner needs a teacher"):
        Learner(make_kd(), make_model(0), config=LearnerConfig(), total_steps=1, vocab_size=VOCAB)
    with pytest.raises(ConfigurationError, match="one of auto, float32, bfloat16, float64, got 'fp8'"):
        LearnerConfig(precision="fp8")
    learner = make_learner(make_ppo(num_minibatches=7))
    with pytest.raises(ConfigurationError, match="batch of 6 trajectories can't be split into num_minibatches=7"):
        learner.update(make_batch(), np.random.default_rng(0))
    learner = make_learner(SFT(SFTConfig(optimizer=sgd_free())))
    learner.scorer = scoring.Scorer(vocab_size=5)
    with pytest.raises(ConfigurationError, match="token id 22, written by a model, but the vocabulary"):
        learner.update(make_batch(), np.random.default_rng(0))


def test_bfloat16_is_close_and_keeps_float32_weights():
    exact = gradients(make_learner(make_ppo()), make_batch())
    learner = make_learner(make_ppo(), precision="bfloat16", chunk_tokens=7)
    rough = gradients(learner, make_batch())
    assert all(p.dtype == torch.float32 for p in learner.policy.parameters())
    flat = [torch.cat([g.flatten() for g in found.values()]) for found in (exact, rough)]
    assert float(torch.nn.functional.cosine_similarity(*flat, dim=0)) > 0.99


# --- a teacher with another chat template ----------------------------------------------------------------------------


def behind_other_prompts(batch: Batch, seed: int = 9) -> Batch:
    """The same trajectories with a prompt of 5 tokens in the place of 3, as a teacher would read them."""
    ids = torch.randint(VOCAB, (len(batch), 5), generator=torch.Generator().manual_seed(seed))
    widened = {
        "input_ids": torch.cat((ids, batch.input_ids[:, 3:]), dim=1),
        "attention_mask": torch.nn.functional.pad(batch.attention_mask, (2, 0), value=True),
        "response_mask": torch.nn.functional.pad(batch.response_mask, (2, 0)),
        "old_logprobs": torch.nn.functional.pad(batch.old_logprobs, (2, 0)),
    }
    return dataclasses.replace(batch, **widened)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_groups_that_pay_alone_are_scored_by_the_teacher(estimator):
    """The loss is that of a teacher who has read all; one that is a hundred nats away from a right token is no NaN."""
    found = []
    for reads_all in (False, True):
        settings = {"batch_size": 6, "rollouts_per_prompt": 2, "num_minibatches": 1, "kl_coef": 0.1}
        algorithm = DGPOGRPO(DGPOGRPOConfig(**settings, kl_estimator=estimator, optimizer=sgd_free()))
        if reads_all:
            algorithm.anchored = lambda batch: torch.ones_like(batch.correct)
        batch = make_batch()
        right = batch.correct[:, None] & batch.response_mask
        batch.group_ids = torch.arange(6) // 2
        learner = make_learner(algorithm)
        found.append(gradients(learner, batch))
        assert bool(batch.teacher_logprobs[right].any()) == reads_all
    assert_same(*found, 0.0)
    tokens = Tokens(**{each.name: torch.zeros(1) for each in dataclasses.fields(Tokens)})
    logprobs = torch.full((1,), -150.0, requires_grad=True)
    estimate = algorithm._anchor_kl(tokens, logprobs, torch.tensor([False]))
    estimate.sum().backward()
    assert (float(estimate), float(logprobs.grad)) == (0.0, 0.0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_micro_batch_is_bounded_by_what_is_computed(checkpointing):
    """Whoever recomputes layers reads a common start once a row, so it counts once a row."""
    ids = torch.randint(VOCAB, (24, 120), generator=torch.Generator().manual_seed(0))
    ids[:, :100] = ids[0, :100]
    written = torch.zeros(24, 120, dtype=torch.bool)
    written[:, 110:] = True
    batch = dataclasses.replace(
        make_batch(num_rows=24), input_ids=ids, written_ids=ids, attention_mask=torch.ones_like(written),
        response_mask=written, old_logprobs=torch.zeros(24, 120), num_shared=100,
    )  # fmt: skip
    learner = make_learner(make_kd(), micro_batch_tokens=500, gradient_checkpointing=checkpointing)
    sizes = [len(part.rows) for part in learner.scorer.split(batch)]
    assert sorted(sizes) == ([4] * 6 if checkpointing else [4, 20])


@pytest.mark.parametrize("estimator", ["k1", "exact"])
def test_only_trajectories_that_pay_are_scored_by_the_anchor(estimator):
    batch = make_batch()
    assert 0 < batch.correct.sum() < len(batch)
    learners = [
        make_learner(DGPO(DGPOConfig(num_minibatches=1, selective=selective, kl_estimator=estimator)))
        for selective in (True, False)
    ]
    whole = dataclasses.replace(batch)
    for learner, scored in zip(learners, (batch, whole), strict=True):
        learner.score(scored)
    name = "teacher_kl" if estimator == "exact" else "teacher_logprobs"
    figures, of_all = getattr(batch, name), getattr(whole, name)
    wrong = ~batch.correct
    assert (of_all[batch.response_mask] != 0).all()
    torch.testing.assert_close(figures[wrong], of_all[wrong], atol=1e-6, rtol=0)
    assert (figures[batch.correct] == 0).all()
    torch.testing.assert_close(batch.values, whole.values)


@pytest.mark.parametrize(
    ("vocab_size", "on_cpu", "expected"),
    [(749, True, 1024), (151_936, True, 52), (10**7, True, 1), (151_936, False, 1024)],
)
def test_chunks_of_a_large_vocabulary_stay_small_on_a_cpu(vocab_size, on_cpu, expected):
    assert scoring.chunk_tokens(1024, vocab_size, on_cpu=on_cpu) == expected


def test_a_batch_in_which_nobody_pays_is_not_scored_by_the_anchor():
    batch = make_batch()
    batch.correct = torch.ones_like(batch.correct)
    learner = make_learner(DGPO(DGPOConfig(num_minibatches=1)))
    learner.score(batch)
    assert (batch.teacher_logprobs == 0).all()
    assert np.isfinite(learner.update(batch, np.random.default_rng(0))["value_loss"])


def test_a_teacher_scores_the_tokens_behind_its_own_prompts():
    batch = make_batch()
    batch.read_by_teacher = behind_other_prompts(batch)
    algorithm = DGPO(DGPOConfig(num_minibatches=1, selective=False))
    learner = make_learner(algorithm, micro_batch_tokens=40, chunk_tokens=3)
    learner.score(batch)
    expected = naive_logprobs(learner.teacher, batch.read_by_teacher)[batch.read_by_teacher.response_mask]
    torch.testing.assert_close(batch.teacher_logprobs[batch.response_mask], expected, atol=1e-5, rtol=0)
    otherwise = naive_logprobs(learner.teacher, batch)[batch.response_mask]
    assert (expected - otherwise).abs().max() > 1e-3, "the prompt matters"
    exact, _ = learner.scorer.kl_and_logprobs(learner.policy, learner.teacher, batch, is_teacher=True)
    exact = exact[batch.response_mask]
    ours = full_logits(learner.policy, batch).log_softmax(-1)[batch.response_mask]
    theirs = full_logits(learner.teacher, batch.read_by_teacher).log_softmax(-1)[batch.read_by_teacher.response_mask]
    torch.testing.assert_close(exact, (ours.exp() * (ours - theirs)).sum(-1), atol=1e-5, rtol=0)


def test_distillation_compares_with_the_teacher_behind_its_own_prompts():
    batch = make_batch()
    batch.read_by_teacher = behind_other_prompts(batch)
    learner = make_learner(make_kd(), micro_batch_tokens=40, chunk_tokens=3)
    with torch.no_grad():
        student = full_logits(learner.policy, batch).log_softmax(-1)[batch.response_mask]
        teacher = full_logits(learner.teacher, batch.read_by_teacher)[batch.read_by_teacher.response_mask]
        chosen = student.gather(-1, batch.input_ids[batch.response_mask][:, None])[:, 0]
        divergence = (teacher.softmax(-1) * (teacher.log_softmax(-1) - student)).sum(-1)
    assert learner.validate(batch) == pytest.approx(float((divergence - chosen).mean()), abs=1e-5)
