"""Probes over a network, at the end of a run and alone; what an evaluation measures and leaves behind."""

from __future__ import annotations

import io
import json
import sys
import warnings
from unittest.mock import patch

import numpy as np
import pytest
import torch
from rich.console import Console
from small_runs import DGPO, SFT, Run, train
from toy_policy import SPELLINGS, make_policy, make_tokenizer

from agentic_rag_env.actions import CLOSING_TAGS
from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.probes import DEFAULT_PROBES, Prompt, figure, interval, share
from agentic_rag_env.types import Question, StepInfo
from algorithms import evaluate
from algorithms.learner.types import Trajectory, Turn
from algorithms.rollout import cached_engine
from algorithms.rollout.cached_engine import CachedEngine
from algorithms.rollout.config import RolloutConfig
from algorithms.rollout.generator import Generator
from algorithms.rollout.tokenization import encode_plain
from algorithms.rollout.trajectory_files import read_trajectories
from algorithms.training import evaluation
from algorithms.training.arc_table import arc_table, show_arc, weakest
from algorithms.training.evaluation import Evaluated
from algorithms.training.position import Position

FEW = ["threads=1", "num_envs=16", "dataset.num_passages=150", "dataset.num_questions=40", "rollout.max_new_tokens=24",
       "evaluation.num_questions=12", "evaluation.temperatures=[0]"]  # fmt: skip


# --- a network as a generator ----------------------------------------------------------------------------------------


def engine(spelling: str, num_rows: int = 5, **settings) -> CachedEngine:
    policy, tokenizer = make_policy(spelling, seed=3, pull=0.5), make_tokenizer(spelling)
    config = RolloutConfig(**{"temperature": 0.0, "max_new_tokens": 12, "max_tokens": 256, **settings})
    return CachedEngine(policy, tokenizer, config, num_rows=num_rows, action_ends=CLOSING_TAGS)


@torch.no_grad()
def one_by_one(played: CachedEngine, prompt: str, max_new_tokens: int = 12) -> str:
    """Greedy text from whole forward passes over one prompt, cut as soon as a closing tag stands in it."""
    ids, written = played.tokenizer.encode(prompt, add_special_tokens=False), []
    while len(written) < max_new_tokens:
        logits = played.model(input_ids=torch.tensor([ids + written])).logits[0, -1, : played.vocab_size]
        token = int(logits.argmax())
        if token == played.tokenizer.eos_token_id:
            break
        written.append(token)
        text = played.tokenizer.decode(written)
        if any(tag in text for tag in CLOSING_TAGS):
            break
    return played.tokenizer.decode(written)


