"""The plan of a run: numbers by hand, the paper's pairs, and a run that cannot be."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from small_runs import command

import algorithms.run  # noqa: F401  # its launcher is named in the configuration
from agentic_rag_env.errors import ConfigurationError
from algorithms.training.hardware import GIB, GPUS, HardwareConfig
from algorithms.training.model_shapes import KNOWN, shape_of
from algorithms.training.preflight import plan
from algorithms.training.settings import RunConfig
from algorithms.training.typed import run_config

PAIRS = {
    "qwen2.5_3b_0.5b": (494_032_768, 3_085_938_688),
    "qwen2.5_7b_0.5b": (494_032_768, 7_615_616_512),
    "llama3_8b_1b": (1_235_814_400, 8_030_261_248),
}
H200 = ["hardware.gpu=h200"]


def composed(*overrides: str) -> RunConfig:
    GlobalHydra.instance().clear()
    with initialize_config_module("conf", version_base="1.3"):
        return run_config(compose("config", overrides=list(overrides)))


# Shapes


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_transformers(tmp_path, kind, tied):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        kind, **sizes, head_dim=8, intermediate_size=80, vocab_size=97, tie_word_embeddings=tied
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(str(tmp_path))
    assert shape.parameters == model.num_parameters()
    assert shape.backbone == model.base_model.num_parameters()


def test_known_hub_ids_are_not_looked_up():
    found = {name: shape_of(f"Somebody/{name.upper()}-Instruct").parameters for name in KNOWN}
    assert found == {
        "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "qwen2.5-0.5b": 494_032_768,
        "qwen2.5-3b": 3_085_938_688, "qwen2.5-7b": 7_615_616_512, "llama-3.2-1b": 1_235_814_400,
        "llama-3.1-8b": 8_030_261_248,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be counted"),
        ('{"model_type": "mamba"}', "a model of type 'mamba' cannot be counted; known are llama"),
        ('{"model_type": "llama", "hidden_size": -1}', "hidden_size in config.json is -1"),
    ],
)
def test_a_damaged_config(tmp_path, content, said):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigurationError, match=said):
        shape_of(str(tmp_path))


# Plans


def test_memory_by_hand():
    """Qwen2.5-0.5B and 3B on one H200: 24 layers, 896 wide, 2 key-value heads of 64, 4,864 inside, 151,936 ids."""
    config = composed("algo=dgpo", "model=qwen2.5_3b_0.5b", *H200)
    assert (config.num_envs, config.rollout.max_tokens, config.learner.micro_batch_tokens) == (256, 4096, 32768)
    found = plan(config)
    backward = found["memory of each device, GiB"]["dgpo"]["backward"]
    policy, teacher = 494_032_768, 3_085_938_688
    layer = 24 * 896 + 2 * 64 * (2 * 14 + 2 * 2) + 2 * 4 * 4864  # bytes of a token in the layer that is computed anew
    by_hand = {
        "weights of policy and critic": 4 * 2 * policy,
        "optimizer": 8 * 2 * policy,
        "reference": 0,
        "teacher": 2 * teacher,
        "gradients": 4 * 2 * policy,
        "activations": 32768 * (24 * 4 * 896 + layer),
        "logits": 4 * 1024 * 151_936 * 4,
        "bfloat16 copies": 2 * (24 * (2 * 896 * 64 * 16 + 3 * 896 * 4864) + 151_936 * 896),
    }
    by_hand["bfloat16 copy for rollouts"] = by_hand["bfloat16 copies"]
    assert backward == {name: round(size / GIB, 3) for name, size in by_hand.items()}
    rollout = found["memory of each device, GiB"]["dgpo"]["rollout"]
    assert "bfloat16 copies" not in rollout, "the copy serves there"
    assert rollout["key-value cache"] == 12.0  # 256 rows x 4,096 tokens x 24 layers x 2 x 2 heads x 64 x 2 bytes
    # The teacher plays demonstrations: 36 layers, 256 rows. That is the peak.
    demonstrations = [2 * teacher, 4 * policy, 256 * 4096 * 36 * 2 * 2 * 128 * 2, 256 * 151_936 * 12]
    assert found["peak"]["GiB"] == round(sum(demonstrations) / GIB, 2)
    assert (found["peak"]["stage"], found["peak"]["phase"]) == ("kd", "demonstrations")


def test_what_the_teacher_has_computed_of_demonstrations_is_kept_if_it_is_not_much():
    """250 tokens of each demonstration, 2,048 wide, in bfloat16; 512 MiB at most."""

    def kept(count: int) -> float | None:
        settings = ["algo=dgpo", "model=qwen2.5_3b_0.5b", f"algo.warm_start.num_demonstrations={count}", *H200]
        memory = plan(composed(*settings))["memory of each device, GiB"]
        assert "teacher's states of demonstrations" not in memory["dgpo"]["backward"]
        return memory["kd"]["backward"].get("teacher's states of demonstrations")

    assert kept(400) == round(400 * 250 * 2048 * 2 / GIB, 3)
    assert kept(600) is None


def test_memory_of_shares_by_hand():
    """Qwen2.5-7B by PPO on eight H200: 28 layers, 3,584 wide; a policy, a critic and a reference, an eighth of each."""
    seven = ["model=qwen2.5_7b_0.5b", "model.policy=Qwen/Qwen2.5-7B", "model.teacher=null"]
    whole = plan(composed("algo=ppo", *seven, *H200, "hardware.count=8"))
    assert not whole["fits"]
    assert "learner.sharding=fsdp2" in whole["change"]
    found = plan(composed("algo=ppo", *seven, *H200, "hardware.count=8", "learner.sharding=fsdp2"))
    assert found["fits"]
    policy, head = 7_615_616_512, 152_064 * 3584
    critic, matrices = policy - head, 28 * (2 * 3584 * 128 * (28 + 4) + 3 * 3584 * 18_944)
    by_hand = {
        "weights of policy and critic": 4 * (policy + critic) / 8,
        "optimizer": 8 * (policy + critic) / 8,
        "reference": 4 * policy / 8,
        "teacher": 0,
        "policy to write with": 4 * policy,
        "gradients": 4 * (policy + critic) / 8,
        "gathered units": 4 * (policy - matrices + 2 * matrices / 28),
    }
    backward = found["memory of each device, GiB"]["ppo"]["backward"]
    assert {name: backward[name] for name in by_hand} == {name: round(n / GIB, 3) for name, n in by_hand.items()}
    temporaries = found["memory of each device, GiB"]["ppo"]["optimizer step"]["temporaries"]
    assert temporaries == round(4 * policy / 8 / GIB, 3)


def test_time_by_hand():
    """An update costs four forward passes of policy and critic each, at 0.4 of an H200's 989 teraflops."""
    stage = plan(composed("algo=dgpo", "model=qwen2.5_3b_0.5b", *H200))["time"]["dgpo"]
    matrices = 24 * (2 * 896 * 64 * 16 + 3 * 896 * 4864)
    forward = 240 * (1450 * (2 * matrices + 2 * 24 * 896 * 1450) + 250 * 2 * 151_936 * 896) / (0.4 * 989e12)
    assert stage["seconds of a step"]["update"] == round(8 * forward, 2)
    # 240 episodes in 256 rows: 250 decode steps, each bound by Python and launches.
    assert stage["seconds of a step"]["rollout"] == round(forward + 250 * 0.025, 2)
    assert stage["steps"] == 150
    # Each of eight plays 30 of them, as many at once.
    shared = plan(composed("algo=dgpo", "model=qwen2.5_3b_0.5b", *H200, "hardware.count=8"))["time"]["dgpo"]
    assert shared["seconds of a step"]["rollout"] == round(forward / 8 + 250 * 0.025, 2)


