"""What this project does on a GPU, checked and measured by one command: `make gpu-check`.

With a GPU it runs the tests that need one, and measures at the paper's shapes: a policy and a critic of 0.5B, a teacher
of 3B, 512 episodes of about 1,450 tokens, 21 million passages. Weights are random, and lengths come from a fixed
distribution, so nothing is downloaded. Without a GPU a small form goes the same way, so that it is known to work.

It writes `gpu-check.json`, a list of entries, and `gpu-check.md`, the same as a table. A floor is what the hardware
would need for the arithmetic or the memory traffic alone. Entries that are not `measured` are arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from agentic_rag_env.retrievers.vectors.torch_search import TorchSearch
from algorithms.assets import ASSETS
from algorithms.learner import ranks
from algorithms.learner.algorithm import ALGORITHMS, Algorithm
from algorithms.learner.collate import collate
from algorithms.learner.config import LearnerConfig
from algorithms.learner.networks import Critic, freeze, load_tokenizer
from algorithms.learner.training_step import Learner
from algorithms.learner.types import Trajectory, Turn
from algorithms.rollout.attention_kernels import attention_kernels, in_words
from algorithms.rollout.cached_engine import CachedEngine
from algorithms.rollout.config import RolloutConfig
from algorithms.rollout.cuda_graphs import CudaGraphs, decided_recorder
from algorithms.rollout.engine import Action
from algorithms.rollout.recorded_steps import Recorder, unrecorded
from algorithms.training.hardware import GPUS, Device, HardwareConfig, device_of
from algorithms.training.schemas import import_zoo
from algorithms.training.summary import provenance


@dataclass(frozen=True)
class Shapes:
    """What is measured.

    Attributes:
        policy, teacher: Settings of `Qwen2Config`; the critic has the policy's.
        episodes: Episodes of a step.
        prompt, observation: Mean number of tokens; each is drawn within a quarter of it.
        action: Tokens of an action.
        turns: Actions of an episode.
        micro_batch_tokens: See `LearnerConfig`.
        passages, dim: Vectors that are searched, and their width.
        queries: Queries of a search.
    """

    policy: dict[str, Any]
    teacher: dict[str, Any]
    episodes: int
    prompt: int
    observation: int
    action: int
    turns: int
    micro_batch_tokens: int
    passages: int
    dim: int
    queries: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.episodes * (self.prompt + self.turns * self.action + (self.turns - 1) * self.observation)


def _qwen(vocab: int, layers: int, hidden: int, inner: int, heads: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }


#: Qwen2.5 0.5B and 3B, and the paper's step.
PAPER = Shapes(
    policy=_qwen(151_936, 24, 896, 4864, 14),
    teacher=_qwen(151_936, 36, 2048, 11_008, 16),
    episodes=512,
    prompt=250,
    observation=475,
    action=83,
    turns=3,
    micro_batch_tokens=32_768,
    passages=21_000_000,
    dim=768,
    queries=512,
)
SMALL = Shapes(
    policy=_qwen(2000, 3, 64, 128, 4),
    teacher=_qwen(2000, 4, 128, 256, 4),
    episodes=16,
    prompt=40,
    observation=60,
    action=12,
    turns=3,
    micro_batch_tokens=4096,
    passages=50_000,
    dim=64,
    queries=32,
)


@dataclass
class Figure:
    """An entry of the report.

    Attributes:
        figure: What it is.
        value: As measured; None if it was not.
        floor: What the hardware needs at least, in the same unit; None where there is no such bound.
        unit: Unit of both.
        hardware: Where it was measured, or whose data sheet the floor is from.
        measured: Whether the value was measured there.
    """

    figure: str
    value: float | None
    floor: float | None
    unit: str
    hardware: str
    measured: bool


@dataclass
class Check:
    """One measurement of all, on this machine."""

    shapes: Shapes
    device: Device
    place: torch.device = field(default_factory=ranks.device)
    figures: list[Figure] = field(default_factory=list)

    def note(self, figure: str, value: float, unit: str, floor: float | None = None) -> None:
        """Add a figure that was measured here, and print it."""
        beside = "" if floor is None else f" (floor {floor:.4g})"
        print(f"{figure}: {value:.4g} {unit}{beside}", flush=True)
        self.figures.append(Figure(figure, value, floor, unit, hardware(self.device), True))

    def timed(self, act: Callable[[], Any]) -> tuple[Any, float]:
        """Do something, and say how many seconds it took."""
        self._finish()
        start = time.perf_counter()
        result = act()
        self._finish()
        return result, time.perf_counter() - start

    def _finish(self) -> None:
        if self.place.type == "cuda":
            torch.cuda.synchronize()

    def run(self) -> None:
        """Measure everything."""
        floors = floors_of(self.shapes, self.device)
        policy = self._network(self.shapes.policy)
        learner = self._learner(policy)
        self._step(policy, learner)  # which makes buffers and moments
        seconds = self._step(policy, learner)
        for phase, taken in seconds.items():
            self.note(f"DGPO step, {phase}", taken, "s", floors[phase])
        steps = self.shapes.turns * (self.shapes.action - 1)
        floor = 1000 * floors["decode"] / steps
        self.note("decode step", 1000 * seconds["decode"] / steps, "ms", floor)
        self._decode_recorded(policy, steps, floor)
        self.note("episodes played", self.shapes.episodes / seconds["rollout"], "1/s")
        self.note("tokens trained on", self.shapes.tokens / seconds["update"], "1/s")
        if self.place.type == "cuda":
            self.note("peak memory of the step", torch.cuda.max_memory_allocated() / 2**30, "GiB")
        del learner, policy
        self._search(floors["search"])

    def _step(self, policy: Qwen2ForCausalLM, learner: Learner) -> dict[str, float]:
        """Take a whole step, and return the seconds of its phases; prefill and decode are the parts of the rollout."""
        seconds, batch = self._play(policy)
        seconds["rollout"] = sum(seconds.values())
        _, seconds["scoring"] = self.timed(lambda: learner.score(batch))
        _, seconds["update"] = self.timed(lambda: learner.update(batch, np.random.default_rng(0)))
        whole = sum(seconds[phase] for phase in ("rollout", "scoring", "update"))
        return {**seconds, "whole step": whole}

    def _decode_recorded(self, policy: Qwen2ForCausalLM, steps: int, floor: float) -> None:
        """Measure decode steps as CUDA graphs, recording included; without a GPU, their shapes alone."""
        has_gpu = self.place.type == "cuda"
        figure = "decode step, CUDA graphs" if has_gpu else "decode step, shapes of CUDA graphs"
        seconds, _ = self._play(policy, CudaGraphs if has_gpu else lambda: unrecorded)
        self.note(figure, 1000 * seconds["decode"] / steps, "ms", floor)
        _, reason = decided_recorder("auto", policy, self._tokenizer(), "auto")
        print(f"rollout.cuda_graphs={reason}; {in_words(attention_kernels(policy, 'auto'))}", flush=True)

    def _network(self, settings: dict[str, Any]) -> Qwen2ForCausalLM:
        torch.manual_seed(0)
        with torch.device(self.place):
            return Qwen2ForCausalLM(Qwen2Config(**settings)).eval()

    def _learner(self, policy: Qwen2ForCausalLM) -> Learner:
        teacher = freeze(self._network(self.shapes.teacher))
        algorithm = ALGORITHMS.build({"name": "dgpo", "num_minibatches": 2, "critic_warmup_steps": 0})
        assert isinstance(algorithm, Algorithm)
        return Learner(
            algorithm,
            policy,
            critic=Critic(policy),
            teacher=teacher.bfloat16() if self.place.type == "cuda" else teacher,
            config=LearnerConfig(
                micro_batch_tokens=self.shapes.micro_batch_tokens, gradient_checkpointing=self.place.type == "cuda"
            ),
            total_steps=10,
            vocab_size=self.shapes.policy["vocab_size"],
        )

    def _play(
        self, policy: Qwen2ForCausalLM, recorder: Callable[[], Recorder] | None = None
    ) -> tuple[dict[str, float], Any]:
        """Write episodes of drawn lengths, with one engine that stops after the first token, and one that goes on."""
        shapes, draws = self.shapes, np.random.default_rng(0)
        seconds = {"prefill": 0.0, "decode": 0.0}
        trajectories = [Trajectory(self._ids(draws, shapes.prompt), [], row, "policy", float(row % 2), row % 2 == 0,
                                   True, False) for row in range(shapes.episodes)]  # fmt: skip
        engines = {length: self._engine(policy, length, recorder) for length in (1, shapes.action)}
        for turn in range(shapes.turns):
            times, actions = {}, dict[int, Action]()
            for length, engine in engines.items():
                for row, trajectory in enumerate(trajectories):
                    read = engine.append if turn else engine.open
                    ids = trajectory.turns[-1].observation_ids if turn else trajectory.prompt_ids
                    read(row, ids, draws.random(length))
                written, times[length] = self.timed(engine.write)
                assert len(written) == shapes.episodes
                actions = {action.row: action for action in written}
            seconds["prefill"] += times[1]
            seconds["decode"] += times[shapes.action] - times[1]
            for row, trajectory in enumerate(trajectories):
                observation = self._ids(draws, shapes.observation if turn + 1 < shapes.turns else 0)
                info: Any = {"error": None}
                trajectory.turns.append(Turn(actions[row].ids, actions[row].logprobs, observation, info))
        for engine in engines.values():
            engine.close(range(shapes.episodes))
        return seconds, collate(trajectories, 0, self.place)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(ASSETS / "tiny-student")

    def _engine(self, policy: Qwen2ForCausalLM, length: int, recorder: Callable[[], Recorder] | None) -> CachedEngine:
        most = 2 * self.shapes.tokens // self.shapes.episodes
        return CachedEngine(
            policy,
            self._tokenizer(),
            RolloutConfig(max_new_tokens=length, max_tokens=most),
            num_rows=self.shapes.episodes,
            action_ends=[],
            vocab_size=self.shapes.policy["vocab_size"],
            precision="auto",
            recorder=recorder,
        )

    def _ids(self, draws: np.random.Generator, mean: int) -> np.ndarray:
        length = draws.integers(mean - mean // 4, mean + mean // 4 + 1) if mean else 0
        return draws.integers(10, self.shapes.policy["vocab_size"], length)

    def _search(self, floor: float) -> None:
        draws, shapes = np.random.default_rng(0), self.shapes
        block = draws.standard_normal((min(2**18, shapes.passages), shapes.dim), dtype=np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        dtype = np.float16 if self.place.type == "cuda" else np.float32
        vectors = np.resize(block.astype(dtype), (shapes.passages, shapes.dim))
        search = TorchSearch(vectors)
        asked = block[: shapes.queries]
        search.propose(asked, 10)
        found, seconds = self.timed(lambda: search.propose(asked, 10))
        assert (found.rows[:, 0] % len(block) == np.arange(shapes.queries)).all(), "a passage is nearest to itself"
        self.note(f"exact search, {shapes.passages:,} x {shapes.dim}, {shapes.queries} queries", seconds, "s", floor)


def hardware(device: Device) -> str:
    """The name of what was measured on."""
    return device.name if device.name != "cpu" else f"cpu, {platform.machine()}, {os.cpu_count()} cores"


def floors_of(shapes: Shapes, device: Device) -> dict[str, float]:
    """Least seconds of each phase, from arithmetic and memory traffic alone."""
    policy, teacher = (_parameters(settings) for settings in (shapes.policy, shapes.teacher))
    written = shapes.episodes * shapes.turns * shapes.action
    steps = shapes.turns * (shapes.action - 1)  # the first token of an action is drawn where its text is read
    head_dim = shapes.policy["hidden_size"] // shapes.policy["num_attention_heads"]
    cache = 2 * 2 * shapes.policy["num_hidden_layers"] * 2 * head_dim  # bytes of a token's keys and values in bfloat16
    floors = {
        "prefill": 2 * policy * (shapes.tokens - written) / device.flops,
        "decode": steps * (2 * policy + shapes.tokens / 2 * cache) / device.bandwidth,
        "scoring": 2 * (teacher + policy) * shapes.tokens / device.flops,
        "update": 6 * 2 * policy * shapes.tokens / device.flops,
        "search": max(
            2 * shapes.queries * shapes.passages * shapes.dim / device.flops,
            2 * shapes.passages * shapes.dim / device.bandwidth,
        ),
    }
    floors["rollout"] = floors["prefill"] + floors["decode"]
    floors["whole step"] = floors["rollout"] + floors["scoring"] + floors["update"]
    return floors


def _parameters(settings: dict[str, Any]) -> int:
    with torch.device("meta"):
        return Qwen2ForCausalLM(Qwen2Config(**settings)).num_parameters()


def run_gpu_tests(device: Device) -> Figure:
    """Run the tests that need a GPU."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "tests"], timeout=400)
    return Figure("tests that need a GPU fail", float(done.returncode != 0), 0.0, "0 or 1", device.name, True)