PROMPTS = [
    *(Prompt(f"who{' ada' * row} lives?\n", "\n\nin oslo\n\n" * (row % 3), "<answer>") for row in range(7)),
    *(Prompt(f"where bob{' works' * row}?", "", opening) for row in range(3) for opening in ("<search>", "")),
    " ada",
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_generated_text_is_that_of_plain_greedy_decoding(spelling):
    played = engine(spelling)
    texts = Generator(played)(PROMPTS)
    assert texts == [one_by_one(played, prompt) for prompt in PROMPTS]
    assert len({len(text) for text in texts}) > 1, "they end at different times, so that rows are moved"


def test_generated_text_does_not_depend_on_how_prompts_share_a_pass(monkeypatch):
    expected = Generator(engine("pieces", num_rows=1))(PROMPTS)
    monkeypatch.setattr(cached_engine, "_MAX_PREFILL_TOKENS", 60)
    assert Generator(engine("pieces", num_rows=14))(PROMPTS) == expected
    assert Generator(engine("pieces", num_rows=4))(PROMPTS[::-1]) == expected[::-1]


def test_the_parts_of_a_prompt_are_encoded_apart_and_only_the_message_goes_through_the_chat_template():
    played = engine("overrun")  # where ">\n\n" is one token
    played.tokenizer.chat_template = "{% for m in messages %}U{{ m.content }}A{% endfor %}"
    (ids,) = Generator(played)._encode([Prompt("who?", "</information>", "\n\n<answer>")])
    expected = [encode_plain(played.tokenizer, [part])[0] for part in ("Uwho?A", "</information>", "\n\n<answer>")]
    assert ids.tolist() == np.concatenate(expected).tolist()
    played.tokenizer.chat_template = None


def test_a_prompt_that_is_too_long_is_told_apart_from_one_without_words():
    played = engine("whole", max_tokens=20)
    with pytest.warns(UserWarning, match="1 of 2 prompts have at least max_tokens=20"):
        texts = Generator(played)([" ada" * 20, " ada" * 15])
    assert texts[0] is None
    assert texts[1] == one_by_one(played, " ada" * 15, max_new_tokens=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Generator(played)([]) == []


def test_a_model_in_training_stays_in_training():
    played = engine("whole")
    played.model.train()
    Generator(played)(PROMPTS[:2])
    assert played.model.training


# --- figures of an evaluation ----------------------------------------------------------------------------------------


def played(question: Question, answer: str | None, f1: float, correct: bool) -> Trajectory:
    info = StepInfo(
        question_id=question.id, turn=1, action="answer" if answer else "malformed", query=None, passages=(),
        answer=answer, exact_match=float(correct), f1=f1, num_searches=0, correct=correct, error=None,
    )  # fmt: skip
    ids = np.array([1, 2])
    turn = Turn(ids, np.zeros(2, dtype=np.float32), ids[:0], info)
    return Trajectory(ids, [turn], 0, "policy", float(correct), correct, answer is not None, answer is None)


QUESTIONS = QuestionSet("mixed", [
    Question("n1", "?", ("Rome",), {"dataset": "nq"}),
    Question("n2", "?", ("Oslo",), {"dataset": "nq"}),
    Question("n3", "?", ("Bern", "Berne"), {"dataset": "nq"}),
    Question("m1", "?", ("Tiber",), {"dataset": "musique"}),
])  # fmt: skip
PLAYED = [
    played(QUESTIONS[0], "Rome", 1.0, True),
    played(QUESTIONS[1], "the city of Oslo", 0.5, False),
    played(QUESTIONS[2], None, 0.0, False),
    played(QUESTIONS[3], "Tiber", 1.0, True),
]


def test_scores_per_dataset_and_their_macro_average_by_hand():
    figures = evaluation.measure(PLAYED, QUESTIONS)
    assert list(figures) == ["all", "nq", "musique"]
    shown = {name: [of[score] for score in evaluation.SCORES] for name, of in figures.items()}
    assert shown == {
        "all": pytest.approx([2 / 4, 2.5 / 4, 3 / 4]),
        "nq": pytest.approx([1 / 3, 1.5 / 3, 2 / 3]),
        "musique": [1, 1, 1],
    }
    macro = [figures["all"][f"macro_{score}"] for score in evaluation.SCORES]
    assert macro == pytest.approx([2 / 3, 3 / 4, 5 / 6])
    assert figures["nq"]["f1_interval"] == interval([1, 0.5, 0])
    low, high = figures["all"]["macro_exact_match_interval"]
    assert (low, high) == (0.5, 1.0)  # musique is 1 in every sample, nq anything from 0 to 1
    assert [of["n"] for of in figures.values()] == [4, 3, 1]
    one = evaluation.measure(PLAYED[:3], QUESTIONS)
    assert list(one) == ["all"]
    assert one["all"]["macro_exact_match"] == one["all"]["exact_match"]


def test_predictions_are_a_line_for_each_question(tmp_path):
    evaluation.write_predictions(tmp_path / "new" / "p.jsonl", PLAYED, QUESTIONS)
    rows = [json.loads(line) for line in (tmp_path / "new" / "p.jsonl").read_text().splitlines()]
    assert rows[1] == {
        "question_id": "n2", "dataset": "nq", "golden_answers": ["Oslo"], "prediction": "the city of Oslo",
        "correct": False, "f1": 0.5, "sub_exact_match": 1.0, "num_searches": 0, "ending": "answered",
    }  # fmt: skip
    assert [row["prediction"] for row in rows] == ["Rome", "the city of Oslo", None, "Tiber"]


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_marks_what_is_weak_and_names_the_weakest_point():
    good, bad = Evaluated("good", False), Evaluated("bad", False)
    good.arc = {
        "source_referencing": {"exact_match": share([0.9], "high"), "distractors_effect": figure([0.25], "high")},
        "thinking": {"gain": figure([-0.75], "high")},
        "search_behaviour": {"searched_on": share([0.3], "low"), "num_searches": figure([2.0])},
        "query_rewriting": {"hit_first_round": share([0.0], "high")},
    }
    bad.arc = {"source_referencing": {"exact_match": share([0.2], "high")}}
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    show_arc(console, [good, Evaluated("not probed", False), bad])
    lines = [line.split("│") for line in console.export_text().splitlines()]
    cells = {line[1].strip(): [cell.strip() for cell in line[2:-1]] for line in lines if len(line) > 3}
    assert cells["reads the answer off gold passages"] == ["0.900 (0.90 to 0.90)", "! 0.200 (0.20 to 0.20)"]
    assert cells["... effect of the distractors"] == ["+0.250 (+0.25 to +0.25)", "-"]
    assert cells["... gain over answering at once"] == ["-0.750 (-0.75 to -0.75)", "-"]
    assert cells["searches per episode"] == ["2.000 (2.00 to 2.00)", "-"]
    assert cells["first query finds the answer"] == ["0.000 (0.00 to 0.00)", "-"]  # of two hops it can't
    assert "any query finds the answer" not in cells
    assert weakest(good) == "searches on with all of it (search_behaviour/searched_on 0.300)"
    assert weakest(bad) == "reads the answer off gold passages (source_referencing/exact_match 0.200)"
    assert arc_table([bad]).row_count == 1


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(tmp_path, capsys):
    """`python -m algorithms.evaluate ...` without a new process."""

    def score(*overrides: str) -> Run:
        path = tmp_path / f"scored-{len(list(tmp_path.glob('scored-*')))}"
        code: int | str | None = 0
        try:
            with patch.object(sys, "argv", ["evaluate", *FEW, *overrides, f"hydra.run.dir={path}"]):
                evaluate.main()
        except SystemExit as end:
            code = end.code
        return Run(path, code, *capsys.readouterr())

    return score


def test_a_checkpoint_is_probed_alone(scored):
    score = scored("checkpoint=tiny-teacher")
    assert score.code == 0, score.err
    arc = score.summary["arc"]["checkpoint"]
    assert list(arc) == list(DEFAULT_PROBES)
    for of in arc.values():
        for name, found in of.items():
            assert found.keys() == {"value", "n", "interval", "best", "share"}, name
            assert found["interval"][0] <= found["value"] <= found["interval"][1]
    assert {found["n"] for found in arc["query_rewriting"].values()} == {12}
    greedy = score.summary["evaluation"]["checkpoint"]["greedy"]["all"]
    assert arc["search_behaviour"]["num_searches"]["value"] == greedy["num_searches"]
    assert arc["search_behaviour"]["malformed_fraction"]["value"] == greedy["malformed_fraction"]
    assert arc["query_rewriting"]["hit_any_round"]["value"] >= greedy["exact_match"] > 0.5
    assert "weakest of checkpoint" in score.out
    assert score.summary["costs"]["probes_s"] > 0
    (file,) = (score.path / "predictions").iterdir()
    assert file.name == "test-checkpoint-greedy.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    whole = read_trajectories(score.path / "trajectories" / "test-checkpoint-greedy.jsonl.gz")
    assert [row["correct"] for row in rows] == [trajectory.correct for trajectory in whole]
    assert [row["question_id"] for row in rows] == [t.turns[-1].info["question_id"] for t in whole]
    assert scored("checkpoint=tiny-teacher").summary["arc"]["checkpoint"] == arc, "the same again"


def test_probes_are_chosen_by_name_and_have_settings(scored):
    chosen = scored("checkpoint=tiny-student", "probes=[{name: source_referencing, num_distractors: 1}]")
    (arc,) = chosen.summary["arc"]["checkpoint"].values()
    assert "position_2_exact_match" in arc
    assert "position_3_exact_match" not in arc
    none = scored("checkpoint=tiny-student", "probes=[]")
    assert none.summary["arc"] == {"checkpoint": {}}
    assert "ARC" not in none.out


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("probes=[thinkin]", "Unknown probe 'thinkin'. Did you mean 'thinking'?"),
        ("probes=[{name: source_referencing, num_distractors: 0}]", "an integer of at least 1, got 0"),
        ("probes=thinking", "probes"),
    ],
)
def test_probes_that_do_not_exist_are_refused_before_anything_is_played(scored, override, said):
    score = scored("checkpoint=tiny-student", override)
    assert score.code == 1
    assert said in score.err
    assert "evaluating" not in score.out


