"""Adapters: every algorithm trains them, base weights are shared and stay, and what is saved loads everywhere."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import PPO, Run, assert_same_run, resume, train
from test_zoo_step import ZOO, batch_of_groups, build
from toy_learner import VOCAB, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from agentic_rag_env.errors import ConfigurationError
from algorithms import evaluate, export, merge
from algorithms.assets import ASSETS
from algorithms.learner.adapter_folders import ADAPTER_FILE, ADAPTER_WEIGHTS, find_adapter, require_adapter
from algorithms.learner.adapters import add_adapter, is_adapted, load_adapter, twin
from algorithms.learner.algorithm import Role
from algorithms.learner.config import LearnerConfig, LoraConfig
from algorithms.learner.networks import (
    Critic,
    backbone_hidden,
    declared_vocab_size,
    freeze,
    lm_logits,
    load_model,
    load_tokenizer,
)
from algorithms.learner.training_step import Learner
from algorithms.training.agent_files import AGENT_FILE
from algorithms.training.run_files import read_summary

peft = pytest.importorskip("peft")

STUDENT = ASSETS / "tiny-student"
LORA = ["model.lora.rank=4", "model.lora.alpha=8"]
#: A stage of imitation, 24 demonstrations twice in batches of 8; and one of PPO with a critic and a reference.
STAGES = [
    "algo=sft_ppo", *PPO, "algo.kl_coef=0.02",
    "algo.warm_start.batch_size=8", "algo.warm_start.num_demonstrations=24", "algo.warm_start.epochs=2",
]  # fmt: skip
SFT_STEPS, LAST = 6, 10
#: peft reads a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def adapted(seed: int = 0, rank: int = 2, base: str = "somebody/toy"):
    return add_adapter(make_model(seed), LoraConfig(rank=rank, alpha=4), base, seed=7)


def stirred(model):
    """Give an adapter that begins with nothing something to say."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def frozen(network) -> dict[str, torch.Tensor]:
    return {name: each for name, each in network.named_parameters() if not each.requires_grad}


def logits(model, vocab_size: int = VOCAB):
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None] % vocab_size).logits


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_every_algorithm_trains_adapters_on_weights_that_are_shared_and_stay(name):
    policy, algorithm = adapted(), build(name)
    critic = Critic(policy) if Role.CRITIC in algorithm.roles else None
    reference = freeze(twin(policy)) if Role.REFERENCE in algorithm.roles else None
    learner = Learner(
        algorithm,
        policy,
        critic=critic,
        reference=reference,
        teacher=freeze(make_model(200)) if Role.TEACHER in algorithm.roles else None,
        config=LearnerConfig(),
        total_steps=10,
        vocab_size=VOCAB,
    )
    raw = {name: value.clone() for name, value in make_model(0).state_dict().items()}
    before = {name: each.detach().clone() for name, each in policy.named_parameters() if each.requires_grad}
    batch = batch_of_groups()
    learner.score(batch)
    metrics = learner.update(batch, np.random.default_rng(0))
    assert all(np.isfinite(value) for value in metrics.values()), metrics
    # Of B, which begins at zero, the first step moves every matrix. A has a gradient only once B is not zero.
    moved = {name for name, old in before.items() if not torch.equal(old, policy.get_parameter(name))}
    assert {name for name in before if "lora_B" in name} <= moved
    assert len(before) == 2 * 2 * 7  # A and B at seven linear layers of each of two layers
    for name, each in frozen(policy).items():
        assert torch.equal(each, raw[name.replace(".base_layer", "")]), name
        assert each.grad is None
    for other in filter(None, (critic and critic.backbone, reference and reference.base_model)):
        mine, theirs = frozen(policy.base_model), dict(other.named_parameters())
        assert all(theirs[name].data_ptr() == each.data_ptr() for name, each in mine.items())
        own = {name: each for name, each in theirs.items() if "lora_" in name}
        assert not {each.data_ptr() for each in own.values()} & {each.data_ptr() for each in policy.parameters()}
    trained = [group["params"] for group in learner.policy_optimizer.adamw.param_groups]
    assert sum(each.numel() for group in trained for each in group) == sum(each.numel() for each in before.values())


