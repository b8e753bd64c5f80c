"""What runs on a GPU, on a pretended one: nothing mixes devices, and the host seldom waits."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
import pytest
import torch
from pretended_gpu import PretendedGpu, pretended_gpu
from small_runs import DGPO, train
from test_zoo_step import ZOO, batch_of_groups, build
from toy_learner import make_batch, make_learner
from toy_policy import make_envs, make_player, make_policy, make_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.retrievers.vectors.torch_search import TorchSearch
from algorithms import evaluate
from algorithms.learner.config import LearnerConfig
from algorithms.learner.networks import Critic, freeze
from algorithms.learner.training_step import Learner
from algorithms.learner.types import Batch
from algorithms.rollout import cuda_graphs
from algorithms.rollout.cached_engine import CachedEngine
from algorithms.rollout.config import RolloutConfig
from algorithms.rollout.cuda_graphs import CudaGraphs, decided_recorder
from algorithms.rollout.recorded_steps import unrecorded


@pytest.fixture
def gpu():
    with pretended_gpu() as pretended:
        yield pretended


REAL = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=["pretended", pytest.param("real", marks=REAL)])
def either_gpu(request):
    """The pretended GPU, and with `-m gpu` the real one."""
    with pretended_gpu() if request.param == "pretended" else nullcontext():
        yield


# --- the pretended GPU itself ----------------------------------------------------------------------------------------


def test_it_refuses_what_a_gpu_refuses(gpu):
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert (here.device.type, there.device.type, (there * 2)[1:].device.type) == ("cpu", "cuda", "cuda")
    for mix in (lambda: here + there, lambda: torch.cat((there, here)), lambda: there @ here):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(there)
    assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2]  # a number is at home everywhere
    assert there.to(here).device.type == there.cpu().device.type == "cpu"
    assert here.to(there).device.type == here.new_tensor([1.0], device="cuda").device.type == "cuda"
    assert copy.deepcopy(torch.nn.Linear(2, 2).to("cuda")).weight.device.type == "cuda"


def test_it_counts_waits_and_launches(gpu):
    there = torch.arange(4.0).pin_memory().to("cuda", non_blocking=True)
    assert not gpu.waits
    assert gpu.launches == {"copy to the GPU": 1}
    gpu.reset()
    waits = (
        lambda: there.sum().item(),
        lambda: bool((there > 1).any()),
        lambda: there.cpu(),
        lambda: there.tolist(),
        lambda: there[there > 1],
        lambda: torch.nonzero(there),
        lambda: torch.ones(4).to("cuda"),
        lambda: torch.ones(4).to("cuda", non_blocking=True),
        lambda: there.copy_(torch.ones(4), non_blocking=True),
        lambda: torch.ones(4).copy_(there, non_blocking=True),
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: there.unique(),
    )
    for count, wait in enumerate(waits, 1):
        wait()
        assert sum(gpu.waits.values()) == count
    gpu.reset()
    _ = (there.view(2, 2).T + 1).sum()
    assert gpu.launches == {"aten::add": 1, "aten::sum": 1}
    assert not gpu.waits


def test_a_copy_to_the_host_is_there_when_the_host_has_waited(gpu):
    there, here, event = torch.arange(3.0, device="cuda"), torch.zeros(3, pin_memory=True), torch.cuda.Event()
    here.copy_(there, non_blocking=True)
    event.record()
    there.add_(1)
    assert not gpu.waits
    assert here.tolist() != [0, 1, 2]
    event.synchronize()
    assert here.tolist() == [0, 1, 2], "as it was when the copy began"
    assert gpu.waits == {"event": 1}


def test_a_graph_replays_operations_on_the_tensors_of_the_recording(gpu):
    numbers, factor, graph = torch.arange(3.0, device="cuda"), 2, torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = torch.zeros(3, device="cuda").add_(numbers * factor)[1:] + 1
    numbers.add_(10)
    factor = 5
    gpu.reset()
    graph.replay()
    assert total.tolist() == [23, 25], "Python is not run again, and zeros are zeros again"
    assert gpu.launches == {"CUDA graph": 1}


@pytest.mark.parametrize(
    "act",
    [
        lambda there: there.sum().item(),
        lambda there: there[there > 1],
        lambda there: there.cpu(),
        lambda there: torch.ones(3).to("cuda", non_blocking=True),
        lambda there: there.copy_(torch.ones(3), non_blocking=True),
    ],
)
def test_what_needs_the_host_cannot_be_recorded(act, gpu):
    there = torch.arange(3.0, device="cuda")
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        act(there)
    assert there.tolist() == [0, 1, 2], "the recording is over"


def test_it_is_gone_afterwards():
    with pretended_gpu():
        pass
    assert torch.ones(1).device.type == "cpu"
    assert not torch.cuda.is_available()


# --- the zoo ---------------------------------------------------------------------------------------------------------


def moved(batch: Batch) -> Batch:
    """The batch on the GPU."""
    for name in batch.__slots__:
        if isinstance(value := getattr(batch, name), torch.Tensor):
            setattr(batch, name, value.to("cuda"))
    return batch


@pytest.mark.parametrize("name", ZOO)
def test_a_step_of_every_algorithm(name, either_gpu):
    learner = make_learner(build(name), device="cuda", precision="float32")
    batch = moved(batch_of_groups())
    learner.score(batch)
    metrics = learner.update(batch, np.random.default_rng(0))
    learner.validate(batch)
    assert next(learner.policy.parameters()).device.type == "cuda"
    other = make_learner(build(name))
    here = batch_of_groups()
    other.score(here)
    assert metrics == pytest.approx(other.update(here, np.random.default_rng(0)), rel=1e-4, abs=1e-5)


BRIEF = [
    "algo.steps=2", "algo.warm_start.epochs=1", "num_envs=4", "evaluation.num_questions=3",
    "evaluation.num_dev_questions=2", "evaluation.every=1", "probe_every=2",
    "probes=[search_behaviour,source_referencing]",
]  # fmt: skip


def test_a_whole_run_and_its_evaluation(gpu, tmp_path, cache):
    """Warm start, rollouts, critic, checks, the probes' generator, checkpoints and the final evaluation."""
    run = train(tmp_path / "run", cache, *DGPO, *BRIEF)
    assert run.summary["machine"]["device"] == "cuda"
    assert gpu.launches["aten::_fused_adamw_"]

    def evaluated(name, *settings):
        arguments = ["evaluate", f"checkpoint={run.path}", f"hydra.run.dir={tmp_path / name}", *settings]
        with patch.object(sys, "argv", arguments):
            evaluate.main()
        return json.loads((tmp_path / name / "summary.json").read_text())

    measured = evaluated("eager")
    assert measured["evaluation"]["checkpoint"] == run.summary["evaluation"]["dgpo"]
    assert measured["cuda_graphs"] == "no (rollout.cuda_graphs=off)"
    assert not gpu.launches["CUDA graph"]
    measured = evaluated("graphs", "rollout.cuda_graphs=auto", "rollout.decode_during_search=4")
    assert measured["evaluation"]["checkpoint"]["greedy"]["all"]["n"] == 3
    assert measured["cuda_graphs"] == "yes (auto: greedy tokens are the same)"
    assert gpu.launches["CUDA graph"] > 100, "the player's and the generator's, beside those that are compared"


