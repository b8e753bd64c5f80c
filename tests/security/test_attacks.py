"""Attacks on every reader of files and replies that may be a stranger's, with every kind of payload.

A reader plants a text in every place of its file that holds one, and lets the real commands read it. Whatever they
make of it, an error included, the canaries must be silent: no file beside the attacked folder has appeared or changed,
nobody has called the socket, the value of the variable stands nowhere, no raw escape sequence has reached the terminal
and no foreign tag a page.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import save

from agentic_rag_env import play
from agentic_rag_env.corpus import read_corpus
from agentic_rag_env.datasets.__main__ import main as check_dataset
from agentic_rag_env.errors import AgenticRAGError
from agentic_rag_env.probes.endpoints import Endpoint, EndpointConfig
from agentic_rag_env.registry import DATASETS, ENVS, RETRIEVERS
from agentic_rag_env.terminal import print_line
from agentic_rag_env.types import Question
from algorithms import compare, evaluate, export, merge, show
from algorithms.analysis.comparison import page as comparison_page
from algorithms.analysis.comparison import style
from algorithms.assets import ASSETS
from algorithms.launch.clear_errors import clear_errors
from algorithms.learner.config import DemonstrationsConfig
from algorithms.learner.networks import load_model, load_tokenizer
from algorithms.rollout.tokenization import encode_prompts
from algorithms.rollout.trajectory_files import read_trajectories
from algorithms.training import checkpoint
from algorithms.training.compose import composed
from algorithms.training.demonstrations.file import File
from algorithms.training.kept_files import read_kept
from algorithms.training.loggers.jsonl import truncate_metrics
from algorithms.training.protocol import with_protocol
from algorithms.training.run_files import read_settings, require_named
from algorithms.training.settings import EvaluateConfig
from algorithms.training.typed import evaluate_config

SECRET = "canary-5d1f0c"
ESCAPE = "\x1b[31m\x1b]0;owned\x07"
TAG = "<img src=x onerror=alert(1)>"


class Canaries:
    """What an attack would touch.

    Attributes:
        inside: The folder that the attacked command may read and write.
        file: Must never appear.
        address: Of a socket that nobody may call.
    """

    def __init__(self, root: Path, address: str) -> None:
        self.inside, self.outside, self.address = root / "in" / "side", root, address
        self.inside.mkdir(parents=True)
        self.file = root / "canary"
        (root / "precious").write_text("as it was")
        self.calls: list[Any] = []

    def require_silence(self, said: str, pages: str) -> None:
        around = sorted(path for path in self.outside.rglob("*") if self.inside not in (path, *path.parents))
        assert [path.name for path in around] == ["in", "precious"], "written outside"
        assert (self.outside / "precious").read_text() == "as it was"
        assert self.calls == [], "somebody called"
        written = [file for file in self.inside.rglob("*") if file.is_file() and file.stat().st_size < 1 << 20]
        assert not [file for file in written if SECRET.encode() in file.read_bytes()], "the variable was written"
        assert SECRET not in said
        assert "\x1b" not in said, "an escape sequence in the terminal"
        assert TAG not in pages, "a foreign tag in a page"


@pytest.fixture(scope="module")
def listener() -> Iterator[tuple[str, list[Any]]]:
    """A service that notes who calls."""
    calls: list[Any] = []
    server = socket.create_server(("127.0.0.1", 0))

    def listen() -> None:
        while True:
            try:
                caller, _ = server.accept()
            except OSError:
                return
            calls.append(caller)
            caller.close()

    threading.Thread(target=listen, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}", calls
    server.close()


@pytest.fixture
def canaries(tmp_path, listener, monkeypatch) -> Canaries:
    monkeypatch.setenv("CANARY", SECRET)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    picture = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01"
    for module in (style, comparison_page):
        monkeypatch.setattr(
            module, "render", lambda _, kinds, *rest, **more: dict.fromkeys(kinds, picture)
        )  # it takes seconds
    made = Canaries(tmp_path, listener[0])
    made.calls = listener[1]
    made.calls.clear()
    return made


# --- payloads --------------------------------------------------------------------------------------------------------


class Runs:
    """Unpickled, it makes the canary file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def deep(opening: str, closing: str, levels: int = 12_000) -> str:
    return opening * levels + closing * levels