def test_the_short_forward_and_that_of_transformers_see_the_adapter():
    model = stirred(adapted())
    ids = torch.arange(12)[None] % VOCAB
    with torch.no_grad():
        short = lm_logits(model, backbone_hidden(model, ids, torch.ones_like(ids, dtype=torch.bool))[0], VOCAB)
    torch.testing.assert_close(short, logits(model)[0], atol=1e-5, rtol=0)
    assert (short - logits(make_model(0))[0]).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradients_are_the_same_with_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        learner = Learner(
            build("sft"),
            stirred(adapted()),
            config=LearnerConfig(gradient_checkpointing=checkpointing),
            total_steps=10,
            vocab_size=VOCAB,
        )
        metrics = learner.update(batch_of_groups(), np.random.default_rng(0))
        gradients.append(metrics["grad_norm"])
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-5)


def test_the_first_weights_depend_on_the_seed_alone_and_change_nothing():
    first = adapted()
    torch.rand(1)
    again = adapted()
    assert torch.equal(logits(first), logits(make_model(0)))
    mine, theirs = dict(first.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("targets", "said"),
    [(["q_porj"], "'q_porj', which is no linear layer of this model; there are down_proj"), (["lm_head"], "'lm_head'")],
)
def test_a_target_that_is_not_there(targets, said):
    with pytest.raises(ConfigurationError, match=said):
        add_adapter(make_model(0), LoraConfig(rank=2, targets=targets), "somebody/toy", 0)


SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def moe(folder: Path, **settings) -> Path:
    """A mixture of experts, whose experts are fused tensors and no linear layers."""
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    config = AutoConfig.for_model("qwen3_moe", **SIZES, **sizes, **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_all_linear_leaves_fused_experts_out_and_what_is_saved_loads_again(tmp_path):
    base = moe(tmp_path / "base")
    model = stirred(add_adapter(load_model(base), LoraConfig(rank=2, alpha=4), base, 0))
    model.save_pretrained(tmp_path / "adapter")
    adapter = find_adapter(tmp_path / "adapter", str(base))
    assert adapter is not None
    settings = json.loads((tmp_path / "adapter" / ADAPTER_FILE).read_text())
    assert settings["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    merged = load_model(tmp_path / "adapter", base=str(base))
    torch.testing.assert_close(logits(merged, 64), logits(model, 64), atol=1e-5, rtol=0)
    assert (logits(merged, 64) - logits(load_model(base), 64)).abs().max() > 0.01
    further = add_adapter(load_model(base), LoraConfig(rank=2, alpha=4), base, 1)
    load_adapter(further, adapter)
    assert torch.equal(logits(further, 64), logits(model, 64))


def test_targets_that_peft_takes_for_experts_are_refused_with_those_that_can_be_had(tmp_path):
    model = load_model(moe(tmp_path / "base", mlp_only_layers=[0]))  # the first layer's MLP has linear layers
    said = r"experts of 'qwen3_moe'.*'model\.lora\.targets=\[k_proj,o_proj,q_proj,v_proj\]'"
    with pytest.raises(ConfigurationError, match=said):
        add_adapter(model, LoraConfig(rank=2), "somebody/moe", 0)


def test_a_model_without_linear_layers_is_refused():
    """Those of GPT-2 are transposed, of a class of their own (Conv1D)."""
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(ConfigurationError, match=r"'gpt2' have no linear layers.*model\.lora\.rank=null"):
        add_adapter(AutoModelForCausalLM.from_config(config), LoraConfig(rank=2), "somebody/gpt2", 0)


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, cache) -> Run:
    return train(tmp_path_factory.mktemp("runs") / "lora", cache, *STAGES, *LORA)


def checkpoint(run: Run, step: int = LAST) -> Path:
    return run.path / "checkpoints" / f"{step:06d}"


def test_a_checkpoint_holds_the_adapter_and_no_weights_of_its_base(lora_run):
    folder = checkpoint(lora_run)
    names = {path.name for path in folder.iterdir()}
    assert {ADAPTER_FILE, ADAPTER_WEIGHTS, AGENT_FILE, "tokenizer.json"} <= names
    assert not names & {"model.safetensors", "config.json"}
    settings = json.loads((folder / ADAPTER_FILE).read_text())
    assert settings["base_model_name_or_path"] == str(STUDENT)
    assert (settings["r"], settings["lora_alpha"], settings["target_modules"]) == (
        4,
        8,
        ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    )
    state = torch.load(folder / "training_state.pt", weights_only=True)
    assert all("lora_" in name or name.startswith("head.") for name in state["critic"])
    moments = state["learner"]["policy_optimizer"]["state"]
    adapter = load_file(folder / ADAPTER_WEIGHTS)
    assert sum(each["exp_avg"].numel() for each in moments.values()) == sum(each.numel() for each in adapter.values())


def test_merged_equals_what_peft_and_transformers_read(lora_run):
    folder = checkpoint(lora_run)
    merged = load_model(folder)
    assert not is_adapted(merged)
    base = AutoModelForCausalLM.from_pretrained(STUDENT, dtype="float32")
    assert (logits(merged, 700) - logits(base, 700)).abs().max() > 1e-3, "the run has trained"
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    assert is_adapted(plain)
    by_peft = peft.PeftModel.from_pretrained(base, folder)
    largest = float(logits(merged, 700).abs().max())
    for other in (plain, by_peft):
        torch.testing.assert_close(logits(merged, 700), logits(other, 700), atol=1e-5 * largest, rtol=0)
    # The same sum, but for the order of float64.
    unmerged = add_adapter(load_model(STUDENT, dtype="float64"), LoraConfig(rank=4, alpha=8), STUDENT, seed=0)
    load_adapter(unmerged, require_adapter(folder))
    whole = load_model(folder, dtype="float64")
    torch.testing.assert_close(logits(whole, 700), logits(unmerged, 700), atol=1e-10, rtol=0)
    # What is left in float32 is the rounding of any pass: merging leads no further from the exact sum.
    errors = [float((logits(model, 700) - logits(whole, 700)).abs().max()) for model in (merged, plain)]
    assert errors[0] <= 3 * errors[1]
    assert max(errors) <= 1e-5 * largest
    assert declared_vocab_size(folder) == base.config.vocab_size


@pytest.mark.parametrize("step", [8, SFT_STEPS])
def test_a_resumed_run_ends_the_same_bit_for_bit(lora_run, tmp_path, step):
    """From the middle and from the beginning of the second stage, whose reference is the policy of step 6."""
    path = Path(shutil.copytree(lora_run.path, tmp_path / "run"))
    steps = {int(folder.name) for folder in (path / "checkpoints").iterdir()}
    for later in [each for each in steps if each > step]:
        shutil.rmtree(path / "checkpoints" / f"{later:06d}")
    (path / "summary.json").unlink()
    again = resume(path)
    assert f"resuming after step {step} of {LAST}" in again.out
    assert_same_run(lora_run, again)


def test_merge_and_export_write_the_same_whole_model(lora_run, tmp_path):
    merge.main([str(lora_run.path), "--out", str(tmp_path / "merged")])
    export.main([str(lora_run.path), "--out", str(tmp_path / "exported")])
    mine, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "exported"))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine | theirs)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not is_adapted(plain)
    torch.testing.assert_close(logits(plain, 700), logits(load_model(checkpoint(lora_run)), 700), atol=1e-6, rtol=0)
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", AGENT_FILE, "README.md", "tokenizer.json"} <= names
    assert not names & {ADAPTER_FILE, ADAPTER_WEIGHTS}
    for where in ("checkpoint", "merged"):
        place = checkpoint(lora_run) if where == "checkpoint" else tmp_path / where
        arguments = ["evaluate", f"checkpoint={place}", "threads=1", "probes=[]", f"hydra.run.dir={tmp_path / 'out'}"]
        with patch.object(sys, "argv", arguments):
            evaluate.main()
        summary = read_summary(tmp_path / "out")
        assert summary["evaluation"] == {"checkpoint": lora_run.summary["evaluation"]["sft_ppo"]}


