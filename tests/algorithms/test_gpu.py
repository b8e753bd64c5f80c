"""What only a GPU can show: `pytest -m gpu` on a machine with CUDA."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from small_runs import DGPO, DGPO_STEPS, KD_STEPS, resume, train

from agentic_rag_env.retrievers.vectors.ranking import nearest
from agentic_rag_env.retrievers.vectors.torch_search import TorchSearch
from algorithms.launch.clear_errors import clear_errors
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


def test_cuda_graphs_write_what_is_written_without_them(tmp_path):
    settings = config(tmp_path)
    settings.rollout.cuda_graphs = "auto"
    networks = Trainer(settings, tmp_path / "run").networks
    assert networks.cuda_graphs == "yes (auto: greedy tokens are the same)"


def test_a_run_goes_on_from_a_checkpoint_on_a_gpu(tmp_path, cache):
    whole = train(tmp_path / "run", cache, *DGPO)
    (whole.path / "summary.json").unlink()
    shutil.rmtree(whole.path / "checkpoints" / f"{KD_STEPS + DGPO_STEPS:06d}")
    resumed = resume(whole.path)
    assert f"resuming after step {KD_STEPS + DGPO_STEPS - 2}" in resumed.out + resumed.err
    assert [row["step"] for row in resumed.metrics][-1] == KD_STEPS + DGPO_STEPS


def test_float16_search_finds_what_float64_finds():
    draws = np.random.default_rng(0)
    vectors = draws.standard_normal((5000, 64)).astype(np.float16)
    queries = draws.standard_normal((9, 64)).astype(np.float32)
    expected = np.argsort(-(queries.astype(np.float64) @ vectors.astype(np.float64).T), axis=1)[:, :3]
    found = nearest(TorchSearch(vectors, "cuda"), queries, 3)
    assert [[row for row, _ in ranking] for ranking in found] == expected.tolist()


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


def test_a_full_gpu_says_what_to_do(capsys):
    with pytest.raises(SystemExit), clear_errors():
        torch.empty(2**50, device="cuda")
    said = capsys.readouterr().err
    assert "out of memory" in said
    assert "learner.micro_batch_tokens" in said
