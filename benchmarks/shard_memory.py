"""Memory of a training step with networks in shares: `python -m benchmarks.shard_memory`.

Two processes train a random model of 200M parameters over 32,000 ids, once whole in each and once in shares (FSDP2,
over gloo). For each: what weights, gradients and AdamW take, and the peak above what the imports took, loading
included.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from algorithms.learner import ranks, sharding
from algorithms.learner.config import LearnerConfig
from algorithms.learner.training_step import Learner
from algorithms.learner.types import Batch
from algorithms.sft import SFT, SFTConfig
from algorithms.training.host_memory import peak_memory

VOCAB, HIDDEN, LAYERS = 32_000, 1024, 13
MIB = 2**20


def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=3072, num_hidden_layers=LAYERS,
            num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


def batch() -> Batch:
    ids = torch.randint(VOCAB, (4, 64), generator=torch.Generator().manual_seed(1))
    written = torch.zeros_like(ids, dtype=torch.bool)
    written[:, 32:] = True
    zeros = torch.zeros(4)
    return Batch(
        input_ids=ids, attention_mask=torch.ones_like(written), response_mask=written, old_logprobs=torch.zeros(4, 64),
        rewards=zeros, correct=zeros > 0, group_ids=torch.arange(4),
    )  # fmt: skip


def held(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def work(rank: int, port: int, in_shares: bool, file: Path) -> None:
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in given.items()}
    torch.set_num_threads(1)
    ranks.join()
    before = peak_memory()
    policy = sharding.shard(model()) if in_shares else model()
    algorithm = SFT(SFTConfig(batch_size=4))
    learner = Learner(algorithm, policy, config=LearnerConfig(micro_batch_tokens=128), total_steps=3, vocab_size=VOCAB)
    losses = [learner.update(batch(), np.random.default_rng(step))["loss"] for step in range(3)]
    parameters = learner.policy_optimizer.parameters
    states = learner.policy_optimizer.adamw.state
    taken = sum(2 * held(p) + sum(held(value) for value in states[p].values()) for p in parameters)
    if rank == 0:
        file.write_text(json.dumps({
            "losses": losses, "parameters": sum(p.numel() for p in parameters), "held": taken,
            "peak": peak_memory() - before,
        }))  # fmt: skip
    ranks.leave()


def measure(in_shares: bool) -> dict[str, Any]:
    with socket.socket() as free, TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        file = Path(folder) / "found.json"
        start = multiprocessing.get_context("spawn").Process
        processes = [start(target=work, args=(rank, port, in_shares, file)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit("A process has failed.")
        return json.loads(file.read_text())


def main() -> None:
    # Blocks of a megabyte go back to the system at once, so the peak shows tensors and not the slack of glibc's heap.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)
    whole, shares = measure(False), measure(True)
    print(f"{whole['parameters'] / 1e6:.0f}M parameters, two processes, float32; figures of one process")
    for name, what in (("held", "weights, gradients, AdamW"), ("peak", "peak above the imports")):
        ratio = shares[name] / whole[name]
        print(f"{what}: whole {whole[name] / MIB:.0f} MiB, in shares {shares[name] / MIB:.0f} MiB, ratio {ratio:.2f}")
    differences = [f"{abs(a - b):.1e}" for a, b in zip(whole["losses"], shares["losses"], strict=True)]
    print(f"losses of three steps differ by {', '.join(differences)}: float32, and AdamW enlarges rounding")


if __name__ == "__main__":
    main()