def test_an_adapter_is_a_teacher_and_a_start(lora_run, tmp_path, cache):
    """Trained further, or merged where all weights are trained."""
    sft = ["algo=sft", "algo.batch_size=8", "algo.num_demonstrations=8", "algo.epochs=1", "evaluation.every=0"]
    names = [f"model.policy={lora_run.path}", "model.teacher=tiny-teacher"]
    further = train(tmp_path / "further", cache, *sft, *names, *LORA)
    settings = json.loads((checkpoint(further, 1) / ADAPTER_FILE).read_text())
    assert settings["base_model_name_or_path"] == str(STUDENT), "not the adapter"
    assert further.summary["evaluation"]["raw"] == lora_run.summary["evaluation"]["sft_ppo"]
    mine, theirs = (load_file(checkpoint(*each) / ADAPTER_WEIGHTS) for each in ((lora_run,), (further, 1)))
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < 0.02, "one step from where it was"
    whole = train(tmp_path / "whole", cache, "algo=gkd", *sft[1:], "algo.warm_start=null", "algo.on_policy_fraction=1",
                  f"model.policy={lora_run.path}", f"model.teacher={lora_run.path}")  # fmt: skip
    assert (checkpoint(whole, 1) / "model.safetensors").is_file()


# --- folders of others -----------------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path) -> Path:
    """An adapter as a stranger saves it: another name of the base, rank-stabilized, without tokenizer."""
    base = AutoModelForCausalLM.from_pretrained(STUDENT, dtype="float32")
    settings = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"], use_rslora=True)
    stirred(peft.get_peft_model(base, settings)).save_pretrained(tmp_path / "foreign")
    change(tmp_path / "foreign", base_model_name_or_path=str(STUDENT))
    return tmp_path / "foreign"


