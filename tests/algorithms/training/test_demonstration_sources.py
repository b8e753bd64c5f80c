"""Demonstrations from a file, from the scripted expert, from a server: same environments, same reports."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_runs import SFT, TINY, command, train

from agentic_rag_env.errors import ConfigurationError, DataError, RetrieverError
from agentic_rag_env.probes.endpoints import EndpointError
from agentic_rag_env.registry import PLUGINS_VARIABLE
from agentic_rag_env.types import Question
from algorithms.learner.config import DemonstrationConfig, DemonstrationsConfig
from algorithms.rollout.tokenization import decode
from algorithms.rollout.trajectory_files import write_trajectories
from algorithms.training.build import Environments, Networks
from algorithms.training.demonstrations import DEMONSTRATION_SOURCES, cached, collect
from algorithms.training.demonstrations.expert import is_honest
from algorithms.training.demonstrations.source import Dialogue
from algorithms.training.model_names import resolve_model
from algorithms.training.settings import EvaluateConfig
from algorithms.training.typed import evaluate_config

ROOT = Path(__file__).parents[3]
PASSAGES = [
    ("p0", "Ada Park", "Ada Park lives in Riverton beside the mill."),
    ("p1", "Riverton", "Riverton lies on the Silver Lake in the north."),
    ("p2", "Bob Stone", "Bob Stone plays the harp every evening."),
    ("p3", "Carl Wood", "Carl Wood sells bread and keeps quiet."),
]
QUESTIONS = [
    ("one", "What does Bob Stone play", ["the harp", "harp"], ["p2"]),
    ("two", "Which water is near where Ada Park lives", ["Silver Lake"], ["p0", "p1"]),
    ("never", "What does Carl Wood sell", ["violins"], ["p3"]),
]
SEARCH = "<think> I look. </think><search> Bob Stone play </search>"
HARP = "<think> Found. </think><answer> harp </answer>"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three questions over four passages, one passage a search."""
    folder = tmp_path_factory.mktemp("world")
    rows = [
        {"id": name, "question": text, "golden_answers": answers, "metadata": {"supporting": gold, "hops": len(gold)}}
        for name, text, answers, gold in QUESTIONS
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = [{"id": name, "contents": f"{title}\n{text}"} for name, title, text in PASSAGES]
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    data = {"name": "jsonl", "questions": str(folder / "q.jsonl"), "corpus": str(folder / "c.jsonl"), "split": "all"}
    given = vars(EvaluateConfig()) | {"evaluation": {}, "num_envs": 4, "dataset": data, "env": {"top_k": 1}}
    config = evaluate_config(given, resolve_model("tiny-student"), {})
    config.dataset["split"] = "all"
    networks = Networks(config)
    return networks, Environments(config, networks.tokenizer).envs("all"), config.rollout


def source(world, **settings):
    return DEMONSTRATION_SOURCES.get(settings["source"]).factory(DemonstrationsConfig(**settings), *world)


def found_by(world, **settings):
    made = collect(source(world, **settings), 50, max_questions=50, filters=["correct", "well_formed"], seed=0)
    return {one.turns[-1].info["question_id"]: one for one in made.trajectories}, made.counts().get("dropped", {})


def test_ten_lines_by_hand_are_played_again_and_what_does_not_hold_is_counted(world, tmp_path):
    networks, envs, _ = world
    envs.reset(options={"question_index": 0})
    observation = envs.step([SEARCH] * 4)[0][0]
    lines = [
        {"question_id": "one", "turns": [SEARCH, HARP]},
        {"question": "what does bob stone PLAY?", "turns": [SEARCH, HARP]},
        {"question_id": "one", "turns": [{"action": SEARCH, "observation": observation}, {"action": HARP}]},
        {"question_id": "one", "turns": [{"action": SEARCH, "observation": "Doc 1: He plays it."}, HARP]},
        {"question_id": "one", "turns": [SEARCH]},
        {"question_id": "one", "turns": [SEARCH, "<answer> flute </answer>"]},
        {"question_id": "one", "turns": ["harp, surely", HARP]},
        {"question_id": "one", "turns": [HARP, HARP]},
        {"question_id": "two", "question": "Who?", "turns": [SEARCH, HARP]},
        {"question_id": "two", "question": "What does Bob Stone play?", "turns": [SEARCH, HARP]},
        {"question_id": "elsewhere", "turns": [HARP]},
        {"question": "Who?", "turns": [HARP]},
        {"question_id": "one", "turns": [SEARCH] * 6 + [HARP]},
    ]
    path = tmp_path / "by_hand.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = collect(source(world, source="file", path=str(path)), 50, max_questions=50, seed=0)
    counts = made.counts()
    assert {name: counts[name] for name in ("wanted", "found", "asked")} == {"wanted": 50, "found": 4, "asked": 10}
    assert counts["dropped"] == {
        "environment_differs": 2, "malformed": 1, "unfinished": 2, "unknown_question": 3, "wrong": 1,
    }  # fmt: skip
    for one in made.trajectories:
        assert one.correct
        assert one.reward == 1.0
        assert decode(networks.tokenizer, one.turns[0].action_ids.tolist()).endswith("</search>")
        assert [passage.id for passage in one.turns[0].info["passages"]] == ["p2"]


def with_failing_searches(world, allowed):
    """The world over a search that always fails, and the share of episodes that it may end."""
    networks, _, rollout = world
    config = dataclasses.replace(networks._config, max_retriever_error_fraction=allowed)
    config.retriever = {"name": "faulty", "retriever": config.retriever, "error_fraction": 1.0}
    networks = Networks(config)
    return networks, Environments(config, networks.tokenizer).envs("all"), rollout


def test_a_search_that_fails_is_no_fault_of_the_source_and_is_not_kept(world, tmp_path):
    failing = with_failing_searches(world, allowed=0.5)
    with pytest.raises(RetrieverError, match=r"more than max_retriever_error_fraction=0\.5 allows"):
        collect(source(failing, source="expert"), 50, max_questions=50, seed=0)
    failing = with_failing_searches(world, allowed=1.0)
    expert = source(failing, source="expert")

    def asked():
        return collect(expert, 50, max_questions=50, seed=0, parts=tmp_path / "parts")

    made = cached(tmp_path / "key.jsonl.gz", asked, failing[0].tokenizer)
    assert made.counts()["dropped"] == {"search_failed": 3}
    assert not list(tmp_path.rglob("*.jsonl.gz"))
    own = tmp_path / "run" / "key.jsonl.gz"
    cached(tmp_path / "key.jsonl.gz", asked, failing[0].tokenizer, if_searches_failed=own)
    assert list(tmp_path.rglob("*.jsonl.gz")) == [own], "the run that met the failure goes on with what it had"


def test_a_thought_that_the_policys_template_opens_is_not_opened_again(world):
    networks, envs, rollout = world
    networks = copy.copy(networks)
    networks.tokenizer = copy.deepcopy(networks.tokenizer)
    networks.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>"
    expert = source((networks, envs, rollout), source="expert")
    made = collect(expert, 50, max_questions=50, filters=["correct", "well_formed"], seed=0)
    assert {one.turns[-1].info["question_id"] for one in made.trajectories} == {"one", "two"}
    for one in made.trajectories:
        read = decode(networks.tokenizer, [*one.prompt_ids.tolist(), *one.turns[0].action_ids.tolist()])
        assert read.partition(one.prompt)[2].count("<think>") == 1
        later = [decode(networks.tokenizer, turn.action_ids.tolist()) for turn in one.turns[1:]]
        assert all(text.startswith("<think>") for text in later)


@pytest.mark.parametrize(
    ("template", "written", "behind"),
    [
        ("<think>", f"\n{SEARCH}", SEARCH),
        ("<think>", SEARCH.removeprefix("<think>"), SEARCH),
        ("<think>", "<search> Bob Stone play </search>", "<think></think><search> Bob Stone play </search>"),
        ("", SEARCH.removeprefix("<think>"), SEARCH),
        ("", "<search> Bob Stone play </search>", "<search> Bob Stone play </search>"),
    ],
)
def test_a_thought_is_opened_and_closed_once_whatever_the_template_opens(world, tmp_path, template, written, behind):
    networks, envs, rollout = world
    networks = copy.copy(networks)
    networks.tokenizer = copy.deepcopy(networks.tokenizer)
    networks.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}" + template
    path = tmp_path / "turns.jsonl"
    path.write_text(json.dumps({"question_id": "one", "turns": [written, HARP]}))
    found, _ = found_by((networks, envs, rollout), source="file", path=str(path))
    one = found["one"]
    read = decode(networks.tokenizer, [*one.prompt_ids.tolist(), *one.turns[0].action_ids.tolist()])
    assert read.partition(one.prompt)[2] == behind