#: Kinds of payload; each text is planted as it is, `{file}` and `{address}` are those of the canaries.
PAYLOADS: dict[str, list[str]] = {
    "interpolation": ["${oc.env:CANARY}", "x ${oc.decode:${oc.env:CANARY}} y", "$CANARY", "{question.__class__}"],
    "target": ["_target_: os.system", '{"_target_": "os.system", "command": "touch {file}"}', "os.system"],
    "pickle": ["!!python/object/apply:os.system ['touch {file}']", "cos\nsystem\n(S'touch {file}'\ntR."],
    "remote code": [
        "modeling_evil.Evil",
        "__import__('os').system('touch {file}')",
        "{{ cycler.__init__.__globals__ }}",
    ],
    "path": ["../../canary", "../../../canary", "{file}", "~/../{file}", "a/../../../canary", "..", "canary\x00"],
    "terminal": [f"{ESCAPE}owned", "\x9b31mowned\r\x08", "[red]owned[/nothing]"],
    "html": [TAG, f"</script>{TAG}", f'"><svg onload=alert(1)>{TAG}'],
    "bomb": ["x" * 200_000, "9" * 5000, deep("[", "]")],
    "address": ["{address}/retrieve", "{address}/${oc.env:CANARY}", "nobody/evil-model"],
}


def planted(value: Any, text: str, keys: bool = True) -> Any:
    """The same plain data with a text in the place of every text but those that say which of several forms it is."""
    if isinstance(value, dict):
        return {name: planted(each, text, keys) for name, each in value.items()} | ({text: text} if keys else {})
    if isinstance(value, list):
        return [planted(each, text, keys) for each in value]
    return text if isinstance(value, str) else value


def places(value: Any, text: str) -> Iterator[Any]:
    """The text in one place after the other, all the rest being sound."""
    if isinstance(value, str):
        yield text
    for name in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for changed in places(value[name], text):
            if isinstance(value, dict):
                yield {**value, name: changed}
            else:
                yield [*value[:name], changed, *value[name + 1 :]]


# --- readers ---------------------------------------------------------------------------------------------------------

SETTINGS = {
    "algo": {"name": "sft"}, "env": {"name": "agentic_rag", "prompt": "{question}"},
    "dataset": {"name": "tiny", "split": "test", "num_passages": 60, "num_questions": 5},
    "retriever": {"name": "bm25"}, "reward": {"name": "exact_match"},
    "rollout": {"max_new_tokens": 4}, "model": {"policy": "tiny-student", "teacher": None}, "cache_dir": "somewhere",
}  # fmt: skip
FIGURES = {"n": 2, "exact_match": 0.5, "exact_match_interval": [0.0, 1.0], "f1": 0.5, "num_searches": 1.0,
           "malformed_fraction": 0.0, "retriever_errors": 0}  # fmt: skip
SUMMARY = {
    "algo": "sft", "split": "test", "stages": [{"name": "sft", "steps": 1, "checkpoint": "checkpoints/000001"}],
    "evaluation": {"sft": {"greedy": {"all": FIGURES, "some": FIGURES}}}, "seed": 0, "config": SETTINGS,
    "fingerprints": {"questions": "1"}, "versions": {"torch": "2"}, "machine": {"device": "cpu"}, "costs": {},
}  # fmt: skip
AGENT = {
    "format": 1, "env": {"name": "agentic_rag", "prompt": "{question}", "final_turn": "none"}, "action_ends": ["</a>"],
    "rollout": {"max_new_tokens": 4}, "precision": "float32", "vocab_size": 700,
    "measured": {"dataset": SETTINGS["dataset"], "retriever": {"name": "bm25", "index": "x", "stemmer": "english"},
                 "reward": {"name": "exact_match"}, "evaluation": {"corpus": "own"}, "num_envs": 2},
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "nobody/model", "r": 2, "lora_alpha": 4,
    "target_modules": ["q_proj"], "bias": "none", "revision": "main", "megatron_core": "megatron.core",
    "auto_mapping": {"base_model_class": "Evil", "parent_library": "modeling_evil"}, "init_lora_weights": True,
}  # fmt: skip
ADAPTER_WEIGHTS = save(
    {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{name}.weight": torch.ones(*shape)
     for name, shape in (("A", (2, 64)), ("B", (64, 2)))}
)  # fmt: skip
PREDICTION = {"question_id": "q", "dataset": "some", "golden_answers": ["a"], "correct": True}
INFO = {"question_id": "q", "turn": 1, "action": "answer", "query": "a", "passages": [], "answer": "a",
        "exact_match": 1.0, "f1": 1.0, "num_searches": 0, "correct": True, "error": None}  # fmt: skip
