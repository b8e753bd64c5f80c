"""What every algorithm owes, tested over the registry: a newcomer is tested without writing a test."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import pkgutil
import sys
from collections import defaultdict

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

import algorithms
from agentic_rag_env.errors import ConfigurationError
from algorithms.learner import ops
from algorithms.learner.algorithm import (
    ALGORITHMS,
    Algorithm,
    AlgorithmConfig,
    CriticConfig,
    DemonstrationConfig,
    OptimizerConfig,
    Role,
)
from algorithms.learner.types import Batch, Tokens

for found in pkgutil.iter_modules(algorithms.__path__):
    if not found.ispkg and found.name not in algorithms.COMMANDS:
        importlib.import_module(f"algorithms.{found.name}")

#: Without the learners of other libraries, which have no hooks.
ZOO = [name for name in ALGORITHMS.names() if issubclass(ALGORITHMS.get(name).factory, Algorithm)]
VOCAB = 9


def build(name: str) -> Algorithm:
    return ALGORITHMS.build(name)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Scene:
    """Four trajectories of two questions, and networks that are tables of numbers."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        needs = algorithm.needs
        lengths = torch.tensor([12, 11, 9, 12])
        columns = torch.arange(12)
        self.policy_logits = normal(4, 12, VOCAB, seed=0)
        self.teacher_logits = 2 * normal(4, 12, VOCAB, seed=1)
        input_ids = torch.multinomial(torch.ones(48, VOCAB), 1, generator=torch.Generator().manual_seed(2)).view(4, 12)
        written = (columns >= 2) & ~((columns >= 5) & (columns < 7)) & (columns < lengths[:, None])
        known = {
            "values": normal(4, 12, seed=3),
            "ref_logprobs": -normal(4, 12, seed=4).abs(),
            "teacher_logprobs": ops.gather_logprobs(self.teacher_logits, input_ids),
            "ref_kl": normal(4, 12, seed=6).abs(),
            "teacher_kl": ops.reverse_kl(self.policy_logits, self.teacher_logits),
        }
        self.batch = Batch(
            input_ids=input_ids,
            attention_mask=columns < lengths[:, None],
            response_mask=written,
            old_logprobs=ops.gather_logprobs(self.policy_logits + 0.1 * normal(4, 12, VOCAB, seed=5), input_ids)
            * written,
            rewards=torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64),
            correct=torch.tensor([True, False, False, True]),
            group_ids=torch.tensor([0, 0, 1, 1]),
            **{name: value for name, value in known.items() if name in needs},
        )

    def shape(self) -> None:
        batch = self.batch
        batch.token_rewards = self.algorithm.shape_rewards(batch)
        estimates = self.algorithm.estimate_advantages(batch)
        if estimates is not None:
            batch.advantages, batch.returns = estimates

    def tokens(self, without: str | None = None) -> Tokens:
        """All model-written tokens as a chunk, with what the algorithm needs and nothing else."""
        batch, mask, needs = self.batch, self.batch.response_mask, self.algorithm.needs - {without}
        self.logits = self.policy_logits[mask].clone().requires_grad_()
        self.values = batch.values[mask].add(0.1).requires_grad_() if "values" in needs else None
        rows = torch.arange(4)[:, None].expand_as(mask)[mask]

        def pick(name: str) -> torch.Tensor | None:
            value = getattr(batch, name)
            return None if value is None else value[mask]

        return Tokens(
            ids=batch.input_ids[mask],
            sequence_ids=rows,
            correct=batch.correct[rows],
            old_logprobs=batch.old_logprobs[mask],
            logprobs=ops.gather_logprobs(self.logits, batch.input_ids[mask]),
            values=self.values,
            old_values=pick("values"),
            advantages=pick("advantages"),
            returns=pick("returns"),
            ref_logprobs=pick("ref_logprobs"),
            teacher_logprobs=pick("teacher_logprobs"),
            entropy=ops.token_entropy(self.logits) if "entropy" in needs else None,
            logits=self.logits if "logits" in needs else None,
            teacher_logits=self.teacher_logits[mask] if "teacher_logits" in needs else None,
        )

    def play(self, without: str | None = None) -> torch.Tensor:
        """All hooks of a step in their order."""
        if without in Batch.__slots__:
            setattr(self.batch, without, None)
        self.shape()
        tokens = self.tokens(without)
        loss = self.algorithm.token_loss(tokens)
        if "values" in self.algorithm.needs:
            loss = loss + self.algorithm.value_loss(tokens)
        self.algorithm.step_metrics(self.batch)
        return loss


def test_the_zoo_is_not_empty():
    assert {"sft", "kd", "ppo", "dgpo"} <= set(ZOO)