def test_a_trajectory_file_of_ours_gives_back_the_ids_of_its_run(world, tmp_path):
    """Also where the end-of-text token ended an action, which stands as text in the file."""
    tokenizer = world[0].tokenizer
    (tmp_path / "by_hand.jsonl").write_text(json.dumps({"question_id": "one", "turns": ["harp, surely", HARP]}))
    settings = {"source": "file", "path": str(tmp_path / "by_hand.jsonl")}
    made = collect(source(world, **settings), 1, max_questions=1, filters=["correct"], seed=0)
    of_run = tmp_path / "of_run.jsonl.gz"
    write_trajectories(of_run, made.trajectories, tokenizer)
    again = collect(source(world, **settings | {"path": str(of_run)}), 1, max_questions=1, filters=["correct"], seed=0)
    ids = [[turn.action_ids.tolist() for turn in each.trajectories[0].turns] for each in (made, again)]
    assert ids[0] == ids[1]
    assert ids[0][0][-1] == tokenizer.eos_token_id


def test_half_of_a_surrogate_pair_in_a_file_is_a_clear_error(world, tmp_path):
    path = tmp_path / "by_hand.jsonl"
    path.write_text('{"question_id": "one", "turns": ["so \\ud83d"]}')
    with pytest.raises(DataError, match="line 1, turn 1: holds half of a surrogate pair"):
        source(world, source="file", path=str(path))