def test_a_run_ends_with_the_probes_of_every_model(tmp_path, cache):
    all_of_them = f"probes=[{','.join(DEFAULT_PROBES)}]"
    run = train(tmp_path / "run", cache, *DGPO, all_of_them, "evaluation.num_questions=8")
    arc = run.summary["arc"]
    assert list(arc) == ["raw", "kd", "dgpo", "teacher"]
    for name, of in arc.items():
        assert list(of) == list(DEFAULT_PROBES), name
        greedy = run.summary["evaluation"][name]["greedy"]["all"]
        assert of["search_behaviour"]["num_searches"]["value"] == greedy["num_searches"]
    scalars = run.scalars()
    for probe, of in arc["dgpo"].items():
        for metric, found in of.items():
            ((_, value),) = scalars[f"arc/{probe}/{metric}"]
            assert value == pytest.approx(found["value"], abs=1e-6)
    assert run.summary["costs"]["probes_s"] > 0
    assert "weakest of dgpo" in run.out
    names = {file.name for file in (run.path / "predictions").iterdir()}
    assert names == {f"test-{m}-{d}.jsonl" for m in arc for d in ("greedy", "T=1")}


def test_probes_on_the_way_watch_and_steer_nothing(tmp_path, cache):
    settings, noted = ("probe_every=4", "evaluation.every=3", "probes=[search_behaviour]"), []
    with patch.object(Position, "note_check", lambda position, _: noted.append(position.step)):
        run = train(tmp_path / "run", cache, "algo=sft", *SFT, *settings)
    assert noted == [3, 6]
    probed = [row["step"] for row in run.metrics if "dev/arc/search_behaviour/num_searches" in row]
    checked = [row["step"] for row in run.metrics if "dev/exact_match" in row]
    assert (probed, checked) == ([4, 6], [3, 4, 6])  # and both at the end
    for row in run.metrics:
        if row["step"] in probed:
            assert row["dev/arc/search_behaviour/num_searches"] == row["dev/num_searches"]


