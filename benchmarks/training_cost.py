"""Memory and processor time of a few training steps, such as those of adapters beside those of all weights.

The settings are those of a run; the policy may be a shape with random weights:

    python benchmarks/training_cost.py random qwen2.5-0.5b random
    python benchmarks/training_cost.py algo=sft model=qwen2.5_0.5b model.policy=random model.lora.rank=16 ...
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

import algorithms.run  # noqa: F401  # registers the launcher that the configuration names
from algorithms.assets import ASSETS
from algorithms.learner.networks import load_tokenizer
from algorithms.learner.training_step import Learner
from algorithms.training.compose import composed
from algorithms.training.host_memory import peak_memory
from algorithms.training.model_shapes import KNOWN
from algorithms.training.trainer import Trainer
from algorithms.training.typed import run_config


def random_model(shape: str, out: Path) -> None:
    """Write a model of a known shape with random weights, and the bundled tokenizer."""
    settings = dict(KNOWN[shape])
    tokenizer = load_tokenizer(ASSETS / "tiny-student")
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, max_position_embeddings=8192)
    config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def measured(name: str, seconds: dict[str, float]) -> None:
    """Add up the processor time of a step's method."""
    original = getattr(Learner, name)

    def call(*arguments: Any, **settings: Any) -> Any:
        start = time.process_time()
        try:
            return original(*arguments, **settings)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - start

    setattr(Learner, name, call)


def main(overrides: list[str]) -> None:
    """Train, and print what it took."""
    seconds: dict[str, float] = {}
    for name in ("score", "update"):
        measured(name, seconds)
    config = composed("config", [*overrides, "evaluation.every=0", "logger=[jsonl]"])
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    imported, start = peak_memory() / 2**20, time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(run_config(config), Path(folder))
        loaded = peak_memory() / 2**20
        trainer.train()
        files = [file for file in Path(folder).rglob("checkpoints/*/*") if file.is_file()]
        policy = trainer.networks.policy
        found = {
            "steps": trainer.position.step,
            "trained parameters": sum(each.numel() for each in policy.parameters() if each.requires_grad),
            "precision": trainer.networks.precision,
            "peak MiB above import": round(peak_memory() / 2**20 - imported),
            "of it once loaded": round(loaded - imported),
            "processor seconds": {name: round(value, 1) for name, value in seconds.items()},
            "in all": round(time.process_time() - start, 1),
            "MiB of checkpoints": round(sum(file.stat().st_size for file in files) / 2**20, 1),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["random"]:
        random_model(sys.argv[2], Path(sys.argv[3]))
    else:
        main(sys.argv[1:])