def test_the_environment_reads_what_the_tokens_say(world, tmp_path):
    """The bundled tokenizer composes accents, so an author's text may differ from what the student would write."""
    path = tmp_path / "by_hand.jsonl"
    path.write_text(
        json.dumps({"question_id": "one", "turns": [SEARCH, "<think> So. </think><answer> Zoe\u0308 </answer>"]})
    )
    made = collect(source(world, source="file", path=str(path)), 1, max_questions=1, filters=[], seed=0)
    assert made.trajectories[0].turns[-1].info["answer"] == "Zo\u00eb"


def test_the_layout_of_passages_is_no_evidence():
    seen = (
        "\n\n<information>Doc 1(Title: Ada Park) Ada lives here.\nDoc 2(Title: Riverton) By a lake.</information>\n\n"
    )
    dialogue = Dialogue(0, Question("q", "How many mills?", ("2",)), "", ["a"], [seen])
    for text in ("<answer> 2 </answer>", "<answer> Title </answer>", "<search> information </search>"):
        assert not is_honest(text, dialogue)
    assert is_honest("<answer> Riverton </answer>", dialogue)


def test_the_expert_goes_by_what_it_sees(world):
    found, dropped = found_by(world, source="expert")
    assert dropped == {"not_derivable": 1}
    assert set(found) == {"one", "two"}
    assert [turn.info["query"] or turn.info["answer"] for turn in found["one"].turns] == [QUESTIONS[0][1], "harp"]
    told = [turn.info["query"] or turn.info["answer"] for turn in found["two"].turns]
    assert told == [QUESTIONS[1][1], "Riverton", "Silver Lake"]


@pytest.mark.parametrize(
    ("text", "honest"),
    [
        ("<search> lake home </search>", True),
        ("<search> Riverton lake </search>", True),
        ("<search> Springfield lake </search>", False),
        ("<answer> Riverton </answer>", True),
        ("<answer> home </answer>", False),
        ("Riverton", False),
    ],
)
def test_nothing_may_be_said_that_was_not_visible(text, honest):
    dialogue = Dialogue(0, Question("q", "Which lake has the home?", ("x",)), "", ["a"], ["Ada lives in Riverton."])
    assert is_honest(text, dialogue) is honest