EPISODE = {
    "question_id": "q", "correct": True, "reward": 1.0, "terminated": True, "truncated": False, "source": "policy",
    "group_id": 0, "prompt": "Question: q", "prompt_ids": [1],
    "turns": [{"action": "a", "observation": "b", "action_ids": [1], "action_logprobs": [-1.0], "observation_ids": [],
               "info": INFO}],
    "question": {"text": "q", "golden_answers": ["a"], "dataset": "some", "hops": 1},
}  # fmt: skip


def run_of(canaries: Canaries, name: str = "run", **files: bytes) -> Path:
    """A run directory with sound files, or the given ones."""
    folder = canaries.inside / name
    sound = {
        ".hydra/config.yaml": yaml.safe_dump(SETTINGS).encode(), ".hydra/overrides.yaml": b"[algo=sft]",
        "summary.json": json.dumps(SUMMARY).encode(),
        "metrics.jsonl": b'{"step": 1, "stage": "sft", "train/loss": 1.0}\n',
        "predictions/test-sft-greedy.jsonl": json.dumps(PREDICTION).encode() + b"\n",
        "trajectories/test-sft-greedy.jsonl.gz": gzip.compress(json.dumps(EPISODE).encode() + b"\n"),
    }  # fmt: skip
    for path, content in {**sound, **files}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def attempt(act: Callable[[], Any]) -> None:
    """What a command does: an error of ours is told in a line, through the same printer; anything else is a bug."""
    try:
        with clear_errors():
            act()
    except SystemExit:
        pass


def look_at(run: Path, canaries: Canaries) -> None:
    """`compare` and `show`."""
    out = canaries.inside / "comparison"
    attempt(lambda: compare.main([str(run), "--out", str(out), "--resamples", "2", "--force"]))
    attempt(lambda: show.main([str(run), "--html", str(canaries.inside / "page.html")]))


def read_config(canaries: Canaries, content: bytes) -> None:
    run = run_of(canaries, **{".hydra/config.yaml": content})
    given = vars(EvaluateConfig()) | {"dataset": {"split": "test"}, "evaluation": {}}

    def use() -> None:
        settings = evaluate._settings(run)
        config = evaluate_config(given, str(ASSETS / "tiny-student"), settings)
        dataset = DATASETS.build(config.dataset)
        RETRIEVERS.build(config.retriever, corpus=dataset.corpus).search(["who"], 1)

    attempt(use)
    attempt(lambda: require_named(read_settings(run), (), str(run)))
    attempt(lambda: show.main([str(run), "--html", str(canaries.inside / "page.html"), "--num", "1"]))


def read_overrides(canaries: Canaries, content: bytes) -> None:
    look_at(run_of(canaries, **{".hydra/overrides.yaml": content}), canaries)


def read_summaries(canaries: Canaries, content: bytes) -> None:
    look_at(run_of(canaries, **{"summary.json": content}), canaries)


def read_metrics(canaries: Canaries, content: bytes) -> None:
    run = run_of(canaries, **{"metrics.jsonl": content})
    attempt(lambda: compare.main([str(run), "--out", str(canaries.inside / "out"), "--resamples", "2"]))
    attempt(lambda: truncate_metrics(run / "metrics.jsonl", 1))


def read_predictions(canaries: Canaries, content: bytes) -> None:
    look_at(run_of(canaries, **{"predictions/test-sft-greedy.jsonl": content}), canaries)


def read_episodes(canaries: Canaries, content: bytes) -> None:
    run = run_of(canaries, **{"trajectories/test-sft-greedy.jsonl.gz": gzip.compress(content)})
    attempt(lambda: show.main([str(run), "--html", str(canaries.inside / "page.html"), "--num", "1"]))
    attempt(lambda: read_trajectories(run / "trajectories" / "test-sft-greedy.jsonl.gz"))


