"""Public benchmark data, where it lies beside the repository: it loads, and search finds what others found in it."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import pytest

from agentic_rag_env import DATASETS, RETRIEVERS, Passage, Question, QuestionSet, normalize_answer
from agentic_rag_env.corpus import read_rows
from agentic_rag_env.datasets.rows import collect

DATA = Path(__file__).parents[2].parent / "shared" / "data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs the benchmark samples in ../shared/data")


def load(name: str, file: str = "dev.jsonl", corpus: str = "corpus.jsonl.gz", **settings: object) -> QuestionSet:
    folder = DATA / name
    return DATASETS.build(
        {"name": "jsonl", "questions": str(folder / file), "corpus": str(folder / corpus), **settings}
    )


SMALL = {"name": "hipporag_hotpot_train100", "file": "train.jsonl", "corpus": "corpus.jsonl"}


def hit_and_recall(questions: QuestionSet, found: list[list[Passage]]) -> tuple[float, float]:
    """Share of questions with an answer, word for word, among the passages, and mean share of gold passages found."""
    hits, recalls = [], []
    for question, passages in zip(questions, found, strict=True):
        gold = set(question.metadata["supporting"])
        share = len(gold & {passage.id for passage in passages}) / len(gold)
        recalls.append(float(share > 0) if question.metadata.get("supporting_mode") == "any" else share)
        answers = [normalize_answer(answer) for answer in question.golden_answers]
        if not set(answers) <= {"yes", "no"}:
            text = " | ".join(normalize_answer(passage.contents) for passage in passages)
            hits.append(any(f" {answer} " in f" {text} " for answer in answers))
    return sum(hits) / len(hits), sum(recalls) / len(recalls)


#: Questions, and hit@3 and recall@3 of BM25 over stems, without stop words, as published with the data. Of sets of more
#: than 500 questions, 500 were drawn by a rule that was not published.
REFERENCE = {
    "squad/dev": (8367, 0.880, 0.860),
    "hipporag_2wiki/test": (804, 0.503, 0.634),
    "hotpotqa_1k/dev": (805, 0.609, 0.648),
    "musique_498/dev": (414, 0.244, 0.319),
    "hipporag_hotpot_train100/train": (87, 0.575, 0.713),
    "hipporag_musique_train100/train": (77, 0.312, 0.414),
    "popqa_1k/test": (799, 0.724, 0.738),
    "nq/dev": (2415, 0.816, 0.668),
    "2wiki/dev": (1363, 0.471, 0.616),
    "hotpotqa/dev": (1851, 0.617, 0.653),
    "musique/dev": (1136, 0.248, 0.367),
}
WHOLE = [name for name, (size, *_) in REFERENCE.items() if size <= 500]
SAMPLED = [name for name in REFERENCE if name not in WHOLE]


def bm25_over_stems(name: str) -> tuple[float, float]:
    """Hit@3 and recall@3 over all questions of a set."""
    folder, _, split = name.partition("/")
    compressed = (DATA / folder / "corpus.jsonl.gz").is_file()
    questions = load(folder, f"{split}.jsonl", "corpus.jsonl.gz" if compressed else "corpus.jsonl")
    assert len(questions) == REFERENCE[name][0]
    bm25 = RETRIEVERS.build({"name": "bm25", "stemmer": "english", "stopwords": "english"}, corpus=questions.corpus)
    return hit_and_recall(questions, bm25.search([question.text for question in questions], 3))


@pytest.mark.parametrize("name", WHOLE)
def test_bm25_equals_the_reference(name: str) -> None:
    pytest.importorskip("Stemmer")
    assert bm25_over_stems(name) == pytest.approx(REFERENCE[name][1:], abs=0.001)


@pytest.mark.nightly
@pytest.mark.parametrize("name", SAMPLED)
def test_bm25_equals_the_reference_but_for_its_sample(name: str) -> None:
    """Within two standard errors of a share among 500 of the set's questions, drawn without repetition."""
    pytest.importorskip("Stemmer")
    size, hit, _ = REFERENCE[name]
    error = (hit * (1 - hit) / 500 * (1 - 500 / size)) ** 0.5
    assert bm25_over_stems(name)[0] == pytest.approx(hit, abs=2 * error)


