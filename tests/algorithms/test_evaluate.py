"""Scoring a checkpoint: what is found behind its name, whose settings count, and what is written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from small_runs import DGPO_STEPS, KD_STEPS, TINY, Run

from agentic_rag_env.errors import RetrieverError
from algorithms import evaluate
from algorithms.analysis.runs import find_runs
from algorithms.assets import ASSETS
from algorithms.rollout.trajectory_files import read_trajectories
from algorithms.training import build
from algorithms.training.build import Environments, Networks
from algorithms.training.settings import EvaluateConfig
from algorithms.training.typed import evaluate_config

STEPS = KD_STEPS + DGPO_STEPS
#: The small runs' world, for checkpoints that bring no settings.
SMALL = [each for each in TINY if each.partition(".")[0] in ("threads=1", "num_envs=16", "dataset", "rollout", "env")]
FEW = ["threads=1", "num_envs=16", "evaluation.num_questions=6", "evaluation.temperatures=[0]", "probes=[]"]


@pytest.fixture
def scored(tmp_path, capsys):
    """`python -m algorithms.evaluate ...` without a new process, into a directory of its own."""

    def score(*overrides: str) -> Run:
        path = tmp_path / f"scored-{len(list(tmp_path.glob('scored-*')))}"
        code: int | str | None = 0
        try:
            with patch.object(sys, "argv", ["evaluate", *overrides, f"hydra.run.dir={path}"]):
                evaluate.main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return Run(path, code, out, err)

    return score


def test_a_run_directory_scores_as_the_run_did(dgpo_run, scored, monkeypatch):
    loaded = []
    load_model = build.load_model
    monkeypatch.setattr(build, "load_model", lambda path, **options: loaded.append(path) or load_model(path, **options))

    score = scored(f"checkpoint={dgpo_run.path}", "threads=1", "probes=[]")

    assert score.code == 0, score.err
    newest = str(dgpo_run.path / "checkpoints" / f"{STEPS:06d}")
    assert loaded == [newest], "the policy alone is loaded, never the teacher"
    assert score.summary["checkpoint"] == newest
    assert score.summary["evaluation"] == {"checkpoint": dgpo_run.summary["evaluation"]["dgpo"]}
    assert score.summary["teacher_in_memory_during_policy_evaluation"] is False
    assert score.summary["config"]["dataset"] == dgpo_run.summary["config"]["dataset"] | {"split": "test"}
    assert score.summary["fingerprints"] == dgpo_run.summary["fingerprints"] | {"training_questions": None}
    for part in ("env", "retriever", "reward", "rollout"):
        assert score.summary["config"][part] == dgpo_run.summary["config"][part], part
    for mode in ("greedy", "T=1"):
        theirs = dgpo_run.transcripts()[f"test-dgpo-{mode}.jsonl.gz"]
        assert score.transcripts()[f"test-checkpoint-{mode}.jsonl.gz"] == theirs


def test_a_run_is_not_overwritten_by_what_is_measured_of_it(dgpo_run):
    before = {path: path.read_bytes() for path in dgpo_run.path.rglob("*") if path.is_file()}
    line = ["evaluate", f"checkpoint={dgpo_run.path}", *FEW, f"hydra.run.dir={dgpo_run.path}"]
    with patch.object(sys, "argv", line), pytest.raises(SystemExit) as refused:
        evaluate.main()
    assert f"{dgpo_run.path} holds a run. Choose another directory" in str(refused.value.code)
    assert f"hydra.run.dir={dgpo_run.path}/test" in str(refused.value.code)
    assert {path: path.read_bytes() for path in dgpo_run.path.rglob("*") if path.is_file()} == before


def test_the_advice_where_figures_would_go_over_a_run_holds_where_its_path_has_a_blank(tmp_path):
    run_dir = tmp_path / "my run"
    (run_dir / "checkpoints").mkdir(parents=True)
    line = ["evaluate", "checkpoint=tiny-student", f"hydra.run.dir={run_dir}"]
    with patch.object(sys, "argv", line), pytest.raises(SystemExit) as refused:
        evaluate.main()
    assert f"say hydra.run.dir='{run_dir}/test'." in str(refused.value.code)


def test_the_table_shows_every_mode_with_all_figures(dgpo_run, scored):
    score = scored(f"checkpoint={dgpo_run.path}", *FEW[:3])
    figures = score.summary["evaluation"]["checkpoint"]["T=1"]["all"]
    assert figures["n"] == 6
    low, high = figures["exact_match_interval"]
    assert low <= figures["exact_match"] <= high
    for shown in ("greedy", "T=1", "F1", "searches", "malformed", f"{figures['num_searches']:.2f}"):
        assert shown in score.out
    assert "exact match on 6 questions" in score.out
    assert "6 of the 60 questions of tiny, split test" in score.out
    assert str(score.path) in score.out


def test_a_checkpoint_that_lies_elsewhere_scores_by_its_path_alone_as_the_run_did(dgpo_run, scored, tmp_path, capsys):
    copied = shutil.copytree(dgpo_run.path / "checkpoints" / f"{STEPS:06d}", tmp_path / "elsewhere" / "an_agent")
    score = scored(f"checkpoint={copied}", "threads=1", "probes=[]")
    assert score.code == 0, score.err
    assert score.summary["evaluation"] == {"checkpoint": dgpo_run.summary["evaluation"]["dgpo"]}
    assert score.summary["fingerprints"] == dgpo_run.summary["fingerprints"] | {"training_questions": None}
    assert score.summary["precision"] == dgpo_run.summary["precision"]
    assert score.summary["attention"] == dgpo_run.summary["attention"]
    for mode in ("greedy", "T=1"):
        theirs = dgpo_run.transcripts()[f"test-dgpo-{mode}.jsonl.gz"]
        assert score.transcripts()[f"test-checkpoint-{mode}.jsonl.gz"] == theirs
    assert "The command line says" not in score.out


def test_the_command_line_counts_before_the_agents_protocol_and_a_line_says_so(dgpo_run, scored, tmp_path):
    copied = shutil.copytree(dgpo_run.path / "checkpoints" / f"{STEPS:06d}", tmp_path / "an_agent")
    for place in (copied, dgpo_run.path):
        score = scored(f"checkpoint={place}", *FEW, "env.max_turns=1", "rollout.max_new_tokens=30")
        assert score.summary["config"]["env"]["max_turns"] == 1
        assert score.summary["config"]["rollout"]["max_new_tokens"] == 30
        assert "The command line says env.max_turns=1, rollout.max_new_tokens=30, and that counts; " in score.out
        assert "was trained with env.max_turns=2, rollout.max_new_tokens=24." in score.out


def test_other_data_are_measured_whole(dgpo_run, scored):
    score = scored(
        f"checkpoint={dgpo_run.path}", "dataset=tiny", "dataset.num_passages=150", "dataset.num_questions=40",
        "evaluation.temperatures=[0]", "probes=[]", "threads=1",
    )  # fmt: skip
    assert score.summary["evaluation"]["checkpoint"]["greedy"]["all"]["n"] == 40
    assert score.summary["config"]["num_envs"] == 96


def test_what_an_agents_file_may_not_bring_is_asked_for(scored, tmp_path):
    folder = shutil.copytree(ASSETS / "tiny-student", tmp_path / "an_agent")
    agent = {
        "format": 1, "env": {"name": "agentic_rag"}, "action_ends": ["</a>"], "rollout": {}, "precision": "float32",
        "vocab_size": 700, "measured": {"dataset": {"name": "jsonl", "questions": "/somewhere/q.jsonl"}},
    }  # fmt: skip
    (folder / "agent.json").write_text(json.dumps(agent))
    score = scored(f"checkpoint={folder}", *FEW)
    assert score.code == 1
    assert """add: 'dataset.questions="/somewhere/q.jsonl"'""" in score.err
    score = scored(f"checkpoint={folder}", *FEW, "dataset=tiny", "rollout.max_new_tokens=4")
    assert score.code == 0, score.err
    assert "Actions end with </search>, </answer>; a model was trained with </a>." in score.out


def test_all_questions_of_the_test_split_if_told_so(dgpo_run, scored):
    whole = scored(
        f"checkpoint={dgpo_run.path}", "evaluation.num_questions=null", "evaluation.temperatures=[0]", "probes=[]"
    )
    assert whole.summary["split"] == "test"
    assert whole.summary["evaluation"]["checkpoint"]["greedy"]["all"]["n"] == 60
    assert len(read_trajectories(whole.path / "trajectories" / "test-checkpoint-greedy.jsonl.gz")) == 60


def test_single_settings_change_those_of_the_run_and_a_name_replaces_them(dgpo_run, scored):
    changed = scored(f"checkpoint={dgpo_run.path}", *FEW, "dataset.split=dev", "env.max_turns=1", "retriever.k1=0.5")
    config = changed.summary["config"]
    assert config["env"] == dgpo_run.summary["config"]["env"] | {"max_turns": 1}
    assert config["dataset"] == dgpo_run.summary["config"]["dataset"] | {"split": "dev"}
    assert config["retriever"] == dgpo_run.summary["config"]["retriever"] | {"k1": 0.5}
    assert config["rollout"]["max_new_tokens"] == 24
    trajectories = read_trajectories(changed.path / "trajectories" / "dev-checkpoint-greedy.jsonl.gz")
    assert max(len(trajectory.turns) for trajectory in trajectories) <= 2

    replaced = scored(f"checkpoint={dgpo_run.path}", *FEW, "env=agentic_rag", "rollout.max_new_tokens=5")
    assert replaced.summary["config"]["env"]["max_turns"] == 4
    assert replaced.summary["config"]["dataset"]["num_passages"] == 150
    trajectories = read_trajectories(replaced.path / "trajectories" / "test-checkpoint-greedy.jsonl.gz")
    assert max(len(turn.action_ids) for trajectory in trajectories for turn in trajectory.turns) == 5


def test_the_newest_complete_checkpoint_counts(dgpo_run, scored, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(dgpo_run.path, run)
    (run / "checkpoints" / f"{STEPS:06d}" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="is skipped"):
        score = scored(f"checkpoint={run}", *FEW)
    assert score.summary["checkpoint"] < str(run / "checkpoints" / f"{STEPS:06d}")
    assert Path(score.summary["checkpoint"]).parent == run / "checkpoints"


def test_a_checkpoint_folder_of_a_run_brings_the_settings_of_the_run(dgpo_run, scored):
    step = dgpo_run.path / "checkpoints" / f"{KD_STEPS:06d}"
    score = scored(f"checkpoint={step}", "threads=1", "probes=[]")
    assert score.summary["evaluation"]["checkpoint"] == dgpo_run.summary["evaluation"]["kd"]


def test_a_comparison_knows_a_checkpoint_by_its_training(dgpo_run, scored):
    """Settings of the training, its seed and its name; of an earlier checkpoint also the step."""
    step = dgpo_run.path / "checkpoints" / f"{KD_STEPS:06d}"
    for place, name in ((dgpo_run.path, "dgpo"), (step, f"dgpo@{KD_STEPS:06d}")):
        (run,) = find_runs([scored(f"checkpoint={place}", *FEW).path])
        assert (run.name, run.seed) == (name, dgpo_run.summary["seed"])
        (trained,) = find_runs([dgpo_run.path])
        for key in ("algo.name", "algo.warm_start.name", "model.policy", "model.teacher"):
            assert run.settings[key] == trained.settings[key]
        assert run.settings["trained.dataset.name"] == trained.settings["dataset.name"]


def test_a_hugging_face_folder_and_a_bundled_name_start_from_the_defaults(dgpo_run, scored, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "tiny-student", folder)
    named = ["evaluation.num_questions=32", *SMALL, "env.prompt=bare"]
    score = scored(f"checkpoint={folder}", *named)
    assert score.summary["evaluation"]["checkpoint"] == dgpo_run.summary["evaluation"]["raw"]
    assert scored("checkpoint=tiny-teacher", *FEW).summary["checkpoint"] == str(ASSETS / "tiny-teacher")


def test_a_model_that_is_not_ours_is_told_the_protocol_and_any_precision_can_be_had(scored, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "tiny-student", folder)
    score = scored(f"checkpoint={folder}", *FEW, "learner.precision=bfloat16", "rollout.max_new_tokens=4")
    assert score.summary["config"]["env"]["prompt"] == "search_r1"
    assert score.summary["precision"] == "bfloat16"


def test_nothing_of_these_is_a_clear_error(scored, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    (tmp_path / "young" / ".hydra").mkdir(parents=True)
    (tmp_path / "young" / ".hydra" / "config.yaml").write_text("{}")
    for given, said in (
        ("", "checkpoint=... is missing"),
        (f"checkpoint={tmp_path}/empty", "found: nothing"),
        (f"checkpoint={tmp_path}/notes", "neither a run directory (.hydra/config.yaml is missing) nor a Hugging Face"),
        (f"checkpoint={tmp_path}/notes", "found: a.txt"),
        (f"checkpoint={tmp_path}/notes/a.txt", "found: a file"),
        (f"checkpoint={tmp_path}/absent", "There is no folder"),
        (f"checkpoint={tmp_path}/young", "has no complete checkpoint yet"),
        ("checkpoint=nobody/nothing-of-the-kind", "neither a folder here nor reachable on the Hugging Face hub"),
    ):
        score = scored(*filter(None, [given]))
        assert score.code == 1
        assert said in score.err, given
        assert "Traceback" not in score.err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("env.max_turn=3", "There is no setting env.max_turn. Did you mean 'max_turns'?"),
        ("evaluation.num_question=3", "There is no setting evaluation.num_question. Did you mean 'num_questions'?"),
        ("evaluation.temperatures=1", "evaluation.temperatures is a list: write evaluation.temperatures=[1]."),
        ("retriever.k1=much", "retriever.k1 must be a number, got 'much'."),
        ("probes=null", "probes is a list, which can't be null: write probes=[] for none."),
        ("algo=kd", "algo can't be given, as the checkpoint brings it. What can be given: allow, cache_dir,"),
        ("+method=kd", "method can't be given, as the checkpoint brings it."),
        ("model=smollm2_135m", "model can't be given, as the checkpoint brings it."),
        ("runs/x", "'runs/x' has no '='; write name=value."),
        ("rollout.max_new_tokens=0", "max_new_tokens must be an integer of at least 1, got 0"),
        ("dataset=jsonl", "dataset.questions has no default and must be set"),
        ("dataset.split=tset", "Did you mean 'test'?"),
        ("evaluation.temperatures=[]", "temperatures must be"),
    ],
)
def test_settings_that_cannot_work_are_clear_errors(scored, override, said):
    score = scored("checkpoint=tiny-student", override)
    assert score.code == 1
    assert said in score.err
    assert not (score.path / "summary.json").exists()


def test_a_checkpoint_without_its_name_is_told_how_to_be_written(scored):
    assert "'runs/x' has no '='; write checkpoint=runs/x." in scored("runs/x").err
    assert "'my run' has no '='; write checkpoint='my run'." in scored("my run", "probes=[]").err


class Broken:
    """A search engine that is down."""

    def search(self, queries, top_k):
        raise RetrieverError("connection refused")


def test_a_retriever_that_is_down_ends_the_evaluation_instead_of_looking_like_wrong_answers(tmp_path):
    given = vars(EvaluateConfig()) | {"evaluation": {}, "dataset": {"split": "test", "num_passages": 150}}
    config = evaluate_config(given, str(ASSETS / "tiny-teacher"), {})
    networks = Networks(config)
    envs = Environments(config, networks.tokenizer).envs("test")
    envs.retriever = Broken()
    with pytest.raises(RetrieverError, match=r"5 of 20 episodes ended in a failed search.*=0\.2 .*connection refused"):
        networks.player(networks.policy, envs, temperature=0.0).rollout(range(20), seed=(0,))


def test_the_summary_is_plain_json_with_versions_and_machine(dgpo_run, scored):
    score = scored(f"checkpoint={dgpo_run.path}", *FEW)
    summary = json.loads((score.path / "summary.json").read_text(encoding="utf-8"))
    assert summary["versions"]["torch"]
    assert summary["machine"]["device"]
    assert summary["costs"]["evaluation_s"] > 0
    assert summary["peak_memory_mb"] > 0