def read_mark(canaries: Canaries, content: bytes) -> None:
    run = run_of(canaries)
    out = canaries.inside / "out"
    out.mkdir(exist_ok=True)
    (out / "comparison.json").write_bytes(content)
    attempt(lambda: compare.main([str(run), "--out", str(out), "--resamples", "2"]))


def read_manifest(canaries: Canaries, content: bytes) -> None:
    folder = run_of(canaries) / "checkpoints" / "000001"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_bytes(content)
    attempt(lambda: checkpoint.latest(folder.parent.parent))
    attempt(lambda: evaluate.find(str(folder.parent.parent)))
    attempt(lambda: evaluate.find(str(folder)))


def read_seal(canaries: Canaries, content: bytes) -> None:
    path = canaries.inside / "kept.jsonl.gz"
    path.write_bytes(gzip.compress(b"{}\n"))
    path.with_name("kept.jsonl.gz.seal").write_bytes(content)
    attempt(lambda: read_kept(path, read_trajectories))


def model_folder(canaries: Canaries, file: str, content: bytes) -> Path:
    folder = canaries.inside / "model"
    folder.mkdir(exist_ok=True)
    for source in (ASSETS / "tiny-student").iterdir():
        (folder / source.name).write_bytes(source.read_bytes())
    (folder / file).write_bytes(content)
    return folder


def read_model_config(canaries: Canaries, content: bytes) -> None:
    folder = model_folder(canaries, "config.json", content)
    (folder / "modeling_evil.py").write_text(f"open({str(canaries.file)!r}, 'w')\nclass Evil: ...\n")
    attempt(lambda: load_model(folder))


def read_tokenizer_config(canaries: Canaries, content: bytes) -> None:
    folder = model_folder(canaries, "tokenizer_config.json", content)
    (folder / "modeling_evil.py").write_text(f"open({str(canaries.file)!r}, 'w')\nclass Evil: ...\n")
    attempt(lambda: encode_prompts(load_tokenizer(folder), ["Who?"]))


def read_adapter(canaries: Canaries, content: bytes) -> None:
    folder = canaries.inside / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes(content)
    (folder / "adapter_model.safetensors").write_bytes(ADAPTER_WEIGHTS)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Runs(canaries.file)))
    attempt(lambda: load_model(folder))
    attempt(lambda: load_tokenizer(folder))
    attempt(lambda: print_line(str(evaluate.find(str(folder)))))
    out = canaries.inside / "merged"
    attempt(lambda: merge.main([str(folder), "--out", str(out), "--base", str(ASSETS / "tiny-student")]))
    shutil.rmtree(out, ignore_errors=True)


def read_adapter_weights(canaries: Canaries, content: bytes) -> None:
    folder = canaries.inside / "adapter"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (folder / "adapter_model.safetensors").write_bytes(content)
    attempt(lambda: load_model(folder, base=str(ASSETS / "tiny-student")))


def tensors_of(data: dict[str, Any]) -> bytes:
    """A safetensors file whose names and metadata are texts."""
    header = {
        str(name): {"dtype": "F32", "shape": [1], "data_offsets": [4 * n, 4 * n + 4]} for n, name in enumerate(data)
    }
    written = json.dumps(header | {"__metadata__": {"note": str(data)}}).encode("utf-8", "replace")
    return len(written).to_bytes(8, "little") + written + bytes(4 * len(header))


def read_agent_file(canaries: Canaries, content: bytes) -> None:
    folder = model_folder(canaries, "agent.json", content)

    def use() -> None:
        config = of_agent(folder)
        dataset = DATASETS.build(config.dataset)
        RETRIEVERS.build(config.retriever, corpus=dataset.corpus).search(["who"], 1)
        ENVS.build(config.env, num_envs=1, dataset=dataset, retriever="bm25", reward=config.reward)

    attempt(use)
    overrides = ["algo=ppo", f"model.policy={folder}"]
    attempt(lambda: Console().print(len(with_protocol(composed("config", overrides), overrides))))
    attempt(lambda: export.main([str(folder), "--out", str(canaries.inside / "exported")]))