# --- rollouts --------------------------------------------------------------------------------------------------------


def make_rollout(device: str, precision: str = "float32", recorder=None, **settings):
    player = make_player(
        make_policy("pieces", seed=4).to(device),
        make_tokenizer("pieces"),
        make_envs(4),
        RolloutConfig(max_new_tokens=16, max_tokens=300, **settings),
        precision=precision,
        recorder=recorder,
    )
    return [
        (turn.action_ids.tolist(), turn.action_logprobs.tolist())
        for episode in player.rollout(range(8), seed=(1,))[0]
        for turn in episode.turns
    ]


@pytest.mark.parametrize("recorder", [None, CudaGraphs], ids=["eager", "graphs"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_p": 0.8, "top_k": 5}])
def test_a_rollout_is_the_same_on_both(settings, recorder, either_gpu):
    there = make_rollout("cuda", recorder=recorder, **settings)
    for one, other in zip(there, make_rollout("cpu", **settings), strict=True):
        assert one[0] == other[0]
        assert one[1] == pytest.approx(other[1], abs=1e-4)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}])
def test_graphs_replay_exactly_what_is_computed_without_them(settings, either_gpu):
    """In bfloat16, at the same shapes."""
    graphs, plain = (
        make_rollout("cuda", "bfloat16", recorder, **settings) for recorder in (CudaGraphs, lambda: unrecorded)
    )
    assert graphs == plain


class Spoiled(CudaGraphs):
    """Replays give the first result again, as if the inputs had been baked in."""

    def __call__(self, compute):
        first = super().__call__(compute)().clone()
        return lambda: first


class Refused(CudaGraphs):
    """The driver refuses to record."""

    def __call__(self, compute):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nAnd more.")


def test_whether_graphs_are_used(gpu, monkeypatch):
    model, tokenizer = make_policy("pieces", seed=4).to("cuda"), make_tokenizer("pieces")

    def decided(setting):
        return decided_recorder(setting, model, tokenizer, "bfloat16")

    assert decided("off") == (None, "rollout.cuda_graphs=off")
    assert not gpu.launches["CUDA graph"]
    assert decided("auto") == (CudaGraphs, "auto: greedy tokens are the same")
    assert gpu.launches["CUDA graph"] >= 31
    for trouble, said in (
        (Spoiled, "auto: greedy tokens differ in 4 of 4 rows"),
        (Refused, "auto: recording fails (RuntimeError: CUDA error: operation not permitted when stream is capturing)"),
    ):
        monkeypatch.setattr(cuda_graphs, "CudaGraphs", trouble)
        assert decided("auto") == (None, said)
        assert decided("on") == (trouble, "rollout.cuda_graphs=on")