def write_report(folder: Path, figures: list[Figure], small: bool) -> None:
    """Write `gpu-check.json` and `gpu-check.md`."""
    origin = provenance(ranks.device())
    folder.mkdir(parents=True, exist_ok=True)
    entries = [asdict(each) for each in figures]
    (folder / "gpu-check.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    lines = [
        "# GPU check",
        "",
        f"Commit {origin['commit']}, {origin['date']}, {versions}.",
        "A small form, without a GPU: it shows that the command works, and nothing about a GPU." if small else "",
        "",
        "| figure | value | floor | unit | hardware | measured |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for each in figures:
        numbers = ("" if number is None else f"{number:.4g}" for number in (each.value, each.floor))
        yes = "yes" if each.measured else "no: arithmetic"
        lines.append(f"| {each.figure} | {' | '.join(numbers)} | {each.unit} | {each.hardware} | {yes} |")
    (folder / "gpu-check.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Check, measure, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu-check"), help="folder of the report")
    parser.add_argument("--small", action="store_true", help="small shapes, also with a GPU")
    asked = parser.parse_args()
    import_zoo()
    has_gpu = torch.cuda.is_available()
    small = asked.small or not has_gpu
    check = Check(SMALL if small else PAPER, device_of(HardwareConfig()))
    if has_gpu:
        check.figures.append(run_gpu_tests(check.device))
    check.run()
    if small:
        sheet = GPUS["h200"]
        for phase, floor in floors_of(PAPER, sheet).items():
            name = "exact search of 21,000,000 x 768" if phase == "search" else f"DGPO step of the paper, {phase}"
            check.figures.append(Figure(name, None, floor, "s", f"{sheet.name}, data sheet", False))
    write_report(asked.out, check.figures, small)
    print(f"written to {asked.out}")
    failed = [each.figure for each in check.figures if each.unit == "0 or 1" and each.value]
    if failed:
        sys.exit("; ".join(failed))


if __name__ == "__main__":
    main()
