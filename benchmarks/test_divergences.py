"""A `gkd` step against the loss of TRL's GKD trainer, which holds all logits at once: time, and memory at the peak.

Run with `pytest benchmarks/test_divergences.py -s`. TRL itself is not needed: `whole_step` is the formula of its
`generalized_jsd_loss`, written down independently (log-softmax of both, the mixture by logsumexp, two divergences from
it). DIVERGENCE_TOKENS=1024 asks for as many model-written tokens, for which the formula takes 9 GiB.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from test_learner import VOCAB, _peak_memory, make_model
from torch.nn.functional import kl_div, log_softmax

from algorithms.gkd import GKD, GKDConfig
from algorithms.learner.config import LearnerConfig
from algorithms.learner.networks import freeze
from algorithms.learner.training_step import Learner
from algorithms.learner.types import Batch

TOKENS = int(os.environ.get("DIVERGENCE_TOKENS", "256"))
PROMPT, BETA = 8, 0.5


def make_batch() -> Batch:
    """One trajectory of a prompt and `TOKENS` model-written tokens."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(PROMPT + TOKENS)[None] >= PROMPT
    return Batch(
        input_ids=torch.randint(VOCAB, (1, PROMPT + TOKENS), generator=generator),
        attention_mask=torch.ones_like(mask),
        response_mask=mask,
        old_logprobs=torch.zeros(mask.shape),
        rewards=torch.ones(1),
        correct=torch.ones(1, dtype=torch.bool),
        group_ids=torch.zeros(1, dtype=torch.int64),
    )


def chunked_step() -> Callable[[], float]:
    """Make a step of the learner, which returns its loss."""
    config = LearnerConfig()
    parts = {"teacher": freeze(make_model(1)), "config": config, "total_steps": 1000, "vocab_size": VOCAB}
    learner, batch = Learner(GKD(GKDConfig(jsd_beta=BETA)), make_model(0), **parts), make_batch()
    return lambda: learner.update(batch, np.random.default_rng(0))["loss"]


def whole_step() -> Callable[[], float]:
    """Make a step with all logits of the trajectory at once, which returns its loss."""
    policy, teacher, batch = make_model(0), freeze(make_model(1)), make_batch()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        with torch.no_grad():
            of_teacher = log_softmax(teacher(input_ids=batch.input_ids).logits[:, PROMPT - 1 : -1], dim=-1)
        of_policy = log_softmax(policy(input_ids=batch.input_ids).logits[:, PROMPT - 1 : -1], dim=-1)
        mixture = torch.logsumexp(torch.stack([of_policy + math.log(1 - BETA), of_teacher + math.log(BETA)]), dim=0)
        to_teacher = kl_div(mixture, of_teacher, reduction="none", log_target=True)
        to_policy = kl_div(mixture, of_policy, reduction="none", log_target=True)
        loss = (BETA * to_teacher + (1 - BETA) * to_policy).sum() / TOKENS
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


STEPS = {"chunked": chunked_step, "whole": whole_step}


def _measure(kind: str, result: multiprocessing.Queue) -> None:
    """Loss of the first step, processor time of the faster of two more, and the peak beyond the networks in MiB."""
    torch.set_num_threads(1)
    step, losses, seconds = STEPS[kind](), [], []
    weights = sum(p.numel() * 4 for p in make_model(0).parameters())
    before = _peak_memory()
    for _ in range(3):
        started = time.process_time()
        losses.append(step())
        seconds.append(time.process_time() - started)
    result.put((losses[0], min(seconds[1:]), (_peak_memory() - before - 3 * weights) / 2**20))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_gkd_against_the_formula_of_trl(capsys: pytest.CaptureFixture[str]) -> None:
    context, found = multiprocessing.get_context("spawn"), {}
    for kind in STEPS:
        result = context.Queue()
        process = context.Process(target=_measure, args=(kind, result))
        process.start()
        found[kind] = result.get(timeout=1200)
        process.join()
    (ours, our_s, our_mib), (theirs, their_s, their_mib) = found["chunked"], found["whole"]
    with capsys.disabled():
        print(f"\ngkd, {TOKENS} tokens, V={VOCAB}: chunked {our_s:.2f} s, {our_mib:.0f} MiB;")
        print(f"all at once {their_s:.2f} s, {their_mib:.0f} MiB")
        print(f"ratios {our_s / their_s:.2f} and 1/{their_mib / our_mib:.1f}")
    assert ours == pytest.approx(theirs, rel=1e-4), "both are the same loss"
    assert their_mib > 14 * our_mib * TOKENS / 1024, "their memory grows with the tokens, and ours hardly does"
