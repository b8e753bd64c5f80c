"""One working dtype from rollout to update: float32, or float64 throughout where the settings ask for it."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from algorithms.assets import ASSETS
from algorithms.learner import ops
from algorithms.learner.collate import collate
from algorithms.learner.networks import Critic, load_model
from algorithms.learner.types import Trajectory, Turn
from algorithms.rollout.trajectory_files import pack, read_trajectories, unpack, write_trajectories

ROOT = Path(__file__).parents[2] / "algorithms"
#: Where float32 may stand: what decides the dtype, defaults of arguments that a run always gives, numbers that are
#: none of the run's dtype (what autocast casts, numbers made up, shares of true and false, a text's log-probabilities
#: of zero, half precision).
ALLOWED = {
    "learner/config.py": 2,
    "learner/ops.py": 1,
    "learner/credit.py": 1,
    "learner/networks.py": 2,
    "learner/precision.py": 2,
    "learner/scoring.py": 1,
    "rollout/bfloat16_copy.py": 1,
    "rollout/cached_engine.py": 1,
    "learner/folded_decoder.py": 1,
    "rollout/trajectory_files.py": 1,
    "training/batches.py": 1,
    "training/build.py": 1,
    "training/demonstrations/source.py": 1,
    "training/rehearsal.py": 2,
    "training/settings.py": 1,
    "dgpo.py": 1,
    "grpo.py": 1,
}


def mentions(path: Path) -> int:
    """How often a file names float32, or calls `.float()`, outside of docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    count = 0
    for node in ast.walk(tree):
        is_cast = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "float"
        is_named = isinstance(node, ast.Attribute) and node.attr == "float32"
        is_text = isinstance(node, ast.Constant) and node.value == "float32" and id(node) not in texts
        count += is_cast or is_named or is_text
    return count


def test_no_float32_on_the_way_from_rollout_to_update():
    files = [path for room in ("learner", "rollout", "training") for path in (ROOT / room).rglob("*.py")]
    files += [path for path in ROOT.glob("*.py") if path.stem not in ("run", "evaluate", "compare", "show", "ask")]
    found = {path.relative_to(ROOT).as_posix(): mentions(path) for path in files}
    assert {name: count for name, count in found.items() if count} == ALLOWED


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_stored_log_probabilities_keep_their_dtype_and_every_bit(tmp_path, dtype):
    draw, info = np.random.default_rng(1), {"question_id": "q", "passages": ()}
    turns = [Turn(np.arange(3), np.log(draw.random(3)).astype(dtype), np.arange(2), info) for _ in range(2)]
    trajectory = Trajectory(np.arange(4), turns, 0, "policy", 1 / 3, False, True, False)
    path = tmp_path / "one.jsonl.gz"
    write_trajectories(path, [trajectory], None)
    for (again,) in (unpack(pack([trajectory])), read_trajectories(path)):
        for turn, before in zip(again.turns, trajectory.turns, strict=True):
            assert turn.action_logprobs.dtype == np.dtype(dtype)
            assert turn.action_logprobs.tobytes() == before.action_logprobs.tobytes()
    batch = collate([trajectory], 0, precision=dtype)
    assert {batch.old_logprobs.dtype, batch.rewards.dtype} == {getattr(torch, dtype)}
    written = np.concatenate([turn.action_logprobs for turn in trajectory.turns])
    assert batch.old_logprobs[batch.response_mask].numpy().tobytes() == written.tobytes()


def test_full_precision_is_at_least_float32():
    given = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    assert {dtype: ops.at_least_float32(torch.ones(1, dtype=dtype)).dtype for dtype in given} == given


def test_a_float64_model_computes_nothing_in_float32():
    """Shifting a weight by 1e-12, which float32 can't see, must show in the hidden states by about as much."""
    model = load_model(ASSETS / "tiny-student", dtype="float64")
    ids = torch.arange(5, 25)[None]
    before = model.base_model(input_ids=ids).last_hidden_state.detach()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1e-12
    after = model.base_model(input_ids=ids).last_hidden_state.detach()
    assert 1e-14 < float((after - before).abs().max()) < 1e-9
    steps = ((after - before)[0, 2:].abs() > 0).double().mean()
    assert steps > 0.9, "almost every number of the later positions moves, instead of few by a rounding of float32"
    assert Critic(model).head.weight.dtype == torch.float64
