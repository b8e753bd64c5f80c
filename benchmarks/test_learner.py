"""The chunked training step against a plain one that builds [B, T, V], and micro-batches against padding.

Run with `pytest benchmarks/test_learner.py -s`; the last test prints time and peak memory of each step.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from agentic_rag_env import AgenticRAGVectorEnv
from algorithms.assets import ASSETS
from algorithms.kd import KD, KDConfig
from algorithms.learner import scoring
from algorithms.learner.collate import collate
from algorithms.learner.config import LearnerConfig
from algorithms.learner.networks import freeze, load_model, load_tokenizer, pad_id
from algorithms.learner.training_step import Learner
from algorithms.learner.types import Batch
from algorithms.rollout.cached_engine import CachedEngine
from algorithms.rollout.config import RolloutConfig
from algorithms.rollout.player import Player
from algorithms.rollout.tokenization import PlainEncoder
from algorithms.sft import SFT, SFTConfig

VOCAB, ROWS, LENGTH, WRITTEN = 151_936, 4, 256, 96
VOCABS = (32_000, VOCAB)
STEPS = ("chunked", "plain")
LOSSES = ("sft", "kd")


def make_model(seed: int, vocab_size: int = VOCAB) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


def make_batch(vocab_size: int = VOCAB) -> Batch:
    """Make a batch like episodes of a search agent: more than half of it is prompt and passages."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    mask[:, 64 : 64 + WRITTEN // 2] = True
    mask[:, LENGTH - WRITTEN // 2 :] = True
    return Batch(
        input_ids=torch.randint(vocab_size, (ROWS, LENGTH), generator=generator),
        attention_mask=torch.ones(ROWS, LENGTH, dtype=torch.bool),
        response_mask=mask,
        old_logprobs=torch.zeros(ROWS, LENGTH),
        rewards=torch.ones(ROWS),
        correct=torch.ones(ROWS, dtype=torch.bool),
        group_ids=torch.arange(ROWS),
    )


def chunked_step(loss: str, vocab_size: int) -> Callable[[], object]:
    algorithm = KD(KDConfig()) if loss == "kd" else SFT(SFTConfig())
    learner = Learner(
        algorithm,
        make_model(0, vocab_size),
        teacher=freeze(make_model(1, vocab_size)) if loss == "kd" else None,
        config=LearnerConfig(),
        total_steps=1000,
        vocab_size=vocab_size,
    )
    batch = make_batch(vocab_size)
    return lambda: learner.update(batch, np.random.default_rng(0))


def plain_step(loss: str, vocab_size: int) -> Callable[[], object]:
    policy, batch = make_model(0, vocab_size), make_batch(vocab_size)
    teacher = freeze(make_model(1, vocab_size)) if loss == "kd" else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)

    def step() -> None:
        log_q = policy(input_ids=batch.input_ids).logits[:, :-1].log_softmax(-1)
        losses = -log_q.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        if teacher is not None:
            with torch.no_grad():
                log_p = teacher(input_ids=batch.input_ids).logits[:, :-1].log_softmax(-1)
            losses = losses + (log_p.exp() * (log_p - log_q)).sum(-1)
        optimizer.zero_grad()
        losses[batch.response_mask[:, 1:]].mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()

    return step


def make_step(kind: str, loss: str, vocab_size: int = VOCAB) -> Callable[[], object]:
    return (chunked_step if kind == "chunked" else plain_step)(loss, vocab_size)


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("loss", LOSSES)
def test_step_time(benchmark, loss, kind):
    benchmark.group = f"training step, {loss}, V={VOCAB}, {ROWS}x{LENGTH} tokens, {ROWS * WRITTEN} written by the model"
    benchmark.pedantic(make_step(kind, loss), rounds=2, warmup_rounds=1)


def _measure(kind: str, loss: str, vocab_size: int, result: multiprocessing.Queue) -> None:
    """Processor time of the fastest of three steps, and the peak beyond weights, gradients and moments in MiB."""
    torch.set_num_threads(1)
    step, seconds = make_step(kind, loss, vocab_size), []
    weights = sum(p.numel() * 4 for p in make_model(0, vocab_size).parameters())
    before = _peak_memory()
    for _ in range(4):
        started = time.process_time()
        step()
        seconds.append(time.process_time() - started)
    result.put((min(seconds[1:]), (_peak_memory() - before - 3 * weights) / 2**20))


def _peak_memory() -> int:
    """Peak memory in bytes. `getrusage` would not do: a new process inherits its peak from its parent."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def filled_up(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group trajectories, longest first, as many in a group as the budget holds."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


SPLITS = {
    "least work": scoring.micro_batches,
    "filled up": filled_up,
    "one padded batch": lambda lengths, max_tokens: [list(range(len(lengths)))],
}


@pytest.mark.parametrize("split", SPLITS)
def test_step_time_of_unequal_lengths(benchmark, monkeypatch, split):
    """The bundled student learns from 32 episodes of the bundled teacher, with one to four turns."""
    benchmark.group = "training step, kd, 32 episodes of the tiny world"
    monkeypatch.setattr(scoring, "micro_batches", SPLITS[split])
    student, teacher = load_model(ASSETS / "tiny-student"), freeze(load_model(ASSETS / "tiny-teacher"))
    tokenizer = load_tokenizer(ASSETS / "tiny-teacher")
    envs = AgenticRAGVectorEnv(32, autoreset_mode=AutoresetMode.DISABLED, tokenizer=PlainEncoder(tokenizer))
    ends = envs.metadata["action_ends"]
    engine = CachedEngine(teacher, tokenizer, RolloutConfig(), num_rows=32, action_ends=ends)
    episodes, _ = Player(engine, envs).rollout(range(32), seed=(0,))
    batch = collate(episodes, pad_id(tokenizer))
    learner = Learner(
        KD(KDConfig()), student, teacher=teacher, config=LearnerConfig(), total_steps=1000, vocab_size=len(tokenizer)
    )
    benchmark.pedantic(learner.update, (batch, np.random.default_rng(0)), rounds=10, warmup_rounds=2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("vocab_size", VOCABS)
@pytest.mark.parametrize("loss", LOSSES)
def test_step_memory(loss, vocab_size, capsys):
    """The plain step's memory grows with every token of the batch, the chunked step's with the tokens of a chunk."""
    context = multiprocessing.get_context("spawn")  # each step has a fresh process, because the peak never falls again
    found = {}
    for kind in STEPS:
        result = context.Queue()
        process = context.Process(target=_measure, args=(kind, loss, vocab_size, result))
        process.start()
        found[kind] = result.get(timeout=300)
        process.join()
    (seconds, peak), (plain_seconds, plain_peak) = found["chunked"], found["plain"]
    with capsys.disabled():
        print(f"\n{loss}, V={vocab_size}: chunked {seconds:.2f} s, {peak:.0f} MiB;", end=" ")
        print(f"all logits at once {plain_seconds:.2f} s, {plain_peak:.0f} MiB;", end=" ")
        print(f"{plain_seconds / seconds:.1f} times as fast, 1/{plain_peak / peak:.1f} of the memory")
    assert plain_peak > 4 * peak