@pytest.fixture
def server():
    """A server that searches first and answers after the passage; each request is noted, the first one fails.

    What is put into `reply` takes the place of that part of its replies. `refused` holds statuses by words of prompts.
    """
    asked, keys, reply, refused = [], [], {}, {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            keys.append(self.headers["Authorization"])
            text = HARP if len(body["messages"]) > 1 else SEARCH + " and more"
            usage = {"prompt_tokens": 7, "completion_tokens": 3}
            content = json.dumps({"choices": [{"message": {"content": text}}], "usage": usage, **reply}).encode()
            status = 503 if len(asked) == 1 else 200
            for word, code in refused.items():
                if word in body["messages"][0]["content"]:
                    status, content = code, json.dumps({"error": {"code": "content_filter"}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{running.server_port}/v1"
    yield SimpleNamespace(url=url, asked=asked, keys=keys, reply=reply, refused=refused)
    running.shutdown()
    running.server_close()


def test_a_server_plays_over_several_turns_and_its_costs_are_told(world, server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    settings = {"source": "endpoint", "url": server.url, "model": "m", "api_key_variable": "MY_KEY"}
    made = collect(source(world, **settings), 50, max_questions=50, filters=["correct", "well_formed"], seed=0)
    counts = made.counts()
    assert [one.turns[-1].info["question_id"] for one in made.trajectories] == ["one"]
    assert counts["dropped"] == {"wrong": 2}
    assert counts["costs"].pop("seconds") > 0
    assert counts["costs"] == {"requests": 6, "prompt_tokens": 42, "completion_tokens": 18}
    assert set(server.keys) == {"Bearer secret"}
    assert "secret" not in json.dumps([counts, source(world, **settings).fingerprint])
    last = next(body["messages"] for body in server.asked if len(body["messages"]) > 1)
    assert [message["role"] for message in last] == ["user", "assistant", "user"]
    assert last[1]["content"] == SEARCH


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"finish_reason": "length", "message": {"content": None, "reasoning_content": "Well"}}, "cut_off"),
        ({"finish_reason": "length", "message": {"content": "<think> Let me"}}, "cut_off"),
        ({"finish_reason": "length", "message": {"content": HARP}}, "wrong"),
        ({"finish_reason": "stop", "message": {"content": " "}}, "no_text"),
    ],
)
def test_replies_without_an_action_are_told_apart_and_paid_once(world, server, choice, reason):
    server.reply.update(choices=[choice])
    found = source(world, source="endpoint", url=server.url, model="m")
    made = collect(found, 50, max_questions=50, seed=0)
    assert made.counts()["dropped"][reason] == (2 if reason == "wrong" else 3)
    assert made.costs["requests"] == 3


def test_a_request_that_is_refused_costs_one_episode(world, server):
    server.refused["Carl Wood"] = 400
    made = collect(source(world, source="endpoint", url=server.url, model="m"), 50, max_questions=50, seed=0)
    assert made.counts()["dropped"] == {"refused": 1, "wrong": 1}
    assert len(made.trajectories) == 1
    server.refused |= {"Bob Stone": 400, "water": 422}
    with pytest.raises(EndpointError, match=r"status 4\d\d: .*content_filter"):
        collect(source(world, source="endpoint", url=server.url, model="m"), 50, max_questions=50, seed=0)


def test_a_reply_is_complete_once_it_ends_an_action_of_the_environment(world, server):
    networks, envs, rollout = world

    class Calculator:
        metadata = envs.metadata | {"action_ends": ("</calc>",)}

        def __getattr__(self, name):
            return getattr(envs, name)

    server.reply.update(
        choices=[{"finish_reason": "length", "message": {"content": "<calc>3+4</calc>\n7\n and so on"}}]
    )
    author = source((networks, Calculator(), rollout), source="endpoint", url=server.url, model="m")
    dialogue = Dialogue(0, envs.dataset[0], "How many?")
    assert author.write([dialogue]) == ["<calc>3+4</calc>"]
    assert dialogue.dropped is None


def test_the_costs_of_all_attempts_are_told(world, server, tmp_path):
    """Two episodes at a time: the first attempt ends with the second portion, and the next one goes on there."""
    networks, _, rollout = world
    config = dataclasses.replace(networks._config, num_envs=2)
    pairs = networks, Environments(config, networks.tokenizer).envs("all"), rollout
    asking = {"max_questions": 50, "filters": [], "seed": 0, "parts": tmp_path}
    author = source(pairs, source="endpoint", url=server.url, model="m")
    author.write, write, calls = None, author.write, []

    def fails_later(dialogues):
        calls.append(len(dialogues))
        if len(calls) > 2:
            raise EndpointError("gone")
        return write(dialogues)

    author.write = fails_later
    with pytest.raises(EndpointError, match="gone"):
        collect(author, 50, **asking)
    made = collect(source(pairs, source="endpoint", url=server.url, model="m"), 50, **asking)
    assert made.num_asked == 3
    assert {name: made.costs[name] for name in ("requests", "prompt_tokens")} == {"requests": 6, "prompt_tokens": 42}


