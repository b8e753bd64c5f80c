"""What only a GPU can show: `pytest -m gpu` on a machine with CUDA."""

from __future__ import annotations

import json

import pytest
import torch

from algorithms.learner import ops
from algorithms.learner.collate import collate
from algorithms.learner.networks import pad_id
from algorithms.learner.scoring import Scorer
from algorithms.training.build import Networks
from algorithms.training.from_python import run
from algorithms.training.settings import EvaluationConfig, ModelConfig, RunConfig
from algorithms.training.trainer import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def config(tmp_path, **algo):
    return RunConfig(
        algo={"name": "dgpo", "steps": 3, "warm_start": {"name": "kd", "epochs": 2}, **algo},
        env={"name": "agentic_rag"},
        dataset={"name": "tiny"},
        retriever={"name": "bm25"},
        reward={"name": "exact_match"},
        model=ModelConfig(),
        evaluation=EvaluationConfig(num_questions=64, every=0),
        cache_dir=str(tmp_path / "cache"),
    )


def test_whole_run_on_a_gpu(tmp_path):
    summary = run(config(tmp_path), tmp_path / "run")
    assert summary["machine"]["device"] == "cuda"
    assert summary["evaluation"]["teacher"]["greedy"]["all"]["exact_match"] >= 0.9
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [line["rollout/logprob_gap_mean"] for line in lines if "rollout/logprob_gap_mean" in line]
    assert gaps
    assert max(gaps) < 0.1


def test_bfloat16_rollouts_agree_with_the_training_pass(tmp_path):
    trainer = Trainer(config(tmp_path), tmp_path / "run")
    networks: Networks = trainer.networks
    envs = trainer.environments.envs("train")
    trajectories, _ = networks.player(networks.teacher(), envs).rollout(range(32), seed=(0,))
    batch = collate(trajectories, pad_id(networks.tokenizer), networks.device)
    scorer = Scorer(vocab_size=networks.vocab_size, precision="auto")
    logprobs = scorer.logprobs(networks.teacher(), batch)
    difference = ops.kl_estimate(batch.old_logprobs, logprobs, "k1")[batch.response_mask]
    assert difference.abs().mean() < 0.02