def test_a_teacher_reads_demonstrations_once():
    """2.8 billion parameters in 36 layers; 10 passes over 400 demonstrations."""
    settings = ["model=qwen2.5_3b_0.5b", *H200, "algo.num_demonstrations=400", "algo.batch_size=40"]
    stage = plan(composed("algo=kd", *settings, "algo.epochs=10"))["time"]["kd"]
    matrices, attention = 36 * (2 * 2048 * 128 * (16 + 2) + 3 * 2048 * 11_008), 2 * 36 * 2048 * 1450
    reading = 400 * (1450 * (2 * matrices + attention) + 250 * 2 * 151_936 * 2048) / (0.4 * 989e12)
    assert stage["seconds once"]["teacher reads demonstrations"] == round(reading, 2)
    assert (stage["steps"], stage["seconds of a step"]["score"]) == (100, 0)
    seconds = 100 * stage["seconds of a step"]["update"] + sum(stage["seconds once"].values())
    assert stage["hours"] == pytest.approx(seconds / 3600, rel=0.01)
    # Of what a policy plays, too, it reads every batch.
    own = plan(composed("algo=gkd", *settings, "algo.warm_start=null"))["time"]["gkd"]
    assert own["seconds of a step"]["score"] == pytest.approx(reading / 10, rel=0.01)


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("pair", PAIRS)
def test_the_pairs_of_the_paper_fit(pair, count):
    config = composed("algo=dgpo", f"model={pair}", *H200, f"hardware.count={count}")
    found = plan(config)
    assert (found["models"]["policy"], found["models"]["teacher"]) == PAIRS[pair]
    assert found["fits"]
    assert found["peak"]["GiB"] < 139 * 0.92
    assert found["trained tokens"] == 1450 * (64 * 160 + 240 * 150)
    if count == 8:
        alone = plan(dataclasses.replace(config, hardware=HardwareConfig("h200", 1)))
        assert found["hours"] < alone["hours"]
        cache = [one["memory of each device, GiB"]["dgpo"]["rollout"]["key-value cache"] for one in (alone, found)]
        assert cache[0] == cache[1], "num_envs counts in each process"


