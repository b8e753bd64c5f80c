"""Train the bundled tiny models from scratch: `python -m algorithms.assets.pretrain teacher` (or `student`).

The teacher learns scripted search traces and reading; the student learns reading, copying and pieces of syntax, but
never sees a question followed by an action. Each world is drawn afresh and used once. MODEL_CARD.md has the results.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from algorithms.assets import ASSETS, traces
from algorithms.assets.tokenizer import build_tokenizer
from algorithms.assets.traces import Document


@dataclass(frozen=True)
class Recipe:
    """How one of the models is made.

    Attributes:
        hidden_size, num_layers: Shape; heads of 24 or 16 dimensions, feed-forward four times as wide.
        steps: Optimizer steps.
        shares: Share of each exercise among the documents, in percent.
        seed: Seed of weights and data.
    """

    hidden_size: int
    num_layers: int
    steps: int
    shares: dict[str, int]
    seed: int


RECIPES = {
    "teacher": Recipe(96, 3, 4000, {"traces": 75, "reading": 20, "copying": 5}, seed=1),
    "student": Recipe(64, 3, 6000, {"reading": 50, "copying": 15, "fragments": 35}, seed=2),
}
TOKENS_PER_STEP = 4096
LEARNING_RATE, MUON_LEARNING_RATE, WARMUP_STEPS = 5e-3, 0.02, 100


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz iterations (Jordan et al., 2024), in float32 for small CPU models."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix by its orthogonalized Nesterov momentum."""
        for group in self.param_groups:
            for param in group["params"]:
                buffer = self.state[param].setdefault("momentum", torch.zeros_like(param))
                buffer.lerp_(param.grad, 1 - group["momentum"])
                update = _orthogonalize(param.grad.lerp(buffer, group["momentum"]))
                param.add_(update, alpha=-group["lr"] * max(1.0, param.shape[0] / param.shape[1]) ** 0.5)


def _orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    x = matrix / (matrix.norm() + 1e-7)
    if transposed := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if transposed else x


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A randomly initialized Qwen2 of the recipe's shape."""
    torch.manual_seed(recipe.seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=4 * recipe.hidden_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )


def batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield padded batches of documents of similar length without end: ids and weights, both [B, T]."""
    draw = random.Random(recipe.seed)
    while True:
        encoded: list[tuple[list[int], list[float]]] = []
        for _ in range(4):
            encoded += [_encode(document, tokenizer) for document in _documents(recipe, draw)]
        encoded.sort(key=lambda pair: len(pair[0]))
        groups: list[list[tuple[list[int], list[float]]]] = [[]]
        for pair in encoded:
            if (len(groups[-1]) + 1) * len(pair[0]) > TOKENS_PER_STEP:
                groups.append([])
            groups[-1].append(pair)
        draw.shuffle(groups)
        for group in groups:
            yield _pad(group)


def _documents(recipe: Recipe, draw: random.Random) -> Iterator[Document]:
    world = traces.fresh_world(draw)
    for name, share in recipe.shares.items():
        count = 5 * share
        if name == "traces":
            rng = np.random.default_rng(draw.randrange(2**32))
            yield from traces.search_traces(world, count, rng, draw)
        else:
            maker = {"reading": traces.reading_exercises, "copying": traces.copying_exercises}
            yield from maker.get(name, traces.fragments)(world, count, draw)


def _encode(document: Document, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[float]]:
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in document:
        piece = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        ids += piece
        weights += [weight] * len(piece)
    return ids, weights


def _pad(group: list[tuple[list[int], list[float]]]) -> tuple[Tensor, Tensor]:
    shape = (len(group), max(len(ids) for ids, _ in group))
    ids, weights = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    for row, (row_ids, row_weights) in enumerate(group):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        weights[row, : len(row_ids)] = torch.tensor(row_weights)
    return ids, weights


def language_model_loss(model: Qwen2ForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the next-token cross-entropy. Under causal attention, padding on the right needs no mask."""
    hidden = model.model(ids[:, :-1]).last_hidden_state
    counted = weights[:, 1:] > 0
    losses = nn.functional.cross_entropy(model.lm_head(hidden[counted]), ids[:, 1:][counted], reduction="none")
    weight = weights[:, 1:][counted]
    return (losses * weight).sum() / weight.sum()


def pretrain(recipe: Recipe, out: Path) -> None:
    """Train a model and save it with its tokenizer.

    Args:
        recipe: What to make.
        out: Folder to write.
    """
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizers = [Muon(matrices, MUON_LEARNING_RATE), torch.optim.AdamW(others, LEARNING_RATE, weight_decay=0.0)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(recipe.steps)) for optimizer in optimizers]
    data = batches(recipe, tokenizer)
    smoothed = math.nan
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("pretraining", total=recipe.steps)
        for step in range(recipe.steps):
            ids, weights = next(data)
            loss = language_model_loss(model, ids, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            smoothed = loss.item() if math.isnan(smoothed) else 0.98 * smoothed + 0.02 * loss.item()
            progress.update(task, advance=1, description=f"pretraining, loss {smoothed:.3f}")
            if (step + 1) % 500 == 0:
                progress.console.print(f"step {step + 1}: loss {smoothed:.4f}")
                model.save_pretrained(out)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _schedule(steps: int) -> Callable[[int], float]:
    return lambda step: min(1.0, (step + 1) / WARMUP_STEPS) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, help="folder to write; default: the bundled one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pretrain(RECIPES[arguments.model], arguments.out or ASSETS / f"tiny-{arguments.model}")


if __name__ == "__main__":
    main()
