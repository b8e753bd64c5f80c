"""bfloat16 against float32 on a CPU with matrix units for it: tokens per second of prefill, decode and training.

Run with `SMOLLM2=<folder> pytest benchmarks/test_precision.py -s`; the folder is one that
`python -m algorithms.assets.smollm2` makes. One thread, and the CPU time of this process, so that other load on the
machine counts less. The two precisions take turns, and each counts with its better round of two.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from algorithms.learner import ops
from algorithms.learner.networks import load_model, load_tokenizer
from algorithms.learner.precision import autocast
from algorithms.learner.scoring import Scorer
from algorithms.learner.types import Batch
from algorithms.rollout.cached_engine import CachedEngine
from algorithms.rollout.config import RolloutConfig

FOLDER = os.environ.get("SMOLLM2", "")
#: How many times faster bfloat16 is to be.
GOALS = {"prefill, 16 rows": 2.4, "decode, 16 rows": 1.5, "decode, 64 rows": 1.5, "training, 4 x 600": 2.1}
PROMPT, STEPS, WRITTEN = 64, 8, 100

pytestmark = [
    pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="needs a processor with amx_bf16"),
    pytest.mark.skipif(not FOLDER, reason="needs SMOLLM2=<folder of the model>"),
]


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def playing(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, precision: str, rows: int) -> dict[str, float]:
    """Tokens per second of reading prompts, and of writing at temperature 1 with the output layer and the draw."""
    config = RolloutConfig(max_new_tokens=STEPS + 2, max_tokens=1024)
    engine = CachedEngine(model, tokenizer, config, num_rows=rows, action_ends=["</answer>"], precision=precision)
    engine.action_end.is_eos[:] = engine.action_end.may_close[:] = False
    draw = np.random.default_rng(0)
    for row in range(rows):
        engine.open(row, draw.integers(100, 40_000, PROMPT), draw.random(config.max_new_tokens))
    with torch.inference_mode(), autocast(model.device, precision):
        read = seconds(engine._read_pending)
        engine._decode()
        written = seconds(lambda: [engine._decode() for _ in range(STEPS)])
    return {f"prefill, {rows} rows": rows * PROMPT / read, f"decode, {rows} rows": rows * STEPS / written}


def training(model: PreTrainedModel, precision: str) -> dict[str, float]:
    """Tokens per second of forward and backward passes over 4 episodes of 600 tokens, 100 of each written."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(100, 40_000, (4, 600)))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    each = torch.zeros(4)
    batch = Batch(ids, everywhere, everywhere, each, each, each.bool(), each.long())
    rows, columns = torch.nonzero(everywhere[:, :WRITTEN], as_tuple=True)
    scorer = Scorer(vocab_size=model.config.vocab_size, precision=precision)

    def step() -> None:
        logits = scorer.logits(model, scorer.hidden(model, batch, rows, columns + 400))
        ops.gather_logprobs(logits, ids[rows, columns + 401]).sum().backward()
        model.zero_grad()

    return {"training, 4 x 600": ids.numel() / seconds(step)}


def test_bfloat16_against_float32(capsys):
    torch.set_num_threads(1)
    model, tokenizer = load_model(FOLDER), load_tokenizer(FOLDER)
    best: dict[tuple[str, str], float] = {}
    for _ in range(2):
        for precision in ("float32", "bfloat16"):
            found = playing(model, tokenizer, precision, 16) | playing(model, tokenizer, precision, 64)
            for name, rate in (found | training(model, precision)).items():
                best[name, precision] = max(rate, best.get((name, precision), 0.0))
    ratios = {name: best[name, "bfloat16"] / best[name, "float32"] for name, _ in best}
    with capsys.disabled():
        print()
        for name, ratio in ratios.items():
            rates = ", ".join(f"{precision} {best[name, precision]:.0f}" for precision in ("float32", "bfloat16"))
            print(f"{name}: {rates} tokens/s, ratio {ratio:.2f}")
    assert {name: ratios[name] for name, goal in GOALS.items() if ratios[name] < goal} == {}