def test_one_that_does_not_fit_says_why():
    """7.6 billion parameters with AdamW take 16 bytes each, twice with a critic: 226 GiB."""
    config = composed("algo=ppo", "model=qwen2.5_7b_0.5b", "model.policy=Qwen/Qwen2.5-7B", "model.teacher=null", *H200)
    found = plan(config)
    assert not found["fits"]
    backbone = 7_615_616_512 - 152_064 * 3584
    assert found["peak"]["GiB"] > 16 * (7_615_616_512 + backbone) / GIB
    assert "This run does not fit: stage ppo needs" in found["reason"]
    assert "it would still need" in found["change"]
    assert "smaller policy" in found["change"]


def test_one_that_does_not_fit_says_the_smallest_change():
    config = composed("algo=dgpo", "model=qwen2.5_3b_0.5b", *H200, "hardware.memory_gib=40")
    found = plan(config)
    assert not found["fits"]
    # The teacher's cache of 36 GiB is what is too much: half of the rows halve it.
    assert re.fullmatch(r"It would fit, with [\d.]+ GiB, with num_envs=128\.", found["change"])
    assert plan(dataclasses.replace(config, num_envs=128))["fits"]


def test_one_that_has_nothing_left_to_lower_says_what_it_needs():
    least = ["learner.gradient_checkpointing=true", "learner.chunk_tokens=256", "num_envs=8", "learner.critic=shared"]
    least += ["learner.micro_batch_tokens=512", "rollout.max_tokens=512"]
    model = ["model=qwen2.5_7b_0.5b", "model.policy=Qwen/Qwen2.5-7B", "model.teacher=null"]
    found = plan(composed("algo=ppo", *model, *H200, *least))
    assert found["change"].startswith(f"No setting is left to lower; it needs {found['peak']['GiB']:.1f} GiB")


def test_several_changes_together():
    """1 GiB more than what is held all the time and the gradients, so everything else must shrink."""
    config = composed("algo=ppo", "model=qwen2.5_3b_0.5b", "model.teacher=null", *H200)
    held = (4 + 8 + 4) * 2 * 494_032_768 + 4 * 494_032_768  # policy, critic and reference
    held += 2 * (24 * (2 * 896 * 64 * 16 + 3 * 896 * 4864) + 151_936 * 896)  # the copy for rollouts
    tight = HardwareConfig("h200", 1, (held / GIB + 2.9) / 0.92)
    found = plan(dataclasses.replace(config, hardware=tight))
    assert not found["fits"]
    words = found["change"].partition(" GiB, with ")[2].rstrip(".").split()
    assert [word.partition("=")[0] for word in words] == [
        "learner.micro_batch_tokens", "learner.chunk_tokens", "num_envs",
    ]  # fmt: skip
    changed = composed("algo=ppo", "model=qwen2.5_3b_0.5b", "model.teacher=null", *words)
    assert plan(dataclasses.replace(changed, hardware=tight))["fits"]


def test_without_a_critic_a_network_less():
    found = plan(composed("algo=grpo", "model=qwen2.5_3b_0.5b", "model.teacher=null", *H200))
    held = found["memory of each device, GiB"]["grpo"]["optimizer step"]
    assert held["weights of policy and critic"] == round(4 * 494_032_768 / GIB, 3)
    assert held["reference"] == held["weights of policy and critic"]
    assert held["teacher"] == 0


