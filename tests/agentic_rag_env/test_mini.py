"""The two small sets of real questions that come with the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from agentic_rag_env import DATASETS, RETRIEVERS, ConfigurationError, DataError, Passage, Question, normalize_answer
from agentic_rag_env.corpus import read_rows
from agentic_rag_env.datasets.mini import ENDING, FOLDER, SPLITS
from agentic_rag_env.datasets.mini.make import hits, main, write
from agentic_rag_env.datasets.mini.recipe import draw, split_by_page, usable
from agentic_rag_env.datasets.rows import is_exploded

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
SETS = ("nq_mini", "hotpot_mini")
#: Least numbers of questions and passages, and hit@1 and hit@3 of BM25 with its default settings on the test split:
#: over the set's own passages, and over all passages of its source.
EXPECTED = {"nq_mini": (3000, 6000), "hotpot_mini": (1500, 5000)}
HITS = {"nq_mini": ((0.701, 0.820), (0.692, 0.819)), "hotpot_mini": ((0.390, 0.658), (0.390, 0.610))}


def load(name: str, split: str = "test", **settings: Any) -> Any:
    return DATASETS.build({"name": name, "split": split, **settings})


def everything(name: str) -> list[Question]:
    return [question for split in SPLITS for question in load(name, split)]


# --- what is in the box ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETS)
def test_sizes(name):
    questions, passages = EXPECTED[name]
    assert len(everything(name)) >= questions
    assert len(load(name).corpus) >= passages
    assert len(load(name, "test")) >= 300


def test_files_are_small_and_come_with_a_licence():
    assert sum(file.stat().st_size for file in FOLDER.glob(f"*/*{ENDING}")) <= 8e6
    notice = (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for said in ("creativecommons.org/licenses/by-sa/4.0/", "Natural Questions", "HotpotQA", "QED", "Wikipedia", *SETS):
        assert said in notice


@pytest.mark.parametrize("name", SETS)
def test_splits_share_one_corpus_and_no_page(name):
    splits = {split: load(name, split) for split in SPLITS}
    corpus = splits["train"].corpus
    assert all(of.corpus is corpus for of in splits.values())
    by_id = {passage.id: passage for passage in corpus}
    assert len(by_id) == len(corpus)
    pages = {
        split: {by_id[identifier].title.casefold() for question in of for identifier in question.metadata["supporting"]}
        for split, of in splits.items()
    }
    assert sum(map(len, pages.values())) == len(set().union(*pages.values()))
    gold = {identifier for of in splits.values() for q in of for identifier in q.metadata["supporting"]}
    assert 2 * len(gold) <= len(corpus)
    assert all(question.metadata["split"] == split for split, of in splits.items() for question in of)


def test_no_question_is_asked_twice():
    questions = [question for name in SETS for question in everything(name)]
    assert Counter(normalize_answer(question.text) for question in questions).most_common(1)[0][1] == 1
    assert len({question.id for question in questions}) == len(questions)


@pytest.mark.parametrize("name", SETS)
def test_answers_are_sound(name):
    hops = {"nq_mini": (1, "any"), "hotpot_mini": (2, "all")}[name]
    for question in everything(name):
        answers = question.golden_answers
        assert not is_exploded(answers)
        assert not any(answer.startswith(("['", '["')) for answer in answers)  # a list written as text
        assert all(map(normalize_answer, answers))
        assert min(len(normalize_answer(answer).split()) for answer in answers) <= 5
        assert len(question.metadata["supporting"]) == len(set(question.metadata["supporting"])) == hops[0]
        assert (question.metadata["hops"], question.metadata["supporting_mode"]) == hops


@pytest.mark.parametrize("name", SETS)
def test_groups_tell_answers_that_occur_in_training(name):
    trained_on = {normalize_answer(answer) for question in load(name, "train") for answer in question.golden_answers}
    assert {question.metadata["dataset"] for question in load(name, "train")} == {name}
    for split in ("dev", "test"):
        groups = Counter(question.metadata["dataset"] for question in load(name, split))
        assert groups.keys() == {f"{name}/seen_answers", f"{name}/new_answers"}
        assert min(groups.values()) >= 20
        for question in load(name, split):
            seen = any(normalize_answer(answer) in trained_on for answer in question.golden_answers)
            assert question.metadata["answer_in_training"] is seen
            assert question.metadata["dataset"].endswith("/seen_answers") is seen


@pytest.mark.parametrize("name", SETS)
def test_passages_are_short_and_titled(name):
    for passage in load(name).corpus:
        assert passage.title.startswith('"')
        assert passage.title.endswith('"')
        assert passage.text.strip()
        assert len(passage.contents) <= 2000


def test_published_evaluation_questions_of_nq_are_left_alone():
    assert {question.metadata["published_split"] for question in everything("nq_mini")} == {"train"}


@pytest.mark.parametrize("name", SETS)
def test_bm25_finds_what_the_notice_says(name):
    dataset = load(name)
    found = hits(dataset, RETRIEVERS.build({"name": "bm25"}, corpus=dataset.corpus))
    here, there = HITS[name]
    assert tuple(found.values()) == pytest.approx(here, abs=0.0006)
    assert all(of_mini - of_source <= 0.1 for of_mini, of_source in zip(here, there, strict=True))


# --- use -------------------------------------------------------------------------------------------------------------


def test_an_environment_answers_from_the_passages():
    env = gymnasium.make("AgenticRAG-v0", dataset={"name": "nq_mini", "split": "test"}, prompt="search_r1", top_k=3)
    question = load("nq_mini")[0]
    prompt, _ = env.reset(options={"question_index": 0})
    assert question.text in prompt
    _, _, _, _, info = env.step(f"<search>{question.text}</search>")
    assert question.metadata["supporting"][0] in [passage.id for passage in info["passages"]]
    _, reward, terminated, _, _ = env.step(f"<answer>{question.golden_answers[0]}</answer>")
    assert (reward, terminated) == (1.0, True)


def test_a_larger_sample_contains_the_smaller():
    small, large = (load("nq_mini", num_questions=count, seed=3) for count in (20, 50))
    assert (len(small), len(large)) == (20, 50)
    assert {question.id for question in small} < {question.id for question in large}
    assert small.corpus is large.corpus


def test_what_there_is_not():
    with pytest.raises(
        ConfigurationError, match=r"split must be one of train, dev, test, got 'tset'. Did you mean 'test'\?"
    ):
        load("nq_mini", "tset")
    with pytest.raises(ConfigurationError, match=r"in \[1, 879\], as many as split 'test' of nq_mini has, .* got 881"):
        load("nq_mini", num_questions=881)


# --- how they are made -----------------------------------------------------------------------------------------------


def passage(number: int, text: str = "", title: str | None = None) -> Passage:
    return Passage(f"p{number}", f'"{title or f"Page {number}"}"\nfact {number} is answer{number}. {text}')


def question(number: int, *gold: int, text: str | None = None, answers: tuple[str, ...] = ()) -> Question:
    metadata = {"split": "train", "supporting": [f"p{n}" for n in gold], "hops": len(gold), "source_id": str(number)}
    return Question(f"q{number:03}", text or f"what is fact {number}", answers or (f"answer{number}",), metadata)


def test_which_questions_are_usable():
    passages = {p.id: p for p in map(passage, range(9))}
    kept = [
        question(0, 0),
        question(1, 1, answers=("a b c d e f", "answer1")),
        question(2, 2, 3, answers=("yes",)),
        question(3, 3, answers=("The", "Answer3!")),
    ]
    left_out = [
        question(4, 4, answers=("not there",)),
        question(5, 5, answers=("fact 5 is answer5 and so on",)),
        question(6, 99),
        question(7, 7, text="What is THIS?"),
        question(8, 8, text="what is this"),
        question(9, 0, answers=("the",)),
    ]
    found = usable([*left_out, *reversed(kept)], passages)
    assert [q.id for q in found] == ["q000", "q001", "q002", "q003"]
    assert found[3].golden_answers == ("Answer3!",)


def test_pages_that_questions_tie_together_stay_together():
    """0-1, 1-2, ..., 38-39 is one chain; 40 to 99 stand alone, the title of 99 differs from that of 40 by case only."""
    gold = {f"p{n}": passage(n, title="PAGE 40" if n == 99 else None) for n in range(100)}
    chain = [question(n, n, n + 1) for n in range(39)]
    single = [question(n, n) for n in range(40, 100)]
    splits = split_by_page([*chain, *single], gold)
    where = {q.id: split for split, of in splits.items() for q in of}
    assert len(where) == 99
    assert len({where[q.id] for q in chain}) == 1
    assert where["q040"] == where["q099"]
    assert all(splits.values())
    reordered = split_by_page([*reversed(single), *reversed(chain)], gold)
    assert {q.id: split for split, of in reordered.items() for q in of} == where


def source() -> tuple[list[Question], list[Passage]]:
    """Forty questions; passages 0 to 39 are gold, 40 to 79 look much like them, and 80 to 199 are about the weather."""
    near = [Passage(f"p{n}", f'"Near {n}"\nfact {n - 40} is unknown.') for n in range(40, 80)]
    far = [Passage(f"p{n}", f'"Far {n}"\nweather report number{n}.') for n in range(80, 200)]
    return [question(n, n) for n in range(40)], [*far, *near, *map(passage, range(40))]


def test_distractors_are_the_nearest_passages():
    pytest.importorskip("Stemmer")
    questions, passages = source()
    drawn = draw("made_up", questions, passages, 80)
    assert {p.id for p in drawn.corpus} == {f"p{n}" for n in range(80)}
    assert drawn.num_gold == 40
    assert [p.title for p in drawn.corpus] == sorted(p.title for p in drawn.corpus)
    assert {p.score for p in drawn.corpus} == {0.0}
    assert sum(map(len, drawn.splits.values())) == 40
    for of in drawn.splits["test"]:
        assert of.metadata["dataset"] == "made_up"
        assert of.metadata["answer_in_training"] is False
        assert of.metadata["published_split"] == "train"


def test_a_corpus_that_is_too_small():
    pytest.importorskip("Stemmer")
    questions, passages = source()
    with pytest.raises(DataError, match="made_up: 40 gold passages are more than half of 79; draw more passages"):
        draw("made_up", questions, passages, 79)
    with pytest.raises(DataError, match=r"140 distractors are wanted, but only 40 are near a question"):
        draw("made_up", questions, passages, 180)


def test_the_same_sources_give_the_same_bytes(tmp_path):
    """In processes that hash strings differently."""
    pytest.importorskip("Stemmer")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path;"
        "import test_mini as t; t.write(t.draw('made_up', *t.source(), 80), Path(sys.argv[1]))"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], check=True, env=environment)
    names = sorted(file.name for file in (tmp_path / "1").iterdir())
    assert names == sorted(f"{stem}{ENDING}" for stem in ("corpus", *SPLITS))
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in names)


def test_files_say_what_was_drawn(tmp_path):
    pytest.importorskip("Stemmer")
    drawn = draw("made_up", *source(), 80)
    size = write(drawn, tmp_path / "made_up")
    assert size == sum(file.stat().st_size for file in (tmp_path / "made_up").iterdir())
    rows = [row for _, row in read_rows(tmp_path / "made_up" / f"test{ENDING}")]
    assert [row["id"] for row in rows] == [q.id for q in drawn.splits["test"]]
    assert rows[0]["metadata"] == json.loads(json.dumps(drawn.splits["test"][0].metadata))


def test_a_missing_source_is_named(tmp_path, capsys):
    assert main([str(tmp_path), "--out", str(tmp_path)]) == 2
    assert str(tmp_path / "nq" / "corpus.jsonl.gz") in capsys.readouterr().err


@pytest.mark.nightly
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the benchmark samples in ../shared/data")
def test_the_files_are_those_that_the_sources_give(tmp_path, capsys):
    """The rows, as another zstd library may compress them to other bytes; and the table, with the figures above."""
    pytest.importorskip("Stemmer")
    assert main([str(DATA), "--out", str(tmp_path)]) == 0
    for file in sorted(FOLDER.glob(f"*/*{ENDING}")):
        made = tmp_path / file.parent.name / file.name
        assert [row for _, row in read_rows(made)] == [row for _, row in read_rows(file)]
    table = capsys.readouterr().out
    for (one, three), (one_of_all, three_of_all) in HITS.values():
        assert f"{one:.3f} ({one_of_all:.3f}) │ {three:.3f} ({three_of_all:.3f})" in table