def of_agent(folder: Path) -> Any:
    given = vars(EvaluateConfig()) | {"dataset": {"split": "test"}, "evaluation": {}}
    found = evaluate.find(str(folder), given=given)
    config = evaluate_config(given, found.model, found.settings)
    found.tell_overruled(config)
    return config


def read_template(canaries: Canaries, content: bytes) -> None:
    folder = model_folder(canaries, "chat_template.jinja", content)
    attempt(lambda: Console().print(len(encode_prompts(load_tokenizer(folder), ["Who?"]))))


def read_questions(canaries: Canaries, content: bytes) -> None:
    file = canaries.inside / "questions.jsonl"
    file.write_bytes(content)
    attempt(lambda: DATASETS.build({"name": "jsonl", "questions": str(file), "corpus": None, "split": "all"}))


def read_passages(canaries: Canaries, content: bytes) -> None:
    file = canaries.inside / "corpus.jsonl"
    file.write_bytes(content)
    attempt(lambda: RETRIEVERS.build("bm25", corpus=read_corpus(file)).search(["who"], 1))


def read_index(canaries: Canaries, content: bytes) -> None:
    folder = canaries.inside / "index"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(content)
    attempt(lambda: RETRIEVERS.build({"name": "bm25", "index": str(folder)}).search(["who"], 1))


@contextmanager
def service_that_says(content: bytes) -> Iterator[str]:
    """A service that answers whatever it is asked with the same bytes; its address."""

    class Service(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def read_reply(canaries: Canaries, content: bytes) -> None:
    with service_that_says(content) as url:
        retriever = RETRIEVERS.build({"name": "http", "url": f"{url}/retrieve", "max_retries": 0, "timeout_s": 5.0})

        def search() -> None:
            (found,) = retriever.search(["who"], 3)
            if isinstance(found, AgenticRAGError):
                raise found

        attempt(search)
        retriever.close()


def read_health(canaries: Canaries, content: bytes) -> None:
    with service_that_says(content) as url:
        http = {"name": "http", "url": f"{url}/retrieve", "max_retries": 0, "timeout_s": 5.0}
        kept = {"name": "cached", "retriever": http, "path": str(canaries.inside / "cache.sqlite")}
        attempt(lambda: print_line(str(RETRIEVERS.build(kept).fingerprint)))


def read_completion(canaries: Canaries, content: bytes) -> None:
    with service_that_says(content) as url:
        endpoint = Endpoint(EndpointConfig(url=url, model="m", api="completions", max_retries=0, timeout_s=5.0))
        attempt(lambda: print_line(endpoint(["Who?"])[0]))
        endpoint.close()


def read_demonstrations(canaries: Canaries, content: bytes) -> None:
    file = canaries.inside / "turns.jsonl"
    file.write_bytes(content)

    asked: Any = SimpleNamespace(dataset=[Question("q", "Who?", ("a",))])
    networks: Any = SimpleNamespace(tokenizer=load_tokenizer(ASSETS / "tiny-student"))
    none: Any = None  # rollouts take no part in reading
    attempt(
        lambda: print_line(str(File(DemonstrationsConfig(source="file", path=str(file)), networks, asked, none).counts))
    )


def read_corpus_of_rows(canaries: Canaries, content: bytes) -> None:
    file = canaries.inside / "corpus.parquet"
    file.write_bytes(content)
    attempt(lambda: RETRIEVERS.build("bm25", corpus=read_corpus(file)).search(["who"], 1))
    attempt(lambda: RETRIEVERS.build({"name": "bm25", "corpus": str(file)}).search(["who"], 1))


def read_questions_of_rows(canaries: Canaries, content: bytes) -> None:
    file = canaries.inside / "questions.parquet"
    file.write_bytes(content)
    attempt(lambda: DATASETS.build({"name": "jsonl", "questions": str(file), "corpus": None, "split": "all"}))
    check_dataset([*map(str, ["check", file])])


def rows_of(data: dict[str, Any]) -> bytes:
    """A Parquet file with one row; a file that Arrow can't hold is left to the other readers."""
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist([data]), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def read_tokenizer(canaries: Canaries, content: bytes) -> None:
    folder = model_folder(canaries, "tokenizer.json", content)
    attempt(lambda: encode_prompts(load_tokenizer(folder), ["Who?"]))


def read_generation_config(canaries: Canaries, content: bytes) -> None:
    folder = model_folder(canaries, "generation_config.json", content)
    attempt(lambda: load_model(folder))


def read_training_state(canaries: Canaries, content: bytes) -> None:
    folder = run_of(canaries) / "checkpoints" / "000001"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / checkpoint.TRAINING_STATE).write_bytes(content)
    attempt(lambda: print_line(str(checkpoint.read_trainer_state(folder))))