@pytest.mark.parametrize("name", ZOO)
def test_losses_are_finite_and_reach_the_networks(name):
    scene = Scene(build(name))
    scene.shape()
    tokens = scene.tokens()
    loss = scene.algorithm.token_loss(tokens)
    assert loss.shape == tokens.ids.shape
    assert loss.dtype == torch.float64
    assert torch.isfinite(loss).all()
    loss.sum().backward()
    assert torch.isfinite(scene.logits.grad).all()
    assert (scene.logits.grad != 0).any()
    if "values" in scene.algorithm.needs:
        assert scene.values.grad is None  # the policy's loss is not the critic's
        value_loss = scene.algorithm.value_loss(tokens)
        assert value_loss.shape == tokens.ids.shape
        value_loss.sum().backward()
        assert torch.isfinite(scene.values.grad).all()
        assert (scene.values.grad != 0).any()
    assert all(isinstance(value, float) for value in scene.algorithm.step_metrics(scene.batch).values())


@pytest.mark.parametrize("name", ZOO)
def test_words_that_no_network_can_say_do_not_poison_the_loss(name):
    scene, masked = Scene(build(name)), Scene(build(name))
    last = VOCAB - 1
    for each in (scene, masked):
        each.batch.input_ids.clamp_(max=last - 1)
        each.policy_logits[..., last] = -1e3
        each.teacher_logits[..., last] = -1e3
    masked.policy_logits[..., last] = masked.teacher_logits[..., last] = -torch.inf
    loss, expected = masked.play(), scene.play()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
    loss.sum().backward()
    assert torch.isfinite(masked.logits.grad).all()


@pytest.mark.parametrize("name", ZOO)
def test_everything_needed_is_read(name):
    for need in build(name).needs:
        with pytest.raises((TypeError, AttributeError)):
            Scene(build(name)).play(without=need)


@pytest.mark.parametrize(
    ("name", "settings", "needs"),
    [
        ("ppo", {"kl_coef": 0.0}, {"values", "entropy"}),
        ("ppo", {"kl_coef": 0.0, "kl_estimator": "exact", "entropy_coef": 0.0}, {"values"}),
        ("ppo", {"entropy_coef": 0.0}, {"values", "ref_logprobs"}),
        ("dgpo", {"kl_coef": 0.0}, {"values", "entropy"}),
        ("grpo", {"kl_coef": 0.0}, {"entropy"}),
        ("grpo", {"entropy_coef": 0.0}, {"ref_logprobs"}),
        ("dgpo_grpo", {"kl_coef": 0.0, "entropy_coef": 0.0}, set()),
        ("kd", {"kl_coef": 0.0}, set()),
    ],
)
def test_what_a_coefficient_of_zero_leaves_out_is_not_asked_for(name, settings, needs):
    scene = Scene(ALGORITHMS.build({"name": name, **settings}))
    assert scene.algorithm.needs == needs
    assert torch.isfinite(scene.play()).all()
    assert "anchor_kl" not in scene.algorithm.step_metrics(scene.batch) or settings.get("kl_coef") != 0.0


@pytest.mark.parametrize("name", ZOO)
def test_a_loss_has_no_memory_and_tokens_do_not_see_each_other(name):
    scene = Scene(build(name))
    scene.shape()
    before = copy.deepcopy(scene.algorithm.state_dict())
    tokens = scene.tokens()
    loss = scene.algorithm.token_loss(tokens)
    assert torch.equal(scene.algorithm.token_loss(tokens), loss)
    assert scene.algorithm.state_dict() == before
    fields = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(Tokens)}
    chunks = [
        Tokens(**{key: None if value is None else value[part] for key, value in fields.items()})
        for part in (slice(0, 5), slice(5, None))
    ]
    apart = torch.cat([scene.algorithm.token_loss(chunk) for chunk in chunks])
    torch.testing.assert_close(apart, loss, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ZOO)
def test_state_survives_json_and_gives_the_same_loss(name):
    lived = build(name)
    lived.num_steps(200)
    for step in range(3):
        lived.after_step(defaultdict(lambda step=step: 1.0 / (1 + step)))
    state = json.loads(json.dumps(lived.state_dict()))
    revived = build(name)
    revived.num_steps(200)
    revived.load_state_dict(state)
    assert revived.state_dict() == lived.state_dict()
    assert torch.equal(Scene(revived).play(), Scene(lived).play())


@pytest.mark.parametrize("name", ZOO)
def test_the_file_says_where_it_differs_from_the_paper(name):
    module = sys.modules[ALGORITHMS.get(name).factory.__module__]
    assert "Differs from the paper:" in (module.__doc__ or ""), module.__file__


@pytest.mark.parametrize("name", ZOO)
def test_settings_go_through_hydra_and_a_typo_is_caught(name):
    config = ALGORITHMS.get(name).config
    assert issubclass(config, AlgorithmConfig)
    node = OmegaConf.structured(config)
    assert OmegaConf.to_yaml(OmegaConf.create(OmegaConf.to_yaml(node))) == OmegaConf.to_yaml(node)
    settings = OmegaConf.to_object(OmegaConf.merge(node, {"optimizer": {"learning_rate": 0.125}}))
    assert isinstance(settings, config)
    assert settings.optimizer.learning_rate == 0.125
    with pytest.raises(ConfigKeyError):
        OmegaConf.merge(node, {"optimizer": {"learning_rat": 0.1}})
    with pytest.raises(ConfigurationError, match=r"has no setting 'batch_sise'.*Did you mean 'batch_size'"):
        ALGORITHMS.build({"name": name, "batch_sise": 1})
    assert ALGORITHMS.build(name).num_steps(200) >= 1


