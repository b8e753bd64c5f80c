"""Looking at trajectories: what is read, what is shown, and that nothing in a transcript can act."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from agentic_rag_env.errors import ConfigurationError, DataError
from agentic_rag_env.prompts import MALFORMED_HINT, format_passages, information_block
from agentic_rag_env.types import Passage
from algorithms import show as command
from algorithms.analysis.viewer.episodes import Turn, find_answers
from algorithms.analysis.viewer.gallery import Gallery, Item, Wanted, gather
from algorithms.analysis.viewer.page import contents, inert, page
from algorithms.analysis.viewer.shading import no_split, scales, split, splitters
from algorithms.analysis.viewer.terminal import Printer, page_through
from algorithms.assets import ASSETS

CONFIG = "algo: {name: dgpo}\nseed: %d\nmodel: {policy: tiny-student}\n"
EVIL = '</script><script>alert(1)</script><img src=x onerror="alert(2)"> <!-- & \u2028 \x1b[31m'


# --- hand-made runs --------------------------------------------------------------------------------------------------


def turn(action: str, text: str, searches: int, **changes) -> dict:
    """A turn of three tokens, as files hold it."""
    info = {
        "question_id": "q", "turn": 1, "action": action, "query": None, "passages": [], "answer": None,
        "exact_match": 0.0, "f1": 0.0, "num_searches": searches, "correct": False, "error": None,
    } | changes.pop("info", {})  # fmt: skip
    return {
        "action": text, "observation": "", "action_ids": [1, 2, 3], "action_logprobs": [-0.5, -1.0, -5.0],
        "observation_ids": [], "info": info, **changes,
    }  # fmt: skip


def searched(query: str, *passages: Passage) -> dict:
    found = [{"id": passage.id, "contents": passage.contents, "score": passage.score} for passage in passages]
    return turn(
        "search",
        f"<think>hm</think><search>{query}</search>",
        1,
        info={"query": query, "passages": found},
        observation=information_block(format_passages(passages)),
    )


def answered(text: str, searches: int, correct: bool) -> dict:
    return turn("answer", f"<answer>{text}</answer>", searches, info={"answer": text, "f1": 0.25, "correct": correct})


def malformed(text: str = "hello") -> dict:
    return turn("malformed", text, 0, observation=MALFORMED_HINT)


def row(name: str, *turns: dict, question: dict | None = None, correct: bool = False) -> dict:
    whole = {
        "question_id": name, "correct": correct, "reward": float(correct), "terminated": True, "truncated": False,
        "source": "policy", "group_id": 0, "prompt": f"Read this. Question: Who is {name}?\n", "prompt_ids": [1],
        "turns": list(turns),
    }  # fmt: skip
    return whole | ({"question": question} if question else {})


def known(text: str, *golden: str, dataset: str | None = None, hops: int | None = None) -> dict:
    return {"text": text, "golden_answers": list(golden), "dataset": dataset, "hops": hops}


PARIS = Passage("p1", "Paris\nThe Paris of today, in France.", 2.5)
ROWS = [
    row("a", searched("capital", PARIS), answered("Paris", 1, True), correct=True,
        question=known("Capital of France?", "Paris", dataset="single_hop", hops=1)),
    row("b", malformed(), answered("Rome", 0, False), question=known("River?", "Seine", dataset="multi_hop", hops=2)),
    row("c", searched("nothing"), turn("search", "<search>more</search>", 1, info={"query": "more"}),
        question=known("Who?", "X", dataset="multi_hop", hops=3)),
]  # fmt: skip


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def make(folder: Path, files: dict[str, list[dict]], seed: int = 0, finished: bool = True) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(CONFIG % seed)
    for name, rows in files.items():
        write(folder / "trajectories" / f"{name}.jsonl.gz", rows)
    if finished:
        greedy = {"greedy": {"all": {"n": 3}}, "T=1": {"all": {"n": 3}}}
        summary = {
            "algo": "dgpo",
            "seed": seed,
            "stages": [{"name": "dgpo"}],
            "evaluation": {"raw": greedy, "dgpo": greedy},
        }
        summary["config"] = {"model": {"policy": "tiny-student"}}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def run(tmp_path):
    """A finished run; the rows of its training sample know advantages and KL."""
    trained = row("a", answered("Paris", 0, True), correct=True, question=known("Capital of France?", "Paris"))
    trained["turns"][0] |= {"advantages": [1.0, 0.0, -2.0], "teacher_kl": [0.0, 0.5, float("inf")]}
    return make(
        tmp_path / "run",
        {
            "test-dgpo-greedy": ROWS,
            "test-dgpo-T=1": ROWS[:1],
            "test-raw-greedy": ROWS[1:],
            "dev-000010": ROWS[:2],
            "train-000010": [trained],
        },
    )


def names(gallery: Gallery) -> list[tuple[str, str]]:
    return [(item.place, item.first.question_id) for item in gallery.items]


def printed(run: Path, *arguments: str, width: int = 100) -> str:
    terminal = Console(file=io.StringIO(), width=width)
    command.show(command.parser().parse_args([str(run), *arguments]), terminal)
    return terminal.file.getvalue()


# --- what is read ----------------------------------------------------------------------------------------------------


def test_an_episode_is_read_as_a_person_would(run):
    right, wrong, unanswered = (item.first for item in gather([run], Wanted(models=["dgpo"])).items)
    assert (right.question, right.golden_answers, right.group, right.hops) == (
        "Capital of France?", ("Paris",), "single_hop", 1,
    )  # fmt: skip
    assert [episode.verdict for episode in (right, wrong, unanswered)] == ["right", "wrong", "no answer"]
    assert (right.num_searches, right.num_tokens, right.num_malformed, wrong.num_malformed) == (1, 6, 0, 1)
    search, answer = right.turns
    assert (search.query, search.passages, search.problem) == ("capital", (PARIS,), None)
    assert search.reply is None  # the model read the passages, which are shown
    assert (wrong.turns[0].problem, wrong.turns[0].reply) == ("neither </search> nor </answer>", MALFORMED_HINT)
    assert [each.problem for each in unanswered.turns] == ["nothing found", "not executed, no turn was left"]
    assert answer.figures == {"logprobs": [-0.5, -1.0, -5.0]}


def test_what_the_model_read_is_shown_where_it_is_not_just_the_passages(tmp_path):
    cut = searched("capital", PARIS) | {"observation": information_block("Doc 1(Title: Par")}
    failed = turn("search", "<search>x</search>", 0, info={"query": "x", "error": "server gone"})
    folder = make(tmp_path / "run", {"test-dgpo-greedy": [row("a", cut, failed, question=known("?", "x"))]})
    (item,) = gather([folder], Wanted()).items
    assert item.first.turns[0].reply == information_block("Doc 1(Title: Par")
    assert (item.first.verdict, item.first.ending) == ("search failed", "search_failed")
    assert item.first.turns[1].problem == "the search failed: server gone"


def test_rows_without_their_question_take_the_answers_from_the_predictions(tmp_path):
    folder = make(tmp_path / "run", {"test-dgpo-greedy": [row("a", malformed()), row("b", malformed())]})
    (folder / "predictions").mkdir()
    line = {"question_id": "a", "golden_answers": ["Ann"], "dataset": "nq", "correct": False}
    (folder / "predictions" / "test-dgpo-greedy.jsonl").write_text(json.dumps(line) + "\n")
    first, second = (item.first for item in gather([folder], Wanted()).items)
    assert (first.question, first.golden_answers, first.group) == ("Who is a?", ("Ann",), "nq")
    assert (second.golden_answers, second.group) == ((), None)


@pytest.mark.parametrize(
    ("text", "golden", "found"),
    [
        ("Paris, paris, Parisian", ["Paris"], ["Paris", "paris"]),
        ("He read The  Great\nGatsby.", ["Great Gatsby"], ["Great\nGatsby"]),
        ("J. R. R. Tolkien, J.R.R. Tolkien", ["JRR Tolkien"], ["J.R.R. Tolkien"]),
        ("life of a king", ["life of king", "life"], ["life of a king"]),
        ("1990s and 1990", ["1990"], ["1990"]),
        ("東町 is a town", ["東町"], ["東町"]),
        ("c++ (c) d", ["c++"], ["c", "c"]),
        ("anything", ["", "the", "."], []),
        ("anything", [], []),
    ],
)
def test_golden_answers_are_found_as_exact_match_compares(text, golden, found):
    assert [text[start:end] for start, end in find_answers(text, golden)] == found


# --- which files, which episodes -------------------------------------------------------------------------------------


def test_by_default_the_final_policy_and_the_samples_of_training(run):
    gallery = gather([run], Wanted())
    assert names(gallery) == [("test", "a"), ("test", "b"), ("test", "c"), ("train, step 10", "a")]
    assert [column.label() for column in gallery.columns] == ["dgpo, greedy"]
    assert contents(gallery, [no_split])["items"][-1]["players"] == ["in training"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"mode": "T=1"}, [("test", "a")]),
        ({"models": ["raw"]}, [("test", "b"), ("test", "c")]),
        ({"split": "train"}, [("train, step 10", "a")]),
        ({"split": "dev"}, [("dev, step 10", "a"), ("dev, step 10", "b")]),
        ({"step": 10}, [("dev, step 10", "a"), ("dev, step 10", "b"), ("train, step 10", "a")]),
        ({"step": 10, "split": "train"}, [("train, step 10", "a")]),
        ({"files": ["dev-*", "test-raw-greedy.jsonl.gz"]}, [("dev, step 10", "a"), ("dev, step 10", "b"),
                                                            ("test", "b"), ("test", "c")]),
    ],
)  # fmt: skip
def test_files_can_be_chosen(run, wanted, expected):
    assert sorted(names(gather([run], Wanted(**wanted)))) == sorted(expected)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"verdict": "right"}, "a"),
        ({"verdict": "wrong"}, "bcd"),
        ({"ending": "answered"}, "ab"),
        ({"ending": "out_of_turns"}, "d"),
        ({"group": "multi_hop"}, "bc"),
        ({"group": "3"}, "c"),
        ({"malformed": True}, "bd"),
        ({"searches": 0}, "bd"),
        ({"searches": 1}, "ac"),
        ({"text": "SEINE"}, "b"),
        ({"text": "capital</search>"}, "a"),
        ({"verdict": "right", "searches": 0}, ""),
    ],
)
def test_episodes_can_be_filtered(tmp_path, wanted, expected):
    ran_out = row("d", malformed() | {"info": malformed()["info"] | {"ending": "out_of_turns"}})
    run = make(tmp_path / "run", {"test-dgpo-greedy": [*ROWS, ran_out]})
    assert "".join(name for _, name in names(gather([run], Wanted(**wanted)))) == expected


def test_why_there_is_no_answer_stands_in_the_verdict_where_the_file_tells_it(tmp_path):
    endings = ("out_of_turns", "out_of_tokens", None)
    rows = [row(str(e), malformed() | {"info": malformed()["info"] | {"ending": e}}) for e in endings]
    folder = make(tmp_path / "run", {"test-dgpo-greedy": [*rows, row("old", malformed())]})
    gallery = gather([folder], Wanted())
    verdicts = ["out of turns", "out of tokens", "no answer", "no answer"]
    assert [item.first.verdict for item in gallery.items] == verdicts
    shown = contents(gallery, [no_split])["items"]
    assert [item["episodes"][0]["ending"] for item in shown] == ["out_of_turns", "out_of_tokens", None, None]
    assert "OUT OF TOKENS" in printed(folder, "--ending", "out_of_tokens", "--no-html")
    with pytest.raises(SystemExit):
        command.parser().parse_args([str(folder), "--ending", "bored"])


def test_models_of_a_run_stand_side_by_side(run):
    gallery = gather([run], Wanted(models=["dgpo", "raw"]))
    assert [column.label() for column in gallery.columns] == ["dgpo, greedy", "raw, greedy"]
    verdicts = {i.first.question_id: [e and e.verdict for e in i.episodes] for i in gallery.items}
    assert verdicts == {"a": ["right", None], "b": ["wrong", "wrong"], "c": ["no answer", "no answer"]}


def test_the_same_question_of_two_runs_stands_side_by_side(run, tmp_path):
    other = make(tmp_path / "other", {"test-dgpo-greedy": [ROWS[2], ROWS[0]], "train-000010": ROWS[:1]}, seed=1)
    gallery = gather([run, other], Wanted())
    assert [column.label() for column in gallery.columns] == [f"dgpo, seed {seed}: dgpo, greedy" for seed in (0, 1)]
    assert [column.label(10) for column in gallery.columns] == [f"dgpo, seed {seed}: in training" for seed in (0, 1)]
    assert [(i.first.question_id, [e is not None for e in i.episodes]) for i in gallery.items] == [
        ("a", [True, True]), ("b", [True, False]), ("c", [True, True]), ("a", [True, True]),
    ]  # fmt: skip


def test_a_question_played_twice_in_a_file_is_two_items(tmp_path):
    folder = make(tmp_path / "run", {"train-000020": [ROWS[0], ROWS[0]]}, finished=False)
    gallery = gather([folder], Wanted())
    assert names(gallery) == [("train, step 20", "a")] * 2
    assert [column.label() for column in gallery.columns] == ["in training"]


def test_an_unfinished_run_shows_what_it_has(tmp_path):
    folder = make(tmp_path / "run", {"dev-000020": ROWS}, finished=False)
    assert names(gather([folder], Wanted())) == [("dev, step 20", name) for name in "abc"]


# --- errors ----------------------------------------------------------------------------------------------------------


def test_folders_that_hold_nothing_to_look_at(run, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigurationError, match="is no folder"):
        gather([tmp_path / "nowhere"], Wanted())
    with pytest.raises(ConfigurationError, match="holds no run"):
        gather([empty], Wanted())
    with pytest.raises(ConfigurationError, match=r"has no trajectories/\*\.jsonl\.gz yet"):
        gather([make(tmp_path / "bare", {})], Wanted())
    with pytest.raises(ConfigurationError, match="holds 2 runs; name the one"):
        gather([tmp_path], Wanted())
    with pytest.raises(ConfigurationError, match="nothing of that kind; there are: dev-000010, test-dgpo-T=1"):
        gather([run], Wanted(models=["ppo"]))


def test_damaged_files_are_named(run):
    file = run / "trajectories" / "test-dgpo-greedy.jsonl.gz"
    write(file, [ROWS[0], {"question_id": "b"}])
    with pytest.raises(DataError, match="line 2: no such row"):
        gather([run], Wanted())
    write(file, ROWS)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(DataError, match="not a whole gzip file"):
        gather([run], Wanted())
    short = json.loads(json.dumps(ROWS[0]))
    short["turns"][0]["action_logprobs"] = [0.0]
    write(file, [short])
    with pytest.raises(DataError, match="line 1: no such row"):
        gather([run], Wanted())


def changed(change) -> dict:
    """The first row with a change, as JSON holds it."""
    made = json.loads(json.dumps(ROWS[0]))
    change(made)
    return made


def set_info(name: str, value):
    return lambda made: made["turns"][0]["info"].update({name: value})


def set_turn(name: str, value):
    return lambda made: made["turns"][0].update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_turn("action_ids", [1, 2, -1]), r"action_ids must be integers from 0 to 4294967295, got \[1, 2, -1\]"),
        (set_turn("action_ids", [1, 2, 2**40]), "action_ids must be integers from 0 to"),
        (set_turn("action_ids", ["a", "b", "c"]), "action_ids must be integers from 0 to"),
        (set_turn("action_ids", [1, 2, True]), "action_ids must be integers from 0 to"),
        (set_turn("action_logprobs", [None, 0.0, 0.0]), r"action_logprobs must be numbers, got \[None, 0.0, 0.0\]"),
        (set_turn("action", None), "action must be str, got None"),
        (
            set_info("passages", [{"id": "p", "contents": "c", "score": "high"}]),
            "score must be int or float, got 'high'",
        ),
        (set_info("passages", [{"id": "p", "contents": None, "score": 1.0}]), "contents must be str, got None"),
        (set_info("query", ["a"]), r"query must be str or null, got \['a'\]"),
        (set_info("num_searches", None), "num_searches must be int, got None"),
        (lambda made: made.update(reward="much"), "reward must be int or float, got 'much'"),
        (lambda made: made["question"].update(golden_answers=None), "golden_answers must be list, got None"),
        (lambda made: made["question"].update(golden_answers="Paris"), "golden_answers must be list, got 'Paris'"),
        (lambda made: made["question"].update(text=7), "text must be str, got 7"),
        (lambda made: made.update(turns=[]), "IndexError"),
    ],
)
def test_rows_of_strangers_that_cannot_be_shown_are_named(run, change, message):
    write(run / "trajectories" / "test-dgpo-greedy.jsonl.gz", [ROWS[1], changed(change)])
    with pytest.raises(DataError, match=rf"test-dgpo-greedy\.jsonl\.gz, line 2: no such row .*{message}"):
        gather([run], Wanted())


@pytest.mark.parametrize("figure", [float("inf"), float("nan")])
def test_figures_that_are_not_finite_are_shown(run, figure):
    made = changed(lambda made: made.update(reward=figure))
    made["turns"][0]["info"]["passages"][0]["score"] = figure
    made["turns"][0]["teacher_kl"] = [figure] * 3
    write(run / "trajectories" / "test-dgpo-greedy.jsonl.gz", [made])
    shown = contents(gather([run], Wanted(split="test")), [no_split])
    (episode,) = shown["items"][0]["episodes"]
    assert (episode["reward"], episode["turns"][0]["passages"][0][1]) == (None, None)
    assert shown["figures"]["teacher_kl"]["full"] == 1.0, "the script looks up every figure that a turn has"
    assert f"reward {figure}" in printed(run, "--html", str(run / "page.html"))


def test_answers_that_are_numbers_and_turns_without_an_action_are_shown(run):
    made = changed(lambda made: made["question"].update(golden_answers=[42, "42.0"]))
    made["turns"][1]["info"] |= {"answer": 42, "action": None}
    write(run / "trajectories" / "test-dgpo-greedy.jsonl.gz", [made])
    said = printed(run, "--html", str(run / "page.html"))
    assert "Golden answer: 42 / 42.0" in said
    assert "answer: 42" in said
    assert "Turn 2\n" in said


def test_without_a_greedy_mode_the_first_mode_by_name_is_shown(tmp_path):
    run = make(tmp_path / "run", {f"test-dgpo-T=0.{number}": ROWS for number in range(1, 10)})
    assert [column.label() for column in gather([run], Wanted()).columns] == ["dgpo, T=0.1"]


def test_the_command_ends_with_a_message_and_no_traceback(run, tmp_path, capsys):
    for arguments in ([tmp_path / "nowhere"], [run, "--text", "no such words"]):
        with pytest.raises(SystemExit) as end:
            command.main(list(map(str, arguments)))
        assert end.value.code == 1
        assert capsys.readouterr().err.startswith("ConfigurationError: ")
    with pytest.raises(SystemExit) as end:
        command.main([str(run), "--num", "-1"])
    assert end.value.code == 2


# --- tokens and their colours ----------------------------------------------------------------------------------------


def of_tokens(text: str, ids: list[int]) -> Turn:
    return Turn(text, ids, {"logprobs": [-1.0] * len(ids)}, "malformed", None, (), None, None)


def test_the_text_of_a_turn_is_split_into_that_of_its_tokens():
    words = {1: "<search>", 2: " Ana", 3: "</search>"}
    assert split(of_tokens("<search> Ana</search>", [1, 2, 3]), lambda ids: "".join(map(words.get, ids))) == [
        "<search>", " Ana", "</search>",
    ]  # fmt: skip


def test_a_character_of_several_tokens_stands_with_the_last():
    pieces = {1: b"a", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b"b"}

    def decode(ids):
        return b"".join(pieces[each] for each in ids).decode(errors="replace")

    assert split(of_tokens("aéb", [1, 2, 3, 4]), decode) == ["a", "", "é", "b"]
    assert split(of_tokens("a�", [1, 2]), decode) == ["a", "�"]  # cut off in the middle
    assert split(of_tokens("something else", [1, 4]), decode) is None


def test_a_run_is_split_by_the_tokenizer_of_its_model(tmp_path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(ASSETS / "tiny-student" / "tokenizer.json"))
    text = "<search> founder of Pogimi</search>"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    written = malformed(text) | {"action_ids": ids, "action_logprobs": [-0.1] * len(ids)}
    folder = make(tmp_path / "run", {"test-dgpo-greedy": [row("a", written)]})
    gallery = gather([folder], Wanted())
    (by_column,), problems = splitters(gallery)
    parts = by_column(gallery.items[0].first.turns[0])
    assert problems == []
    assert len(parts) == len(ids)
    assert "".join(parts) == text


def test_without_a_tokenizer_the_rest_is_shown(run):
    (run / "checkpoints" / "000010").mkdir(parents=True)
    (run / "checkpoints" / "000010" / "tokenizer.json").write_text("{}")
    gallery = gather([run], Wanted())
    (by_column,), (problem,) = splitters(gallery)
    assert "No colours per token" in problem
    assert by_column(gallery.items[0].first.turns[0]) is None
    data = contents(gallery, [by_column])
    assert data["items"][0]["episodes"][0]["turns"][1]["parts"] == ["<answer>Paris</answer>"]
    assert data["items"][0]["episodes"][0]["turns"][1]["figures"] == {}


def test_the_scale_of_a_colour_is_set_by_the_bulk_of_the_values(run):
    assert scales(gather([run], Wanted(models=["dgpo"]))) == {"logprobs": 5.0}
    full = scales(gather([run], Wanted(split="train")))
    assert full["advantages"] == 1.96
    assert full["teacher_kl"] == pytest.approx(0.49)  # of 0 and 0.5; infinity does not count


def test_figures_on_the_page_are_those_of_their_tokens(run):
    gallery = gather([run], Wanted(split="train"))
    data = contents(gallery, [lambda turn: ["<answer>", "Paris", "</answer>"]])
    (shown,) = data["items"][0]["episodes"][0]["turns"]
    assert shown["parts"] == ["<answer>", "Paris", "</answer>"]
    assert shown["figures"] == {
        "logprobs": [-0.5, -1.0, -5.0], "advantages": [1.0, 0.0, -2.0], "teacher_kl": [0.0, 0.5, None],
    }  # fmt: skip
    assert {name: figure["label"] for name, figure in data["figures"].items()} == {
        "logprobs": "log-probability", "advantages": "advantage", "teacher_kl": "KL to the teacher",
    }  # fmt: skip


# --- the page --------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """Every element of a page, and the text of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self._inside = False

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data