def change(folder: Path, **settings) -> None:
    file = folder / ADAPTER_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_an_adapter_of_others_is_merged_with_a_base_that_one_names(foreign, tmp_path, capsys):
    with pytest.raises(ConfigurationError, match=r"A path that stands in a model folder is not followed"):
        load_model(foreign)
    merge.main([str(foreign), "--base", str(STUDENT), "--out", str(tmp_path / "merged")])
    base = AutoModelForCausalLM.from_pretrained(STUDENT, dtype="float32")
    expected = logits(peft.PeftModel.from_pretrained(base, foreign), 700)
    torch.testing.assert_close(logits(load_model(tmp_path / "merged"), 700), expected, atol=1e-5, rtol=0)
    assert load_tokenizer(tmp_path / "merged").get_vocab() == load_tokenizer(STUDENT).get_vocab()
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "An adapter, merged into `tiny-student`, whose licence applies" in card
    assert str(STUDENT) not in card


def test_a_base_on_the_hub_is_asked_for_by_its_name(foreign, monkeypatch):
    asked = []

    def on_hub(name, file):
        asked.append((name, file))

    monkeypatch.setattr("algorithms.learner.adapter_folders.file_on_hub", on_hub)
    change(foreign, base_model_name_or_path="somebody/tiny", auto_mapping={"parent_library": "os"})
    adapter = find_adapter(foreign)
    assert adapter is not None
    assert (adapter.base, adapter.rank, adapter.scale) == ("somebody/tiny", 2, pytest.approx(3 / 2**0.5))
    assert asked == [("somebody/tiny", ADAPTER_FILE)], "whether it is an adapter itself"


def copy_to_hub(cache: Path, name: str, source: Path) -> None:
    """Make a copy as the cache of the hub holds it."""
    place = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(source, place / "snapshots" / "0123abc")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0123abc")


def test_models_and_adapters_of_the_hub_are_read_without_a_network(foreign, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    expected = logits(load_model(foreign, base=str(STUDENT)), 700)
    change(foreign, base_model_name_or_path="somebody/tiny")
    copy_to_hub(tmp_path / "hub", "somebody/tiny", STUDENT)
    copy_to_hub(tmp_path / "hub", "somebody/adapter", foreign)
    for name in (foreign, "somebody/adapter"):
        assert torch.equal(logits(load_model(name), 700), expected)
        assert load_tokenizer(name).get_vocab() == load_tokenizer(STUDENT).get_vocab()
        assert declared_vocab_size(name) == load_model("somebody/tiny").config.vocab_size


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "it is of type 'IA3'. Only plain LoRA is read here. Merge it into its base model"),
        ({"modules_to_save": ["lm_head"]}, "'modules_to_save' is ['lm_head']"),
        ({"use_dora": True}, "'use_dora' is True"),
        ({"rank_pattern": {"(a+)+$": 4}}, "'rank_pattern' is"),
        ({"bias": "all"}, "it trains biases"),
        ({"init_lora_weights": "pissa"}, "its base model was changed by init_lora_weights='pissa'"),
        ({"something_new": 1}, "'something_new' is 1"),
        ({"revision": "v2"}, "it belongs to revision 'v2'"),
        ({"r": 0}, "r must be a whole number in [1, 16384], and is 0"),
        ({"r": True}, "r must be a whole number"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number, and is nan"),
        ({"base_model_name_or_path": None}, "does not say which model it belongs to"),
        ({"base_model_name_or_path": "../tiny"}, "is no hub id. A path"),
        ({"base_model_name_or_path": "a/b/c"}, "is no hub id. A path"),
        ({"base_model_name_or_path": "-x y"}, "is no hub id. A path"),
    ],
)
def test_what_is_no_plain_lora_is_refused_with_a_way_on(foreign, settings, said):
    change(foreign, **settings)
    with pytest.raises(ConfigurationError) as error:
        load_model(foreign)
    assert said in str(error.value)
    assert "merge" in str(error.value).lower()