def test_a_recording_that_fails_leaves_nothing_behind(gpu):
    calls = []

    def reads_on_the_host():
        calls.append(gpu.stream)
        if gpu.stream == "recordings":
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaGraphs()(reads_on_the_host)
    assert calls == ["usual", "recordings"]
    assert gpu.stream == "usual"


def test_a_machine_without_a_gpu_has_no_graphs():
    model, tokenizer = make_policy("pieces"), make_tokenizer("pieces")
    assert decided_recorder("auto", model, tokenizer, "float32") == (None, "auto: there is no GPU")
    with pytest.raises(ConfigurationError, match="needs a GPU"):
        decided_recorder("on", model, tokenizer, "float32")


# --- search ----------------------------------------------------------------------------------------------------------


def test_exact_search_is_the_same_on_both(either_gpu):
    draws = np.random.default_rng(0)
    vectors, queries = (draws.standard_normal((n, 16), dtype=np.float32) for n in (400, 7))
    here, there = (TorchSearch(vectors, device).propose(queries, 5) for device in ("cpu", "cuda"))
    np.testing.assert_array_equal(there.rows, here.rows)
    np.testing.assert_allclose(there.scores, here.scores, rtol=1e-4)


# --- budgets ---------------------------------------------------------------------------------------------------------

LAYERS, WIDE = 24, 151_936


def deep_model(seed: int = 0) -> Qwen2ForCausalLM:
    """The number of layers and ids of Qwen2.5-0.5B, and hardly any width."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=WIDE, num_hidden_layers=LAYERS, tie_word_embeddings=True, **sizes)
    return Qwen2ForCausalLM(config).eval().to("cuda")


def growth(gpu: PretendedGpu, times: int, small: Callable[[], object], large: Callable[[], object]) -> list[float]:
    """Waits and launches of one more step, from two acts that differ by this many steps."""
    counts = []
    for act in (small, large):
        gpu.reset()
        act()
        counts.append((sum(gpu.waits.values()), sum(gpu.launches.values())))
    return [(after - before) / times for before, after in zip(*counts, strict=True)]


#: A norm counts as the six operations of a CPU; a GPU launches one.
@pytest.mark.parametrize(
    ("precision", "recorder", "most_launches"),
    [("float32", None, 850), ("bfloat16", None, 1050), ("bfloat16", CudaGraphs, 4)],
)
def test_a_decode_step_waits_once_and_launches_no_more_than_its_budget(precision, recorder, most_launches, gpu):
    model, tokenizer = deep_model(), make_tokenizer("pieces")

    def write(num_tokens: int) -> None:
        config = RolloutConfig(max_new_tokens=num_tokens, max_tokens=40)
        settings = {"vocab_size": len(tokenizer), "precision": precision, "recorder": recorder}
        engine = CachedEngine(model, tokenizer, config, num_rows=3, action_ends=["</never>"], **settings)
        for row in range(3):
            engine.open(row, np.arange(21 + row), np.full(num_tokens, 0.1))
        assert [len(action.ids) for action in engine.write()] == [num_tokens] * 3

    waits, launches = growth(gpu, 4, lambda: write(3), lambda: write(7))
    print(f"decode step, {precision}, {recorder}: {waits} waits, {launches} launches")
    assert waits == 1
    assert launches <= most_launches


#: Waits and launches of one more micro-batch with one chunk of tokens. The host only asks whether the chunk's numbers
#: are finite: logits and entropies; divergences, too, where there are any. DGPO's count has the critic's passes in it.
MICRO_BATCH = {"dgpo": (2, 7600), "kd": (5, 5000)}


@pytest.mark.parametrize("name", MICRO_BATCH)
def test_a_micro_batch_keeps_to_its_budget(name, gpu):
    def update(num_rows: int) -> None:
        algorithm = build(name, batch_size=num_rows)
        policy, needs = deep_model(), algorithm.needs
        learner = Learner(
            algorithm,
            policy,
            critic=Critic(policy) if "values" in needs else None,
            reference=freeze(deep_model(1)) if "ref_logprobs" in needs else None,
            teacher=freeze(deep_model(2)) if any(need.startswith("teacher") for need in needs) else None,
            config=LearnerConfig(micro_batch_tokens=1),
            total_steps=10,
            vocab_size=WIDE,
        )
        batch = moved(make_batch(num_rows=num_rows))
        learner.score(batch)
        gpu.reset()
        learner.update(batch, np.random.default_rng(0))

    waits, launches = growth(gpu, 2, lambda: update(2), lambda: update(4))
    print(f"micro-batch of {name}: {waits} waits, {launches} launches; {gpu.places.most_common(9)}")
    most_waits, most_launches = MICRO_BATCH[name]
    assert waits <= most_waits
    assert launches <= most_launches