def test_dense_search_without_a_model_is_as_good_as_bm25() -> None:
    questions = load(**SMALL)
    texts = [question.text for question in questions]
    dense, lexical = (
        hit_and_recall(questions, RETRIEVERS.build(name, corpus=questions.corpus).search(texts, 3))
        for name in ("dense", "bm25")
    )
    assert dense == pytest.approx(lexical, abs=0.1)


@pytest.mark.parametrize(
    ("name", "num_questions", "num_passages"),
    [("musique", 1136, 12_971), ("hotpotqa_1k", 805, 9_827), ("2wiki", 1363, 9_468)],
)
def test_questions_and_gold_passages_are_complete(name: str, num_questions: int, num_passages: int) -> None:
    questions = load(name)
    assert questions.corpus is not None
    assert (len(questions), len(questions.corpus)) == (num_questions, num_passages)
    assert (questions.name, questions[0].metadata["dataset"]) == (name, name)
    known = {passage.id for passage in questions.corpus}
    assert all(set(question.metadata["supporting"]) <= known for question in questions)
    assert all(passage.title.startswith('"') and passage.title.endswith('"') for passage in questions.corpus)
    assert sum(len(load(name, split=split)) for split in ("train", "dev", "test")) == num_questions
    assert load(name, split="train").corpus is load(name, split="test").corpus


def test_aliases_are_accepted() -> None:
    questions = load("musique")
    with_aliases = [question for question in questions if len(question.golden_answers) > 1]
    assert len(with_aliases) == 299


@pytest.mark.parametrize(
    "file",
    sorted(set(DATA.glob("*/*.jsonl")) - set(DATA.glob("*/corpus.jsonl"))),
    ids=lambda file: f"{file.parent.name}/{file.stem}",
)
def test_every_file_is_readable(file: Path) -> None:
    questions = DATASETS.build({"name": "jsonl", "questions": str(file)})
    assert all(isinstance(question, Question) and question.golden_answers for question in questions)


def test_presets_read_the_samples(caplog: pytest.LogCaptureFixture) -> None:
    settings = {"name": "benchmark", "subset": "nq", "path": str(DATA), "splits": {"dev": "train", "test": "dev"}}
    train, dev, test = (DATASETS.build({**settings, "split": split}) for split in ("train", "dev", "test"))
    assert (len(train) + len(dev), len(test)) == (5709, 2415)
    assert not caplog.records
    DATASETS.build({**settings, "split": "test", "sizes": {"dev": 8757}})
    assert "has 2415 questions, but the published split dev of nq has 8757" in caplog.text


def test_exploded_answers_of_nq(caplog: pytest.LogCaptureFixture) -> None:
    file = DATA / "nq_open" / "train.jsonl"
    questions = collect(read_rows(file), str(file), "nq_open", "train")
    assert len(questions) == 6950 - 124
    assert "left out 124 questions" in caplog.text
    assert not any(len(q.golden_answers) > 2 and max(map(len, q.golden_answers)) == 1 for q in questions)


def test_an_episode() -> None:
    questions = load(**SMALL)
    env = gymnasium.make("AgenticRAG-v0", dataset=questions, retriever="bm25")
    prompt, _ = env.reset(seed=0, options={"question_index": 0})
    question = questions[0]
    assert question.text in prompt
    observation, _, _, _, info = env.step(f"<search> {question.text} </search>")
    assert "<information>Doc 1(Title: " in observation
    assert len(info["passages"]) == 3
    _, reward, terminated, _, _ = env.step(f"<answer> {question.golden_answers[-1]} </answer>")
    assert (reward, terminated) == (1.0, True)
