"""Models whose weights are saved in several files with an index, as large ones are, go every way that small ones go."""

from __future__ import annotations

import functools
import json
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from small_runs import Run, assert_same_training, resume, train
from transformers import AutoModelForCausalLM, PreTrainedModel

from agentic_rag_env import AgenticRAGVectorEnv
from agentic_rag_env.errors import DataError
from agentic_rag_env.weight_files import WEIGHT_INDEX
from algorithms import ask, evaluate, export, merge
from algorithms.learner.networks import load_model, load_tokenizer
from algorithms.training.checkpoint import find_problem, latest, require_whole
from algorithms.training.fingerprints import of_playing
from algorithms.training.run_files import read_summary

#: Two steps; the student has 1 MB of weights, 192 kB of them in its embedding.
SFT = ["algo=sft", "algo.batch_size=8", "algo.num_demonstrations=16", "algo.epochs=1", "checkpoint_every=1"]
LAST = 2


@pytest.fixture(autouse=True, scope="module")
def small_files():
    """What `save_pretrained` does from 50 GB on, it does from 250 kB on."""
    with pytest.MonkeyPatch.context() as patched:
        original = PreTrainedModel.save_pretrained
        patched.setattr(PreTrainedModel, "save_pretrained", functools.partialmethod(original, max_shard_size="250KB"))
        yield


@pytest.fixture(scope="module")
def run(small_files, tmp_path_factory, cache) -> Run:
    return train(tmp_path_factory.mktemp("runs") / "sft", cache, *SFT)


def folder(run: Run, step: int = LAST) -> Path:
    return run.path / "checkpoints" / f"{step:06d}"


def called(command, *arguments: str) -> None:
    """`python -m algorithms.<command>` in this process."""
    with patch.object(sys, "argv", [command.__name__, *arguments]):
        command.main()


def test_a_checkpoint_is_what_transformers_reads_and_its_manifest_knows_all_files(run):
    names = {path.name for path in folder(run).glob("model*")}
    count = len(names) - 1
    assert count > 3
    assert names == {WEIGHT_INDEX, *(f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1))}
    assert names <= json.loads((folder(run) / "manifest.json").read_text())["files"].keys()
    saved = run.weights(LAST)
    for model in (AutoModelForCausalLM.from_pretrained(folder(run)), load_model(folder(run))):
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in saved.items())
        assert len(saved) == len(dict(model.named_parameters()))


def test_a_resumed_run_ends_the_same_bit_for_bit(run, tmp_path):
    path = Path(shutil.copytree(run.path, tmp_path / "run"))
    shutil.rmtree(path / "checkpoints" / f"{LAST:06d}")
    (path / "summary.json").unlink()
    again = resume(path)
    assert f"resuming after step {LAST - 1} of {LAST}" in again.out
    assert_same_training(run, again)
    assert again.summary["evaluation"] == run.summary["evaluation"]


def cut(file: Path) -> str:
    file.write_bytes(file.read_bytes()[:-1])
    return f"{file.name} has {file.stat().st_size} bytes instead of {file.stat().st_size + 1}"


def flip(file: Path) -> str:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return f"{file.name} does not have the checksum it was saved with"


def remove(file: Path) -> str:
    file.unlink()
    return f"{file.name} is missing"


@pytest.mark.parametrize("damage", [cut, flip, remove])
@pytest.mark.parametrize("which", [0, 2, "index"])
def test_damage_to_any_of_the_files_is_named_and_an_earlier_checkpoint_is_taken(run, tmp_path, damage, which):
    path = Path(shutil.copytree(run.path, tmp_path / "run"))
    last = path / "checkpoints" / f"{LAST:06d}"
    problem = damage(last / WEIGHT_INDEX if which == "index" else sorted(last.glob("model-*"))[which])
    assert find_problem(last) == problem
    with pytest.raises(DataError, match=f"{problem}. A whole one is .*{LAST - 1:06d}"):
        require_whole(last)
    with pytest.warns(UserWarning, match=problem):
        assert latest(path) == path / "checkpoints" / f"{LAST - 1:06d}"


def test_evaluating_asking_exporting_and_going_on(run, tmp_path, cache, capsys):
    figures = run.summary["evaluation"]["sft"]
    called(export, str(run.path), "--out", str(tmp_path / "out"))
    assert (tmp_path / "out" / WEIGHT_INDEX).is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    for number, place in enumerate((run.path, folder(run), tmp_path / "out")):
        into = tmp_path / f"score{number}"
        called(evaluate, f"checkpoint={place}", "threads=1", "probes=[]", f"hydra.run.dir={into}")
        assert read_summary(into)["evaluation"] == {"checkpoint": figures}, place
    told = []
    for place in (run.path, tmp_path / "out"):
        capsys.readouterr()
        called(ask, f"checkpoint={place}", "question='Who?'", "threads=1")
        first, *rest = capsys.readouterr().out.splitlines()
        assert "on cpu, float32, greedy" in first
        told.append(rest)
    assert told[0] == told[1] != []
    # As a policy and as a teacher.
    more = train(tmp_path / "more", cache, *SFT, f"model.policy={tmp_path / 'out'}", "evaluation.every=0")
    assert more.summary["evaluation"]["raw"] == figures
    assert more.weights(LAST).keys() == run.weights(LAST).keys()


def test_an_adapter_is_merged_into_a_base_in_several_files(run, tmp_path, cache):
    pytest.importorskip("peft")
    settings = [*SFT, f"model.policy={run.path}", "model.lora.rank=2", "evaluation.every=0"]
    adapted = train(tmp_path / "adapted", cache, *settings)
    called(merge, str(adapted.path), "--out", str(tmp_path / "merged"))
    assert (tmp_path / "merged" / WEIGHT_INDEX).is_file()
    called(evaluate, f"checkpoint={tmp_path / 'merged'}", "threads=1", "probes=[]", f"hydra.run.dir={tmp_path / 's'}")
    assert read_summary(tmp_path / "s")["evaluation"] == {"checkpoint": adapted.summary["evaluation"]["sft"]}


def test_an_index_that_names_other_files_is_another_model(run, tmp_path):
    """Episodes that were kept of the one are not taken for those of the other."""
    dataset, tokenizer = AgenticRAGVectorEnv(1).dataset, load_tokenizer(folder(run))
    keys = []
    for name in ("one", "same", "other"):
        copied = Path(shutil.copytree(folder(run), tmp_path / name))
        first = sorted(copied.glob("model-*"))[0]
        shutil.copy(first, copied / "another.safetensors")
        if name == "other":
            index = copied / WEIGHT_INDEX
            index.write_text(index.read_text().replace(first.name, "another.safetensors"))
        keys.append(of_playing({}, str(copied), tokenizer, dataset))
    assert keys[0] == keys[1] != keys[2]