@pytest.mark.parametrize("name", ZOO)
def test_a_warm_start_names_another_algorithm(name):
    warm_start = build(name).config.warm_start
    if warm_start is not None:
        assert warm_start["name"] != name
        assert isinstance(ALGORITHMS.build(warm_start), Algorithm)


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("sft", {"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ("sft", {"num_demonstrations": -3}, "num_demonstrations must be an integer of at least 1, got -3"),
        ("sft", {"num_epochs": 5}, "num_epochs must be 1 .*, got 5; set epochs"),
        ("sft", {"hand_over_exact_match": 40}, r"hand_over_exact_match must be in \(0, 1\], or None, got 40"),
        ("sft", {"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ("kd", {"kl_coef": -1.0}, "kl_coef must be at least 0, got -1.0"),
        ("kd", {"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ("ppo", {"clip_range": -1}, "clip_range must be above 0, got -1"),
        ("ppo", {"clip_range_high": 0.0}, "clip_range_high must be above 0, or None, got 0.0"),
        ("grpo", {"kl_clip": -2.0}, "kl_clip must be above 0, or None, got -2.0"),
        ("dgpo", {"anchor": "ref"}, "anchor must be one of reference, teacher, got 'ref'"),
        ("ppo", {"value_clip_range": 0.0}, "value_clip_range must be above 0, got 0.0"),
        ("ppo", {"steps": 0}, "steps must be above 0, got 0"),
        ("ppo", {"entropy_coef": -0.1}, "entropy_coef must be at least 0, got -0.1"),
        ("ppo", {"critic_warmup_steps": -1}, "critic_warmup_steps must be at least 0, got -1"),
        ("ppo", {"gae_lambda": 1.5}, r"gae_lambda must be in \[0, 1\], got 1.5"),
        ("ppo", {"discount": float("nan")}, r"discount must be in \[0, 1\], got nan"),
        ("ppo", {"num_minibatches": 97}, r"num_minibatches must be at most batch_size \(96\), got 97"),
        ("dgpo", {"kl_estimator": "k4"}, "kl_estimator must be one of k1, k2, k3, exact, got 'k4'"),
        (
            "dgpo",
            {"loss_reduction": "mean"},
            "loss_reduction must be one of token-mean, seq-mean, constant, got 'mean'",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_refused_with_its_value(name, setting, message):
    with pytest.raises(ConfigurationError, match=message):
        ALGORITHMS.build({"name": name, **setting})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"learning_rate": 0}, "learning_rate must be above 0, got 0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"weight_decay": -1}, "weight_decay must be at least 0, got -1"),
        ({"warmup_fraction": 1.1}, r"warmup_fraction must be in \[0, 1\], got 1.1"),
        ({"schedule": "linear"}, "schedule must be one of constant, cosine, got 'linear'"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, got 0.0"),
    ],
)
def test_an_optimizer_setting_that_cannot_work_is_refused(setting, message):
    with pytest.raises(ConfigurationError, match=message):
        OptimizerConfig(**setting)


# --- what an algorithm lacks is said at the start --------------------------------------------------------------------


class Bare(Algorithm):
    def num_steps(self, num_demonstrations):
        return 1

    def token_loss(self, tokens):
        return -tokens.logprobs


def test_an_algorithm_on_demonstrations_needs_the_settings_that_collect_them():
    class FromTeacher(Bare):
        trains_on = frozenset({"teacher"})

    with pytest.raises(ConfigurationError, match=r"trains on the teacher's .* AlgorithmConfig, must extend Demonst"):
        FromTeacher(AlgorithmConfig())
    assert FromTeacher(DemonstrationConfig()).num_steps(3) == 1


def test_an_algorithm_with_a_critic_needs_its_settings_and_its_loss():
    class WithValues(Bare):
        needs = frozenset({"values"})

    with pytest.raises(ConfigurationError, match="must define value_loss, since it needs values"):
        WithValues(CriticConfig())
    WithValues.value_loss = lambda self, tokens: tokens.values
    with pytest.raises(ConfigurationError, match=r"needs values, so its settings, .* must extend CriticConfig"):
        WithValues(AlgorithmConfig())
    assert WithValues(CriticConfig()).roles == {Role.CRITIC}


def test_hooks_that_must_be_written_are_named():
    class Nothing(Algorithm):
        pass

    class Two(Bare):
        trains_on = frozenset({"teacher", "policy"})

    with pytest.raises(ConfigurationError, match="Nothing must define num_steps"):
        Nothing(AlgorithmConfig())
    with pytest.raises(ConfigurationError, match="Two must define source, since trains_on has several"):
        Two(DemonstrationConfig())


def test_each_need_brings_its_role():
    roles = {name: build(name).roles for name in ("sft", "kd", "ppo", "grpo", "dgpo")}
    assert roles == {
        "sft": set(),
        "kd": {Role.TEACHER},
        "ppo": {Role.CRITIC, Role.REFERENCE},
        "grpo": {Role.REFERENCE},
        "dgpo": {Role.CRITIC, Role.TEACHER},
    }