def test_adapters_by_hand():
    """Rank 16 beside seven layers of each of 24: q and o are 896 wide, k and v 896 to 128, the rest 896 and 4,864."""
    lora = ["model.lora.rank=16", "model.teacher_dtype=float32"]
    found = plan(composed("algo=ppo", "model=qwen2.5_3b_0.5b", *H200, *lora, "algo.kl_coef=0.01"))
    adapter = 24 * 16 * (2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864))
    assert adapter == 8_798_208
    policy, layer = 494_032_768, 24 * 896 + 2 * 64 * (2 * 14 + 2 * 2) + 2 * 4 * 4864
    by_hand = {
        "weights of policy and critic": 4 * (policy + 2 * adapter),
        "optimizer": 8 * 2 * adapter,
        "reference": 4 * adapter,
        "teacher": 0,
        "bfloat16 copy for rollouts": 2 * (24 * (2 * 896 * 64 * 16 + 3 * 896 * 4864) + 151_936 * 896),
        "gradients": 4 * 2 * adapter,
        "activations": 32768 * (24 * 4 * 896 + layer),
        "logits": 4 * 1024 * 151_936 * 4,
        "bfloat16 copies": 2 * (24 * (2 * 896 * 64 * 16 + 3 * 896 * 4864) + 151_936 * 896),
    }
    backward = found["memory of each device, GiB"]["ppo"]["backward"]
    assert backward == {name: round(size / GIB, 3) for name, size in by_hand.items()}
    assert found["models"]["trained"] == adapter
    assert found["disk"]["GiB"] == round(12 * 2 * adapter * found["disk"]["checkpoints"] / GIB, 2)
    few = plan(composed("algo=ppo", "model=qwen2.5_3b_0.5b", *H200, *lora, "model.lora.targets=[q_proj,v_proj]"))
    assert few["models"]["trained"] == 24 * 16 * (896 + 896 + 896 + 128)
    with pytest.raises(ConfigurationError, match="there are q_proj, k_proj"):
        plan(composed("algo=ppo", "model=qwen2.5_3b_0.5b", *H200, *lora, "model.lora.targets=[qproj]"))


def test_all_checkpoints_take_more_than_the_newest():
    """Of 60 steps of kd and 150 of dgpo, each 25th and the last of a stage, and the best of each."""
    given = ["algo=dgpo", "algo.steps=150", "algo.warm_start.epochs=2", "algo.warm_start.num_demonstrations=480"]
    counts = [plan(composed(*given, f"keep_checkpoints={kept}"))["disk"]["checkpoints"] for kept in (2, "null")]
    assert counts == [2 + 2 + 2, 3 + 6 + 2]


def test_on_a_cpu_chunks_of_a_large_vocabulary_are_planned_as_small_as_they_are():
    found = plan(composed("algo=ppo", "model=qwen2.5_3b_0.5b", "model.teacher=null", "hardware.memory_gib=1"))
    assert found["hardware"]["device"] == "cpu"
    # 52 tokens are 32 MB of float32; four chunks exist at the peak. To set a chunk to 256 would change nothing.
    logits = found["memory of each device, GiB"]["ppo"]["backward"]["logits"]
    assert logits == round(4 * 52 * 151_936 * 4 / GIB, 3)
    assert "num_envs" in found["change"]
    assert "chunk_tokens" not in found["change"]


@pytest.mark.parametrize(("dtype", "size"), [("auto", 2), ("bfloat16", 2), ("float32", 4)])
def test_a_teacher_takes_what_its_dtype_takes(dtype, size):
    found = plan(composed("algo=dgpo", "model=qwen2.5_3b_0.5b", *H200, f"model.teacher_dtype={dtype}"))
    teacher = found["memory of each device, GiB"]["dgpo"]["backward"]["teacher"]
    assert teacher == round(size * 3_085_938_688 / GIB, 3)


# The command


def test_the_command_refuses_what_does_not_fit(tmp_path):
    run = command("algo=dgpo", "preflight=true", "hardware.memory_gib=0.1", f"hydra.run.dir={tmp_path / 'run'}")
    assert run.code == 1
    assert "ConfigurationError: This run does not fit: stage" in run.err
    assert not json.loads((tmp_path / "run" / "preflight.json").read_text())["fits"]


@pytest.mark.parametrize("setting", [{"gpu": "h300"}, {"count": 0}, {"memory_gib": 0}])
def test_settings_out_of_range(setting):
    with pytest.raises(ConfigurationError, match=next(iter(setting))):
        HardwareConfig(**setting)


def test_data_sheets_are_in_order():
    assert all(gpu.memory > 0 and gpu.flops > gpu.bandwidth > 0 for gpu in GPUS.values())
