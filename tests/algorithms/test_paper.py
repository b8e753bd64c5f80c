"""The paper's settings, compared with a table written by hand from arXiv:2508.20324 and the codes that it names."""

from __future__ import annotations

import dataclasses

import pytest
from test_experiments import METHODS, run_settings

from algorithms.analysis.runs import flat
from algorithms.training.build import build_stages
from algorithms.training.preflight import plan

PAPER = ["+experiment=paper"]
#: Search-R1 v0.2 and scripts/train_dgpo.sh.
REINFORCED = {
    "steps": 1000,
    "kl_coef": 0.001,
    "kl_clip": None,
    "clip_range": 0.2,
    "clip_range_high": None,
    "entropy_coef": 0.001,
    "num_epochs": 1,
    "loss_reduction": "token-mean",
    "optimizer.learning_rate": 1e-6,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.weight_decay": 0.01,
    "optimizer.warmup_fraction": 0.285,
    "optimizer.schedule": "constant",
    "optimizer.max_grad_norm": 1.0,
}
CRITICIZED = REINFORCED | {
    "batch_size": 512,
    "num_minibatches": 2,
    "kl_estimator": "k1",
    "discount": 1.0,
    "gae_lambda": 1.0,
    "value_clip_range": 0.5,
    "critic_warmup_steps": 0,
    "critic_optimizer.learning_rate": 1e-5,
    "critic_optimizer.betas": [0.9, 0.999],
    "critic_optimizer.weight_decay": 0.01,
    "critic_optimizer.warmup_fraction": 0.015,
    "critic_optimizer.schedule": "constant",
    "critic_optimizer.max_grad_norm": 1.0,
}
GROUPED = REINFORCED | {
    "batch_size": 2560,
    "num_minibatches": 10,
    "rollouts_per_prompt": 5,
    "scale_rewards": "group",
    "kl_estimator": "k3",
}
#: TAID's train.py: 8 GPUs with 8 sequences each, AdamW as it comes.
DISTILLED = {
    "epochs": 5,
    "batch_size": 64,
    "num_minibatches": 1,
    "loss_reduction": "token-mean",
    "correct_only": True,
    "optimizer.learning_rate": 1e-4,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.weight_decay": 0.01,
    "optimizer.warmup_fraction": 0.0,
    "optimizer.schedule": "cosine",
    "optimizer.max_grad_norm": 1.0,
}
SETTINGS = {
    "sft": DISTILLED,
    "kd": DISTILLED | {"kl_coef": 1.0, "temperature": 1.0},
    "gkd": DISTILLED | {"jsd_beta": 0.1, "on_policy_fraction": 0.5, "sampling_temperature": 1.0},
    "distillm": DISTILLED
    | {"divergence": "skew_forward", "skew_alpha": 0.1, "replay_capacity": 1000, "fresh_schedule": "decreasing"}
    | {"tolerance": 0.1, "share_increment": 0.1},
    "taid": DISTILLED | {"t_start": 0.4, "t_end": 1.0, "step_size": 5e-4, "momentum": 0.99},
    "ppo": CRITICIZED | {"anchor": "reference"},
    "sft_ppo": CRITICIZED | {"anchor": "reference"},
    "dgpo": CRITICIZED | {"anchor": "teacher", "selective": True, "length_neutral": False},
    "grpo": GROUPED | {"anchor": "reference"},
    "dgpo_grpo": GROUPED | {"anchor": "teacher"},
}
#: What a row of the ablations changes in its last stage.
CHANGED = {
    "uniform_kl": {"selective": False},
    "no_penalty": {"kl_coef": 0.0},
    "self_penalty": {"anchor": "reference"},
    "no_teacher_guidance": {"anchor": "reference", "selective": False},
}
PAIRS = {
    "qwen2.5_3b_0.5b": ("Qwen/Qwen2.5-0.5B-Instruct", "omron-sinicx/SearchR1-ppo-qwen2.5-3b-instruct"),
    "qwen2.5_7b_0.5b": (
        "Qwen/Qwen2.5-0.5B-Instruct",
        "PeterJinGo/SearchR1-nq_hotpotqa_train-qwen2.5-7b-it-em-ppo",
    ),
    "llama3_8b_1b": ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
    "qwen2.5_3b_0.5b_kd": ("omron-sinicx/Qwen2.5-0.5B-Instruct-kd", "omron-sinicx/SearchR1-ppo-qwen2.5-3b-instruct"),
}


def assert_published(spec: dict, changed: dict | None = None) -> None:
    """Every stage of a chain has the settings of the table."""
    settings, expected = flat(spec), SETTINGS[spec["name"]] | (changed or {})
    assert {name: settings[name] for name in expected} == expected
    if spec["warm_start"] is not None:
        assert_published(spec["warm_start"])


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"maskable_ppo"}))
def test_every_row_has_the_published_settings_in_all_its_stages(method):
    algo = run_settings(*PAPER, f"+method={method}").algo
    assert_published(algo, CHANGED.get(method))
    assert [stage.name for stage in build_stages(algo)]


@pytest.mark.parametrize("algo", sorted(SETTINGS))
def test_every_algorithm_has_them_by_its_name_too(algo):
    assert_published(run_settings(*PAPER, f"algo={algo}").algo)


@pytest.mark.parametrize("start", ["algo.warm_start=kd", "algo@algo.warm_start=kd", "+algo@algo.warm_start=kd"])
def test_another_warm_start_is_the_papers_however_it_is_given(start):
    algo = run_settings("algo=ppo", start, *PAPER).algo
    assert (algo["name"], algo["warm_start"]["name"]) == ("ppo", "kd")
    assert_published(algo)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_pairs_of_models(pair):
    model = run_settings(*PAPER, f"model={pair}").model
    assert (model.policy, model.teacher, model.teacher_temperature) == (*PAIRS[pair], 1.0)


def test_the_protocol_of_search_r1():
    config = run_settings(*PAPER)
    assert config.model.policy == PAIRS["qwen2.5_3b_0.5b"][0]
    protocol = {"prompt": "search_r1", "max_turns": 4, "top_k": 3, "final_turn": "no_search"}
    assert {name: config.env[name] for name in protocol} == protocol
    assert config.env["max_observation_tokens"] == config.rollout.max_new_tokens == 500
    assert (config.rollout.temperature, config.rollout.top_p, config.rollout.top_k) == (1.0, 1.0, 0)
    assert (config.evaluation.every, config.checkpoint_every) == (200, 50)
    assert config.evaluation.num_questions is None


def test_the_second_stage_alone_from_the_authors_cold_start():
    config = run_settings(*PAPER, "model=qwen2.5_3b_0.5b_kd", "algo.warm_start=null")
    assert config.algo["warm_start"] is None
    assert_published(config.algo)


@pytest.mark.parametrize("pair", PAIRS)
def test_eight_gpus_make_the_run_of_the_paper(pair):
    one = run_settings(*PAPER, f"model={pair}")
    eight = run_settings("+experiment=paper", "+scale=h200x8", f"model={pair}")
    assert eight.retriever["url"] == "http://127.0.0.1:8000/retrieve"
    assert (eight.hardware.gpu, eight.hardware.count) == ("h200", 8)
    # All episodes of a step are played at once.
    assert eight.num_envs * eight.hardware.count == eight.algo["batch_size"] == 512
    assert plan(eight)["fits"]
    assert (eight.algo, eight.env, eight.evaluation) == (one.algo, one.env, one.evaluation)
    assert eight.rollout == dataclasses.replace(one.rollout, decode_during_search=16)
