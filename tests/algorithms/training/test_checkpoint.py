"""A checkpoint is complete or not there, whatever happens while it is written or afterwards."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from agentic_rag_env.errors import ConfigurationError, DataError
from algorithms.learner.networks import Critic
from algorithms.training import checkpoint


def make_model(seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {word: i for i, word in enumerate(["<unk>", "<eos>", *"abcdefghi"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def save(run_dir: Path, step: int, seed: int = 0, **settings) -> Path:
    state = {"learner_state": {"step": step, "moments": torch.arange(4.0)}, "trainer_state": {"stage": 1}}
    return checkpoint.save(run_dir, step, policy=make_model(seed), tokenizer=make_tokenizer(), **{**state, **settings})


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


# --- round trip ------------------------------------------------------------------------------------------------------


def test_everything_comes_back(tmp_path):
    critic = Critic(make_model(1))
    torch.nn.init.normal_(critic.head.weight)
    path = save(tmp_path, 7, seed=3, critic_state=critic.state_dict())
    assert path == tmp_path / "checkpoints" / "000007"
    assert checkpoint.latest(tmp_path) == path
    policy, other_critic = make_model(9), Critic(make_model(8))
    state = checkpoint.load(path, policy=policy, critic=other_critic)
    assert same(policy, make_model(3))
    assert same(other_critic, critic)
    assert (state.step, state.trainer) == (7, {"stage": 1})
    assert torch.equal(state.learner["moments"], torch.arange(4.0))
    assert checkpoint.read_trainer_state(path) == {"stage": 1}
    assert policy.get_output_embeddings().weight is policy.get_input_embeddings().weight


def test_a_shared_critic_saves_its_head_alone(tmp_path):
    policy = make_model(3)
    path = save(tmp_path, 1, critic_state=Critic(policy, shared=True).state_dict())
    state = torch.load(path / "training_state.pt", weights_only=True)
    assert set(state["critic"]) == {"head.weight", "head.bias"}


def test_the_folder_is_a_hugging_face_model(tmp_path):
    path = save(tmp_path, 1, seed=3)
    assert same(AutoModelForCausalLM.from_pretrained(path), make_model(3))
    assert AutoTokenizer.from_pretrained(path)("a b").input_ids == [2, 3]


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 1, seed=0)
    path = save(tmp_path, 1, seed=5)
    assert names(tmp_path) == ["000001"]
    assert same(AutoModelForCausalLM.from_pretrained(path), make_model(5))


def test_no_run_has_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path) is None


# --- damage ----------------------------------------------------------------------------------------------------------


def test_any_damage_to_any_file_is_noticed(tmp_path):
    good, whole = save(tmp_path, 1), save(tmp_path, 2)
    backup = shutil.copytree(whole, tmp_path / "backup")
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.is_file()]
    assert len(files) >= 5
    for name in files:
        content = (backup / name).read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for damaged in (content[:-1], content[:middle], b"", flipped, None):
            (whole / name).unlink() if damaged is None else (whole / name).write_bytes(damaged)
            with pytest.warns(UserWarning, match=r"000002 is skipped"):
                assert checkpoint.latest(tmp_path) == good, name
            with pytest.raises(DataError, match="can't be used"):
                checkpoint.load(whole, policy=make_model())
            (whole / name).write_bytes(content)
    assert checkpoint.latest(tmp_path) == whole


def test_a_folder_that_was_renamed_is_not_taken_for_a_later_one(tmp_path):
    good = save(tmp_path, 1)
    shutil.copytree(good, good.with_name("000009"))
    with pytest.warns(UserWarning, match="says step 1"):
        assert checkpoint.latest(tmp_path) == good


class Killed(BaseException):
    """Stands for a process that is gone: nothing may be cleaned up."""


@pytest.mark.parametrize("function", ["_write_manifest", "sync_all", "_put_in_place", "_prune"])
@pytest.mark.parametrize("existing", [1, 2])
def test_a_kill_at_any_stage_leaves_a_complete_checkpoint(tmp_path, monkeypatch, function, existing):
    save(tmp_path, existing, seed=existing)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(checkpoint, function, lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            save(tmp_path, 2, seed=7, keep_last=1)
    expected = 2 if function == "_prune" else existing
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / f"{expected:06d}"
    save(tmp_path, 3, keep_last=1)
    assert names(tmp_path) == ["000003"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1, seed=4)
    replace = Path.replace

    def kill_on_arrival(self, target):
        if self.name.endswith(".unfinished"):
            raise Killed
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
        patch.setattr(Path, "replace", kill_on_arrival)
        with pytest.raises(Killed):
            save(tmp_path, 1, seed=5)
    assert names(tmp_path) == ["000001.replaced", "000001.unfinished"]
    assert checkpoint.latest(tmp_path) is None
    assert names(tmp_path) == ["000001.replaced", "000001.unfinished"], "who reads a run changes nothing in it"
    path = checkpoint.recovered(tmp_path)
    assert path is not None
    assert same(AutoModelForCausalLM.from_pretrained(path), make_model(4))


def test_a_checkpoint_is_the_newest_if_no_whole_one_follows(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert (checkpoint.is_newest(first), checkpoint.is_newest(second)) == (False, True)
    (second / checkpoint.MANIFEST).unlink()
    assert checkpoint.is_newest(first)


# --- full disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
])  # fmt: skip
@pytest.mark.parametrize("place", ["weights", "state", "manifest"])
def test_a_full_disk_is_told_and_leaves_no_trace(tmp_path, monkeypatch, error, place):
    def fail(*_, **__):
        raise error

    good = save(tmp_path, 1, seed=1)
    targets = {
        "weights": (Qwen2ForCausalLM, "save_pretrained"),
        "state": (torch, "save"),
        "manifest": (checkpoint, "_write_manifest"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*targets[place], fail)
        with pytest.raises(OSError, match=r"No space left to save checkpoint .*000002 .* still .*000001") as raised:
            save(tmp_path, 2, keep_last=1)
    assert raised.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["000001"]
    assert checkpoint.latest(tmp_path) == good


def test_another_error_is_passed_on_and_leaves_no_trace(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(PermissionError):
        save(tmp_path, 2)
    assert names(tmp_path) == []


# --- pruning ---------------------------------------------------------------------------------------------------------


def test_old_ones_go_and_named_ones_stay(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, keep_last=2, keep_steps=(2,))
    assert names(tmp_path) == ["000002", "000004", "000005"]


def test_a_broken_one_does_not_count_as_kept(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "000002" / "model.safetensors").write_bytes(b"")
    save(tmp_path, 3, keep_last=2)
    assert names(tmp_path) == ["000001", "000003"]


def test_later_ones_of_a_run_that_was_taken_back_go(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    save(tmp_path, 2)
    assert names(tmp_path) == ["000001", "000002"]


def test_nothing_is_removed_before_the_new_one_is_complete(tmp_path, monkeypatch):
    save(tmp_path, 1)
    order = []
    put, prune = checkpoint._put_in_place, checkpoint._prune
    monkeypatch.setattr(checkpoint, "_put_in_place", lambda *a: (put(*a), order.append(names(tmp_path))))
    monkeypatch.setattr(checkpoint, "_prune", lambda *a: (prune(*a), order.append(names(tmp_path))))
    save(tmp_path, 2, keep_last=1)
    assert order == [["000001", "000002"], ["000002"]]


# --- errors ----------------------------------------------------------------------------------------------------------


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    with pytest.raises(TypeError, match=r"state\['trainer'\]\['path'\]\[0\] is a PosixPath"):
        save(tmp_path, 1, trainer_state={"path": [Path("x")]})
    with pytest.raises(ConfigurationError, match="keep_last must be an integer of at least 1, or None for all, got 0"):
        save(tmp_path, 1, keep_last=0)
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_of_other_networks_is_refused(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(DataError, match="saved without a critic and one was given"):
        checkpoint.load(path, policy=make_model(), critic=Critic(make_model()))
    config = make_model().config
    config.hidden_size = 16
    with pytest.raises(DataError, match="does not fit the networks of this run"):
        checkpoint.load(path, policy=Qwen2ForCausalLM(config))


def test_the_manifest_is_readable(tmp_path):
    manifest = json.loads((save(tmp_path, 4) / "manifest.json").read_text())
    assert manifest["step"] == 4
    assert {"model.safetensors", "config.json", "tokenizer.json", "training_state.pt"} <= set(manifest["files"])