def state_of(data: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(data, buffer)
    return buffer.getvalue()


def read_turns(canaries: Canaries, content: bytes) -> None:
    """What a model, or a person, writes in the environment; the questions are the bundled ones."""
    lines = iter(content.decode("utf-8", "replace").splitlines())

    def typed(_: str) -> str:
        for line in lines:
            return line
        raise EOFError

    with patch("builtins.input", typed):
        attempt(lambda: play.main(["--dataset", TOY, "--episodes", "2", "--seed", "0"]))


TOY = json.dumps({"name": "tiny", "num_passages": 60, "num_questions": 5, "split": "test"})
TOKENIZER = json.loads((ASSETS / "tiny-student" / "tokenizer.json").read_text(encoding="utf-8"))
TOKENIZER["model"]["vocab"] = dict(list(TOKENIZER["model"]["vocab"].items())[:5])


#: Every reader: what a sound file of its kind holds, how it is written, and who reads it.
READERS: dict[str, tuple[dict[str, Any], Callable[[Any], bytes], Callable[[Canaries, bytes], None]]] = {
    "config.yaml": (SETTINGS, lambda data: json.dumps(data).encode(), read_config),  # which is YAML as well
    "overrides.yaml": (
        {"first": "algo=sft"}, lambda data: yaml.safe_dump(list(data.values())).encode(), read_overrides,
    ),
    "summary.json": (SUMMARY, lambda data: json.dumps(data).encode(), read_summaries),
    "metrics.jsonl": ({"step": 1, "stage": "sft"}, lambda data: json.dumps(data).encode() + b"\n", read_metrics),
    "predictions": (PREDICTION, lambda data: json.dumps(data).encode() + b"\n", read_predictions),
    "trajectories": (EPISODE, lambda data: json.dumps(data).encode() + b"\n", read_episodes),
    "comparison.json": ({"files": ["a.csv"]}, lambda data: json.dumps(data).encode(), read_mark),
    "checkpoint manifest": (
        {"step": 1, "files": {"config.json": {"bytes": 1, "sha256": "0"}}},
        lambda data: json.dumps(data).encode(),
        read_manifest,
    ),
    "seal of a cache file": (
        {"sha256": "0", "numbers": {}, "check": "0"}, lambda data: json.dumps(data).encode(), read_seal,
    ),
    "model config.json": (
        json.loads((ASSETS / "tiny-student" / "config.json").read_text())
        | {"auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "a.B"}},
        lambda data: json.dumps(data).encode(),
        read_model_config,
    ),
    "tokenizer_config.json": (
        {"tokenizer_class": "X", "eos_token": "</s>", "auto_map": {"AutoTokenizer": ["a.B", None]}},
        lambda data: json.dumps(data).encode(),
        read_tokenizer_config,
    ),
    "adapter_config.json": (ADAPTER, lambda data: json.dumps(data).encode(), read_adapter),
    "adapter_model.safetensors": (
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": "x"}, tensors_of, read_adapter_weights,
    ),
    "agent.json": (AGENT, lambda data: json.dumps(data).encode(), read_agent_file),
    "chat template": ({"template": "{{ messages }}"}, lambda data: str(data["template"]).encode(), read_template),
    "questions": (
        {"id": "q", "question": "Who?", "golden_answers": ["a"]},
        lambda data: json.dumps(data).encode(),
        read_questions,
    ),
    "corpus": ({"id": "p", "contents": "Who\nis."}, lambda data: json.dumps(data).encode(), read_passages),
    "index manifest": (
        {"kind": "bm25", "corpus": {"path": "c.arrow", "fingerprint": "0", "num_passages": 1}},
        lambda data: json.dumps(data).encode(),
        read_index,
    ),
    "http reply": (
        {"result": [[{"document": {"id": "p", "contents": "c"}, "score": 1.0}]], "error": "none"},
        lambda data: json.dumps(data).encode(),
        read_reply,
    ),
    "health reply": (
        {"status": "ok", "fingerprint": "f"}, lambda data: json.dumps(data).encode(), read_health,
    ),
    "reply of an endpoint": (
        {"choices": [{"text": "<answer> a </answer>"}], "usage": {"prompt_tokens": 10**400, "note": "x"}},
        lambda data: json.dumps(data).encode(),
        read_completion,
    ),
    "demonstrations": (
        {"question_id": "q", "question": "Who?", "turns": [{"action": "<answer> a </answer>", "observation": "o"}]},
        lambda data: json.dumps(data).encode(),
        read_demonstrations,
    ),
    "corpus.parquet": ({"id": "p", "contents": "Who\nis."}, rows_of, read_corpus_of_rows),
    "questions.parquet": (
        {"id": "q", "question": "Who?", "golden_answers": ["a"], "metadata": {"note": "x"}},
        rows_of,
        read_questions_of_rows,
    ),
    "tokenizer.json": (TOKENIZER, lambda data: json.dumps(data).encode(), read_tokenizer),
    "generation_config.json": (
        {"eos_token_id": 1, "_from_model_config": "x", "custom_generate": "evil", "cache_implementation": "static"},
        lambda data: json.dumps(data).encode(),
        read_generation_config,
    ),
    "training_state.pt": (
        {"learner": {"name": "x"}, "trainer": {"position": {"stage": 0, "costs": {"x": "y"}}}, "critic": None},
        state_of,
        read_training_state,
    ),
    "turns": (
        {"first": "search: who", "second": "<search> a </search>", "third": "<answer> a </answer>"},
        lambda data: "\n".join(map(str, data.values())).encode("utf-8", "replace"),
        read_turns,
    ),
}  # fmt: skip
#: Cells that need no try.
ARGUED = {
    ("overrides.yaml", "bomb"): "read by the same function as config.yaml",
}
CELLS = [(reader, kind) for reader in READERS for kind in PAYLOADS if (reader, kind) not in ARGUED]
#: A whole comparison for every try: with every kind of payload at night, with those that it has fallen for always.
_SLOW = ("overrides.yaml", "summary.json", "predictions", "comparison.json")
_ALWAYS = {("summary.json", "path"), ("summary.json", "terminal"), ("comparison.json", "path")}
_TRIED = [
    pytest.param(
        *cell,
        id="-".join(cell),
        marks=[pytest.mark.nightly] if cell[0] in _SLOW and cell not in _ALWAYS else [],
    )
    for cell in CELLS
]


@pytest.fixture
def strike(canaries, capsys):
    """Lets a reader read, and listens to the canaries."""

    def read(reader: str, content: bytes) -> None:
        READERS[reader][2](canaries, content)
        out, err = capsys.readouterr()
        pages = "".join(file.read_text(encoding="utf-8") for file in canaries.inside.rglob("*.html"))
        canaries.require_silence(out + err, pages)

    return read


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("reader", "kind"), _TRIED)
def test_a_text_of_a_stranger_does_nothing(reader, kind, canaries, strike):
    sound, write, _ = READERS[reader]
    first = list(PAYLOADS).index(kind)
    for number, text in enumerate(PAYLOADS[kind]):
        text = text.replace("{file}", str(canaries.file)).replace("{address}", canaries.address)
        strike(reader, write(planted(sound, text)))
        # One place as well, another one for every text.
        one = list(places(sound, text))
        strike(reader, write(one[(2 * first + number) % len(one)]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_something_else_does_nothing(reader, canaries, strike):
    evil = pickle.dumps(Runs(canaries.file))
    for content in (
        evil,
        b"",
        b"\x00" * 1000,
        b"\xff\xfe",
        b"[]",
        b"null",
        deep("[", "]").encode(),
        gzip.compress(evil),
    ):
        strike(reader, content)


def test_every_cell_is_filled_or_argued():
    assert set(CELLS) | ARGUED.keys() == {(reader, kind) for reader in READERS for kind in PAYLOADS}
    tries = sum(2 * len(PAYLOADS[kind]) for _, kind in CELLS) + 8 * len(READERS)
    assert tries >= 200