def rewrite(folder: Path, edit) -> None:
    weights = load_file(folder / ADAPTER_WEIGHTS)
    edit(weights)
    save_file(weights, folder / ADAPTER_WEIGHTS)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda w: w.update({FIRST: torch.zeros(3, 64)}), "rank 2 beside a layer from 64 to 64 takes [2, 64]"),
        (lambda w: w.pop(FIRST), "is not whole: each layer must have an A and a B"),
        (lambda w: w.clear(), "there must be a layer"),
        (lambda w: w.update({FIRST.replace("q_proj", "x_proj"): torch.zeros(2, 64),
                             FIRST.replace("q_proj", "x_proj").replace("_A", "_B"): torch.zeros(64, 2)}),
         "has no linear layer 'model.layers.0.self_attn.x_proj'"),
        (lambda w: w.update({"base_model.model.lm_head.weight": torch.zeros(1)}), "more than the matrices A and B"),
        (lambda w: w.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 64),
                             "base_model.model.lm_head.lora_B.weight": torch.zeros(749, 2)}),
         "it changes the head, whose weights are those of the embedding as well"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(foreign, edit, said):
    rewrite(foreign, edit)
    with pytest.raises(ConfigurationError) as error:
        load_model(foreign, base=str(STUDENT))
    assert said in str(error.value)


def test_pickles_damaged_files_and_a_model_beside_an_adapter(foreign):
    weights = foreign / ADAPTER_WEIGHTS
    weights.write_bytes(b"x" * 100)
    with pytest.raises(ConfigurationError, match=r"adapter_model\.safetensors is damaged"):
        load_model(foreign, base=str(STUDENT))
    weights.rename(foreign / "adapter_model.bin")
    with pytest.raises(ConfigurationError, match=r"pickles .* are never read"):
        load_model(foreign, base=str(STUDENT))
    (foreign / ADAPTER_FILE).write_text("{")
    with pytest.raises(ConfigurationError, match=r"adapter_config\.json in .* is damaged"):
        load_model(foreign, base=str(STUDENT))
    (foreign / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="holds a whole model and an adapter"):
        load_model(foreign)


def test_an_adapter_of_an_adapter_and_a_base_that_is_gone(foreign, tmp_path):
    with pytest.raises(ConfigurationError, match=r"which is an adapter itself\. Merge that one first"):
        load_model(foreign, base=str(foreign))
    with pytest.raises(ConfigurationError, match=r"there is no such folder\. Merge it once with the model where it is"):
        load_model(foreign, base=str(tmp_path / "gone"))


def put_on(adapter, **settings):
    model = add_adapter(load_model(STUDENT), LoraConfig(**settings), STUDENT, 0)
    load_adapter(model, adapter)
    return model


def test_going_on_with_another_adapter_says_which_settings_it_has_and_they_work(foreign):
    adapter = find_adapter(foreign, str(STUDENT))
    assert adapter is not None
    with pytest.raises(ConfigurationError) as error:
        put_on(adapter, rank=2)
    said = r"rank=(2) model\.lora\.alpha=(4\.24264069) 'model\.lora\.targets=\[(q_proj,v_proj)\]'"
    advice = re.search(said, str(error.value))
    assert advice is not None
    rank, alpha, targets = advice.groups()
    model = put_on(adapter, rank=int(rank), alpha=float(alpha), targets=targets.split(","))
    expected = logits(load_model(foreign, base=str(STUDENT)), 700)
    torch.testing.assert_close(logits(model, 700), expected, atol=1e-4, rtol=0)


def test_going_on_with_an_adapter_of_some_layers_says_that_it_is_one(foreign):
    rewrite(foreign, lambda weights: [weights.pop(name) for name in list(weights) if ".layers.0." in name])
    adapter = find_adapter(foreign, str(STUDENT))
    assert adapter is not None
    with pytest.raises(ConfigurationError, match=r"covers \d+ layers, and model\.lora describes") as error:
        put_on(adapter, rank=2, alpha=adapter.scale * 2, targets=["q_proj", "v_proj"])
    assert "To train it further" not in str(error.value)
    assert "merge" in str(error.value)


def test_merging_refuses_a_whole_model_and_a_folder_in_use(foreign, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("as it was")
    for arguments, said in (
        (
            [str(STUDENT), "--out", f"{tmp_path}/my new"],
            f"holds a whole model and no adapter, so there is nothing to merge. For a folder to share: python -m "
            f"algorithms.export {STUDENT} --out '{tmp_path}/my new'",
        ),
        ([str(foreign), "--base", str(STUDENT), "--out", str(tmp_path / "full")], "holds something already"),
    ):
        with pytest.raises(SystemExit):
            merge.main(arguments)
        assert said in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious"]
    assert not (tmp_path / "my new").exists()