def test_a_plug_ins_probe_stands_in_the_table():
    model = Evaluated("kd", arc={"stamina": {"mean_rank": figure([3.0, 5.0], "low"), "kept_on": share([1, 0], "high")}})
    terminal = Console(width=120, file=io.StringIO(), force_terminal=False)
    show_arc(terminal, [model])
    assert " 4.000 (3.00 to 5.00)" in terminal.file.getvalue(), "no difference, so no sign"
    assert "weakest of kd: stamina: kept on (stamina/kept_on 0.500)" in terminal.file.getvalue()
    assert weakest(Evaluated("kd", arc={"stamina": {"kept_on": share([1, 0])}})) == "no share says which way is good"


def test_changed_passages_are_a_row_of_the_table(tmp_path, cache):
    run = train(
        tmp_path / "run", cache, *SFT, "algo=sft", "evaluation.corpus=counterfactual", "probes=[]", "evaluation.every=0"
    )
    assert {"reads", "remembers", "neither", "left_out"} <= run.summary["arc"]["teacher"]["counterfactual"].keys()
    teacher = run.summary["arc"]["teacher"]["counterfactual"]
    assert teacher["reads"]["value"] == pytest.approx(teacher["own_exact_match"]["value"], abs=0.1)
    assert teacher["reads"]["value"] > 0.6
    assert run.summary["arc"]["raw"]["counterfactual"]["reads"]["value"] == 0
    assert "answers what changed passages say" in run.out