def test_nothing_in_a_transcript_becomes_markup(run, tmp_path):
    passage = Passage("p", f"{EVIL}\n{EVIL}", 1.0)
    turns = searched(EVIL, passage), malformed(EVIL), answered(EVIL, 1, False)
    rows = [row(EVIL, *turns, question=known(EVIL, EVIL, dataset=EVIL))]
    gallery = gather([make(tmp_path / "evil", {"test-dgpo-greedy": rows})], Wanted())
    found, plain = Elements(), Elements()
    found.feed(page(EVIL, gallery, [no_split], [EVIL]))
    plain.feed(page("title", gather([run], Wanted()), [no_split], ["note"]))
    assert found.seen == plain.seen
    assert [tag for tag, _ in found.seen].count("script") == 2
    assert json.loads(found.scripts[0]) == json.loads(json.dumps(contents(gallery, [no_split])))
    assert json.loads(found.scripts[0])["items"][0]["question"] == EVIL


def test_data_stays_data():
    text = inert([EVIL, "\ud800"])
    assert json.loads(text) == [EVIL, "\ud800"]
    assert not set(text) & set("<>&\u2028\x1b")
    assert text.isascii()


def test_the_page_needs_no_network_and_runs_its_own_script_only(run):
    written = page("title", gather([run], Wanted()), [no_split])
    found = Elements()
    found.feed(written)
    assert not {"src", "srcset", "action"} & {name for _, attrs in found.seen for name in attrs}
    assert not re.search(r"https?://|url\(|innerHTML =|insertAdjacentHTML|eval\(", written)
    (policy,) = (attrs["content"] for tag, attrs in found.seen if attrs.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(found.scripts[1].encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert "prefers-color-scheme: dark" in written


def test_what_the_script_looks_for_is_on_the_page(run):
    found = Elements()
    found.feed(page("title", gather([run], Wanted()), [no_split]))
    ids = {attrs["id"] for _, attrs in found.seen if "id" in attrs}
    script = found.scripts[1]
    asked = set(re.findall(r'\$\("(\w+)"\)|getElementById\("(\w+)"\)', script))
    assert {first or second for first, second in asked} <= ids
    labelled = [attrs["id"] for tag, attrs in found.seen if tag in ("select", "input")]
    assert [tag for tag, _ in found.seen].count("label") == len(labelled)


def test_a_text_stands_on_the_page_once_and_its_answers_are_marked(run):
    data = contents(gather([run], Wanted(files=["test-dgpo-greedy", "dev-*"])), [no_split])
    assert data["texts"].count(PARIS.contents) == 1
    assert data["texts"].count(MALFORMED_HINT) == 1
    index, score, places = data["items"][0]["episodes"][0]["turns"][0]["passages"][0]
    assert (data["texts"][index], score) == (PARIS.contents, 2.5)
    assert [PARIS.contents[start:end] for start, end in places] == ["Paris", "Paris"]


def test_the_page_is_capped_and_says_so(run, tmp_path):
    out = printed(run, "--limit", "2", "--num", "0")
    assert "Only the first 2 of 4 episodes are on the page; --limit 4" in out
    found = Elements()
    found.feed((run / "trajectories.html").read_text(encoding="utf-8"))
    assert len(json.loads(found.scripts[0])["items"]) == 2
    elsewhere = tmp_path / "new" / "page.html"
    assert "4 episodes written to" in printed(run, "--html", str(elsewhere), "--num", "0")
    assert elsewhere.is_file()


# --- the terminal ----------------------------------------------------------------------------------------------------


def test_without_a_terminal_the_first_episodes_are_printed(run):
    out = printed(run, "--no-html", "--num", "2")
    assert not (run / "trajectories.html").exists()
    for expected in (
        "1 of 4 · test · single_hop · 1 hop · a", "Question: Capital of France?", "Golden answer: Paris",
        "RIGHT · answer: Paris · F1 0.25 · reward 1 · 1 search · 6 tokens", "Turn 1 · SEARCH\n",
        "<think>hm</think><search>capital</search>", "1. Paris: The Paris of today, in France. (2.5)",
        "WRONG · answer: Rome", "1 malformed", "Turn 1 · MALFORMED · neither </search> nor </answer>",
        "read: My previous action is invalid.",
    ):  # fmt: skip
        assert expected in out
    assert "3 of 4" not in out
    assert "\x1b" not in out


def test_two_runs_in_the_terminal(run, tmp_path):
    other = make(tmp_path / "other", {"test-dgpo-greedy": ROWS[:1]}, seed=1)
    terminal = Console(file=io.StringIO(), width=100)
    given = command.parser().parse_args([str(run), str(other), "--no-html", "--num", "2", "--model", "dgpo"])
    command.show(given, terminal)
    first, second = terminal.file.getvalue().split("2 of 3")
    for heading in ("[dgpo, seed 0: dgpo, greedy]", "[dgpo, seed 1: dgpo, greedy]"):
        assert heading in first
        assert heading in second
    assert "not played" in second
    assert "not played" not in first


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    evil = "\x1b[2J[bold]x[/bold]"
    turns = searched(evil, Passage("p", f"{evil}\n{evil}", 1.0)), malformed(evil)
    folder = make(tmp_path / "run", {"test-dgpo-greedy": [row(evil, *turns, question=known(evil, evil))]})
    out = printed(folder, "--no-html")
    assert "\x1b" not in out
    assert r"\x1b[2J[bold]x[/bold]" in out


def test_tokens_are_shaded_by_the_figure_that_was_asked_for(run):
    gallery = gather([run], Wanted(split="train"))
    terminal = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor")
    Printer(gallery, terminal, "advantages", [lambda turn: ["<answer>", "Paris", "</answer>"]]).item(0)
    blue = [round(255 + (1 / 1.96) * (to - 255)) for to in (86, 180, 233)]
    out = terminal.file.getvalue()
    assert f"\x1b[30;48;2;{';'.join(map(str, blue))}m<answer>\x1b[0m" in out
    assert "m<answer>\x1b[0mParis\x1b[30;48;2;213;94;0m</answer>\x1b[0m" in out


def typed(gallery: Gallery, *lines: str) -> list[str]:
    """Page through with some keys; the numbers of the items shown."""
    terminal, keys = Console(file=io.StringIO(), width=100), iter(lines)

    def read_line(prompt: str) -> str:
        try:
            return next(keys)
        except StopIteration:
            raise EOFError from None

    page_through(gallery, Printer(gallery, terminal), read_line)
    return re.findall(r"(\d+) of \d+ ·", terminal.file.getvalue())


@pytest.mark.parametrize(
    ("keys", "numbers"),
    [
        ([], "1"),
        (["n", "n", "p", "q", "n"], "1232"),
        (["", "", "", ""], "1234"),
        (["3", "9", "0"], "13"),
        (["3", "", "p", ""], "13432"),  # after a number Enter goes on
        (["w", "?", ""], "123"),
        (["p", "n"], "12"),
        (["m", "q"], "12"),
        (["w", "", "r"], "1234"),
        (["/Seine", "/seine"], "12"),
        (["?", "nonsense", "n"], "12"),
    ],
)
def test_keys_lead_through_the_episodes(run, keys, numbers):
    assert "".join(typed(gather([run], Wanted()), *keys)) == numbers


def test_it_starts_without_the_learner():
    """A look at trajectories is not worth importing torch, in a fresh process."""
    code = "import sys, algorithms.show; print({'torch', 'transformers', 'scipy', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_an_item_shows_the_first_column_that_played(run):
    episode = gather([run], Wanted()).items[0].first
    assert Item("test", None, (None, episode)).first is episode


# --- what a run writes -----------------------------------------------------------------------------------------------


def test_a_run_keeps_training_trajectories_with_figures_of_every_token(dgpo_run):
    gallery = gather([dgpo_run.path], Wanted(split="train"))
    assert {item.place for item in gallery.items} == {f"train, step {step}" for step in (2, 4, 6, 8, 10)}
    assert len(gallery.items) == 5 * 8
    (by_column,), problems = splitters(gallery)
    assert problems == []
    for item in gallery.items:
        assert item.first.golden_answers
        assert item.first.group in ("single_hop", "multi_hop")
        by_teacher = int(item.place.rpartition(" ")[2]) <= 6  # demonstrations, without advantages
        assert item.first.source == ("teacher" if by_teacher else "policy")
        for shown in item.first.turns:
            figures = {"logprobs", "teacher_kl"} | (set() if by_teacher else {"advantages"})
            assert set(shown.figures) == figures
            assert all(len(values) == len(shown.ids) for values in shown.figures.values())
            assert min(shown.figures["teacher_kl"]) > -1e-5
            assert "".join(by_column(shown)) == shown.text