def test_both_ways_to_set_the_number_agree_or_are_refused():
    assert DemonstrationConfig(demonstrations=DemonstrationsConfig(num=7)).num_demonstrations == 7
    assert DemonstrationConfig(num_demonstrations=9).num_demonstrations == 9
    with pytest.raises(ConfigurationError, match=r"num_demonstrations=9 and demonstrations\.num=7 say different"):
        DemonstrationConfig(num_demonstrations=9, demonstrations=DemonstrationsConfig(num=7))
    with pytest.raises(ConfigurationError, match="filters must be a list of some of"):
        DemonstrationsConfig(filters=["right"])
    wrong_too = DemonstrationsConfig(filters=["well_formed"])
    with pytest.raises(
        ConfigurationError, match=r"filters=\['well_formed'\] keeps wrong answers, and correct_only=true"
    ):
        DemonstrationConfig(demonstrations=wrong_too)
    DemonstrationConfig(demonstrations=wrong_too, correct_only=False)


def test_without_a_teacher_a_run_learns_from_the_expert(tmp_path, cache):
    expert = ["model.teacher=null", "env.max_turns=3", "rollout.max_new_tokens=64"]
    run = train(tmp_path / "run", cache, "algo=sft", *SFT, *expert, "evaluation.temperatures=[0]")
    counts = run.summary["demonstrations"]["sft"]
    assert counts["found"] > 0
    assert f"sft: {counts['found']} demonstrations of 24 wanted" in run.out
    assert "Demonstrations come from the scripted expert" in run.out


def test_a_source_that_does_not_exist_or_lacks_something_says_so(tmp_path, cache):
    for settings, said in (
        (["algo.demonstrations.source=expret"], "Did you mean 'expert'?"),
        (["algo.demonstrations.source=file"], "needs demonstrations.path"),
        (
            ["algo.demonstrations.source=teacher", "model.teacher=null"],
            "model.teacher is null; name a model, or choose demonstrations.source=",
        ),
    ):
        run = command("algo=sft", *SFT, "num_envs=4", *settings, f"hydra.run.dir={tmp_path}/run", f"cache_dir={cache}")
        assert run.code == 1
        assert said in run.err


SCRIPT = '''
from agentic_rag_env.registry import REWARDS
from algorithms.training.demonstrations import DEMONSTRATION_SOURCES
from algorithms.training.demonstrations.expert import Expert
from algorithms.learner.config import DemonstrationsConfig


@REWARDS.register("of_a_script")
def of_a_script(outcome):
    return {reward}


@DEMONSTRATION_SOURCES.register("a_script", DemonstrationsConfig)
class Script(Expert):
    """The expert, with a thought of its own."""
'''


def test_demonstrations_of_a_plug_in_are_collected_again_when_its_code_changes(tmp_path):
    """As its author does it: edit the file, run again. What was kept belongs to the file as it was."""
    plugin, found = tmp_path / "script.py", []
    given = [*TINY, "algo=sft", *SFT, "reward=of_a_script", "algo.demonstrations.source=a_script", "model.teacher=null",
             "rollout.max_new_tokens=120", "rollout.max_tokens=1024"]  # fmt: skip
    for number, reward in enumerate((1.0, 2.0, 2.0)):
        plugin.write_text(SCRIPT.format(reward=reward))
        line = [sys.executable, "-m", "algorithms.run", *given, f"hydra.run.dir={tmp_path / str(number)}"]
        environment = {**os.environ, PLUGINS_VARIABLE: str(plugin)}
        done = subprocess.run(
            [*line, f"cache_dir={tmp_path / 'cache'}"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found.append(len(list((tmp_path / "cache" / "demonstrations").glob("*.jsonl.gz"))))
    assert found == [1, 2, 2]
