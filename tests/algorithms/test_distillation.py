"""GKD, DistiLLM and TAID: whose trajectories they train on, and schedules followed by hand."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from small_runs import SFT, assert_same_training, resume, train
from torch import Tensor

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.types import Passage
from algorithms.distillm import DistiLLM, DistiLLMConfig
from algorithms.gkd import GKD, GKDConfig
from algorithms.learner import ops
from algorithms.learner.algorithm import Progress
from algorithms.learner.types import Tokens, Trajectory, Turn
from algorithms.rollout.replay import Replay
from algorithms.taid import TAID, TAIDConfig

RAW = "algo.warm_start=null"


def tokens(seed: int = 0, n: int = 5, vocab: int = 7) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 2 * torch.randn(2, n, vocab, dtype=torch.float64, generator=generator)
    ids = torch.arange(n)
    return Tokens(
        ids=ids,
        sequence_ids=ids,
        correct=ids > 2,
        old_logprobs=torch.zeros(n),
        logprobs=ops.gather_logprobs(student, ids),
        logits=student.requires_grad_(),
        teacher_logits=teacher,
    )


def probabilities(part: Tokens) -> tuple[Tensor, Tensor]:
    return torch.softmax(part.teacher_logits, -1), torch.softmax(part.logits.detach(), -1)


class Fixed:
    """Stands in for a generator whose next draw is known."""

    def __init__(self, draw: float) -> None:
        self.draw = draw

    def random(self) -> float:
        return self.draw


# --- GKD -------------------------------------------------------------------------------------------------------------


def test_gkd_loss_written_out():
    part = tokens()
    p, q = probabilities(part)
    m = 0.1 * p + 0.9 * q
    expected = 0.1 * (p * (p / m).log()).sum(-1) + 0.9 * (q * (q / m).log()).sum(-1)
    loss = GKD(GKDConfig(jsd_beta=0.1)).token_loss(part)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    forward = GKD(GKDConfig(jsd_beta=0.0)).token_loss(part)
    torch.testing.assert_close(forward, (p * (p / q).log()).sum(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("fraction", "sources"), [(0.0, {"teacher"}), (1.0, {"policy"}), (0.3, {"policy", "teacher"})])
def test_gkd_declares_only_the_sources_that_it_uses(fraction, sources):
    algorithm = GKD(GKDConfig(on_policy_fraction=fraction))
    assert algorithm.trains_on == sources
    rng = np.random.default_rng(0)
    drawn = [algorithm.source(Progress(step, 1000), rng) for step in range(1000)]
    assert set(drawn) == sources
    # 0.3 of 1,000 draws, four standard errors of the binomial distribution
    assert abs(drawn.count("policy") - 1000 * fraction) <= 4 * math.sqrt(1000 * 0.3 * 0.7)


def test_gkd_draws_as_many_steps_from_rollouts_as_it_would_from_demonstrations():
    assert GKD(GKDConfig(num_demonstrations=40, batch_size=16, epochs=5)).num_steps(33) == 5 * 3
    on_policy = GKD(GKDConfig(num_demonstrations=40, batch_size=16, epochs=5, on_policy_fraction=1.0))
    assert on_policy.num_steps(0) == 5 * 3


def test_gkd_on_policy_has_no_demonstrations_to_hold_out():
    with pytest.raises(ConfigurationError, match=r"num_validation must be 0, as on_policy_fraction=1 .*, got 8"):
        GKDConfig(on_policy_fraction=1.0, num_validation=8)


def test_gkd_on_policy_needs_no_demonstrations(tmp_path, cache):
    run = train(
        tmp_path / "run", cache, "algo=gkd", RAW, *SFT, "algo.on_policy_fraction=1", "algo.sampling_temperature=0.5"
    )
    assert run.summary["demonstrations"] == {}
    steps = 2 * 3
    costs = run.summary["costs"]
    assert costs["policy_batches"] == steps
    assert "teacher_batches" not in costs
    assert costs["episodes"] == 8 * steps
    assert costs["teacher_scored_tokens"] == costs["trained_tokens"] > 0
    assert all(math.isfinite(row["train/loss"]) for row in run.metrics)
    assert all("rollout/exact_match" in row for row in run.metrics)
    # At another temperature than the losses see, nothing is compared with the policy that sampled.
    assert not any({"rollout/logprob_gap_mean", "train/approx_kl"} & row.keys() for row in run.metrics)


def test_gkd_mixes(tmp_path, cache):
    run = train(tmp_path / "run", cache, "algo=gkd", RAW, *SFT, "algo.epochs=4")
    costs = run.summary["costs"]
    assert costs["policy_batches"] + costs["teacher_batches"] == 12
    assert costs["policy_batches"] >= 1
    assert costs["teacher_batches"] >= 1
    assert sum("rollout/exact_match" in row for row in run.metrics) == costs["policy_batches"]


# --- DistiLLM --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_distillm_losses_written_out(alpha):
    part = tokens()
    p, q = probabilities(part)
    forward, reverse = alpha * p + (1 - alpha) * q, (1 - alpha) * p + alpha * q
    for name, expected in (("skew_forward", p * (p / forward).log()), ("skew_reverse", q * (q / reverse).log())):
        loss = DistiLLM(DistiLLMConfig(divergence=name, skew_alpha=alpha)).token_loss(part)
        torch.testing.assert_close(loss, expected.sum(-1), rtol=0, atol=1e-12)


def test_distillm_raises_its_share_when_the_validation_loss_has_risen():
    algorithm = DistiLLM(DistiLLMConfig(tolerance=0.1, share_increment=0.1))
    shares = []
    # compared with the loss at the last rise: 1.0, then 1.2, then 1.4
    for loss in (1.0, 1.05, 0.5, 1.2, 1.25, 1.4, 1.0, 1.49):
        algorithm.after_validation(loss)
        shares.append(round(algorithm.policy_share, 12))
    assert shares == [0, 0, 0, 0.1, 0.1, 0.2, 0.2, 0.2]
    for loss in range(10, 30):
        before = algorithm.policy_share
        algorithm.after_validation(float(loss))
        assert before <= algorithm.policy_share <= 1
    assert algorithm.policy_share == 1


@pytest.mark.parametrize(
    ("schedule", "step", "full", "draw", "source"),
    [
        ("decreasing", 25, True, 0.29, "policy"),  # 0.4 (1 - 25/100) = 0.3
        ("decreasing", 25, True, 0.31, "replay"),
        ("decreasing", 25, True, 0.41, "teacher"),
        ("decreasing", 25, False, 0.39, "policy"),  # until the replay is full, all of the share is fresh
        ("decreasing", 25, False, 0.41, "teacher"),
        ("increasing", 25, True, 0.09, "policy"),  # 0.4 * 25/100 = 0.1
        ("increasing", 25, True, 0.11, "replay"),
        ("constant", 25, True, 0.19, "policy"),
        ("constant", 25, True, 0.21, "replay"),
    ],
)
def test_distillm_draws_its_source(schedule, step, full, draw, source):
    algorithm = DistiLLM(DistiLLMConfig(fresh_schedule=schedule))
    algorithm.policy_share = 0.4
    assert algorithm.source(Progress(step, 100, 5, full), Fixed(draw)) == source


def test_distillm_generates_nothing_without_a_share_and_nothing_at_the_end():
    algorithm = DistiLLM(DistiLLMConfig())
    rng = np.random.default_rng(0)
    assert {algorithm.source(Progress(step, 500), rng) for step in range(500)} == {"teacher"}
    algorithm.policy_share = 1.0
    assert {algorithm.source(Progress(100, 100, 9, True), rng) for _ in range(500)} == {"replay"}


def test_distillm_refuses_a_replay_that_could_not_be_split_into_minibatches():
    with pytest.raises(ConfigurationError, match=r"replay_capacity must be at least num_minibatches \(4\), got 3"):
        DistiLLMConfig(num_minibatches=4, replay_capacity=3)


def test_distillm_needs_demonstrations_to_hold_out():
    with pytest.raises(ConfigurationError, match="num_validation must be an integer of at least 1, got 0"):
        DistiLLMConfig(num_validation=0)
    with pytest.raises(ConfigurationError, match=r"below num_demonstrations \(20\), got 32"):
        DistiLLMConfig(num_demonstrations=20)


#: Steps that change no weight leave the validation loss where it is, and without tolerance that counts as a rise.
NO_PROGRESS = [
    "algo=distillm", RAW, *SFT, "algo.epochs=5", "algo.num_validation=8", "algo.optimizer.learning_rate=1e-30",
    "algo.tolerance=0", "algo.share_increment=1", "algo.replay_capacity=20", "checkpoint_every=3",
]  # fmt: skip


@pytest.fixture(scope="module")
def distillm_run(tmp_path_factory, cache):
    """With every checkpoint kept."""
    return train(tmp_path_factory.mktemp("distillm") / "run", cache, *NO_PROGRESS, "keep_checkpoints=null")


def test_distillm_trains_on_all_sources(distillm_run):
    # 16 demonstrations to train on are 2 batches a pass; after the first pass the share is 1.
    shares = [row["train/policy_share"] for row in distillm_run.metrics]
    assert shares == [0, 0] + [1] * 8
    fresh = ["rollout/exact_match" in row for row in distillm_run.metrics]
    assert fresh[:5] == [False, False, True, True, True]  # 3 batches of 8 fill a replay of 20
    costs = distillm_run.summary["costs"]
    assert costs["teacher_batches"] == 2
    assert costs["policy_batches"] + costs["replay_batches"] == 8
    assert costs["replay_batches"] >= 1
    validated = [row["train/validation_loss"] for row in distillm_run.metrics if "train/validation_loss" in row]
    assert len(validated) == 1 + 5  # before the first step, and after every pass
    assert len(set(validated)) == 1


def test_distillm_resumes_with_its_replay(distillm_run, tmp_path):
    for stop in (3, 6):  # with one batch in the replay, and with a full one
        cut_off = tmp_path / str(stop)
        shutil.copytree(distillm_run.path, cut_off)
        for folder in (cut_off / "checkpoints").iterdir():
            if int(folder.name) > stop:
                shutil.rmtree(folder)
        config = cut_off / ".hydra" / "config.yaml"
        config.write_text(config.read_text().replace(str(distillm_run.path), str(cut_off)))
        assert_same_training(resume(cut_off), distillm_run)


def test_validation_loss_is_the_mean_over_held_out_tokens(tmp_path, cache):
    run = train(tmp_path / "run", cache, "algo=sft", *SFT, "algo.num_validation=4", "algo.batch_size=20")
    assert [row["step"] for row in run.metrics if "train/validation_loss" in row] == [1, 2]
    assert run.metrics[1]["train/validation_loss"] < run.metrics[0]["train/validation_loss"]


# --- replay ----------------------------------------------------------------------------------------------------------


def trajectory(number: int) -> Trajectory:
    info = {"question_id": f"q{number}", "turn": 1, "passages": (Passage(id="p", contents="é\nè", score=0.1),)}
    ids = np.arange(number, number + 3)
    turn = Turn(ids, np.array([-0.1, -1 / 3, -1e-7], dtype=np.float32), ids[:1], info)
    return Trajectory(ids, [turn], number, "policy", 0.5, False, True, False)


def test_replay_keeps_the_newest_and_comes_back_from_a_checkpoint():
    replay = Replay(4)
    assert (len(replay), replay.is_full) == (0, False)
    replay.add(trajectory(number) for number in range(6))
    assert (len(replay), replay.is_full) == (4, True)
    drawn = replay.sample(100, np.random.default_rng(0))
    assert sorted(each.group_id for each in drawn) == [2, 3, 4, 5]
    counts = np.zeros(6)
    rng = np.random.default_rng(1)
    for _ in range(2000):
        pair = replay.sample(2, rng)
        assert pair[0].group_id != pair[1].group_id
        counts[[each.group_id for each in pair]] += 1
    assert np.abs(counts[2:] - 1000).max() < 4 * math.sqrt(2000 * 0.25)
    other = Replay(4)
    other.load_state_dict(replay.state_dict())
    for mine, theirs in zip(
        replay.sample(4, np.random.default_rng(2)), other.sample(4, np.random.default_rng(2)), strict=True
    ):
        assert mine.group_id == theirs.group_id
        assert mine.turns[0].info == theirs.turns[0].info
        assert np.array_equal(mine.turns[0].action_logprobs, theirs.turns[0].action_logprobs)
    assert replay.state_dict() == other.state_dict()


# --- TAID ------------------------------------------------------------------------------------------------------------


def run_schedule(algorithm: TAID, losses: list[float], num_steps: int | None = None) -> list[float]:
    """Where t is after the first steps of a stage, which has as many steps as losses unless a number is given."""
    places = []
    for step, loss in enumerate(losses):
        algorithm.after_step({"loss": loss, "progress": step / (num_steps or len(losses))})
        places.append(algorithm.t)
    return places


def test_taid_schedule_by_hand():
    config = TAIDConfig(t_start=0.2, t_end=1.0, step_size=0.5, momentum=0.9)
    algorithm = TAID(config)
    t1, t2, t3, _ = run_schedule(algorithm, [2.0, 1.0, 1.5, 1.0])
    # step 1 only remembers the loss
    assert t1 == 0.2
    # step 2: fall (2 - 1) / 2 = 0.5, running mean 0.05, so t goes 0.5 sigmoid(0.05) of the 0.8 left; line at 0.4
    assert t2 == pytest.approx(0.2 + 0.5 * 0.8 / (1 + math.exp(-0.05)), abs=1e-12)
    assert t2 > 0.4
    # step 3: fall (1 - 1.5) / 1 = -0.5, running mean 0.045 - 0.05, so 0.553; the line is at 0.6
    assert t3 == pytest.approx(0.6, abs=1e-12)


def test_taid_schedule_is_that_of_the_authors_code():
    """The figures are what SakanaAI/TAID (a062892) answers to these losses, in float64."""
    assert run_schedule(TAID(TAIDConfig()), [1.0] * 100)[:4] == pytest.approx([0.4, 0.406, 0.412, 0.418], abs=1e-12)
    losses = [2.0, 1.6, 1.7, 1.0, 0.9, 0.95, 0.5, 0.4]
    ahead = TAID(TAIDConfig(t_start=0.4, t_end=0.95, step_size=0.3, momentum=0.8))
    expected = [0.4, 0.491799760038, 0.568773015333, 0.636622528802, 0.693807689953, 0.74375, 0.8125, 0.88125]
    assert run_schedule(ahead, losses) == pytest.approx(expected, abs=1e-11)


def test_taid_runs_ahead_of_the_line_where_the_loss_falls():
    losses = [math.exp(-step / 30) for step in range(100)]
    places = run_schedule(TAID(TAIDConfig(t_start=0.2, step_size=0.05)), losses)
    line = [0.2 + 0.8 * step / 100 for step in range(100)]
    assert all(place >= at - 1e-12 for place, at in zip(places, line, strict=True))
    assert places[50] > line[50] + 0.1
    assert places == sorted(places)
    assert places[-1] <= 1.0


@pytest.mark.parametrize("losses", [[1.0] * 20, list(np.random.default_rng(0).exponential(size=20))])
def test_taid_without_adaptation_follows_the_line(losses):
    places = run_schedule(TAID(TAIDConfig(t_start=0.4, t_end=0.9, step_size=0.0)), losses)
    assert places == pytest.approx([0.4 + 0.5 * step / 20 for step in range(20)], abs=1e-12)


def test_taid_with_a_constant_loss_goes_half_its_step():
    algorithm = TAID(TAIDConfig(t_start=0.0, step_size=0.1))
    algorithm.after_step({"loss": 1.0, "progress": 0.0})
    before = algorithm.t
    algorithm.after_step({"loss": 1.0, "progress": 0.0})
    assert algorithm.t - before == pytest.approx(0.1 / 2 * (1 - before), abs=1e-12)


def test_taid_adapts_after_a_loss_of_zero():
    """At t = 0 the target is the student itself, so the first loss is 0, and no fall is measured from it."""
    algorithm = TAID(TAIDConfig(t_start=0.0, step_size=0.1))
    third = 0.01 + 0.1 * 0.99 / (1 + math.exp(-0.01 * 0.2))  # 0.2 is the first fall, from 0.5 to 0.4
    fourth = third + 0.1 * (1 - third) / (1 + math.exp(-(0.99 * 0.01 * 0.2 + 0.01 * 0.25)))
    found = run_schedule(algorithm, [0.0, 0.5, 0.4, 0.3], num_steps=100)
    assert found == pytest.approx([0.0, 0.01, third, fourth], abs=1e-12)
    assert third > 0.02
    assert fourth > 0.03


def test_taid_loss_written_out_and_where_it_ends():
    part, algorithm = tokens(), TAID(TAIDConfig())
    algorithm.t = 0.3
    target = torch.softmax(0.7 * part.logits.detach() + 0.3 * part.teacher_logits, -1)
    _, q = probabilities(part)
    loss = algorithm.token_loss(part)
    torch.testing.assert_close(loss.detach(), (target * (target / q).log()).sum(-1), rtol=0, atol=1e-12)
    loss.sum().backward()
    torch.testing.assert_close(part.logits.grad, q - target, rtol=0, atol=1e-12)


def test_taid_state_goes_on_where_it_was():
    losses = [1.0, 0.7, 0.9, 0.4, 0.5, 0.3]
    whole = TAID(TAIDConfig(step_size=0.2))
    expected = run_schedule(whole, losses)
    first = TAID(TAIDConfig(step_size=0.2))
    for step, loss in enumerate(losses[:3]):
        first.after_step({"loss": loss, "progress": step / 6})
    second = TAID(TAIDConfig(step_size=0.2))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step, loss in enumerate(losses[3:], 3):
        second.after_step({"loss": loss, "progress": step / 6})
    assert second.t == expected[-1]


def test_taid_moves_once_a_step_and_validation_does_not_move_it(tmp_path, cache):
    run = train(tmp_path / "run", cache, "algo=taid", *SFT, "algo.step_size=0", "algo.num_validation=4")
    # 20 demonstrations in batches of 8, twice: 6 steps; what is logged is where the loss was taken, before t moves
    assert [row["train/taid_t"] for row in run.metrics] == pytest.approx([0.4, 0.4, 0.5, 0.6, 0.7, 0.8])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"t_start": 0.9, "t_end": 0.5}, r"t_start must be at most t_end \(0.5\), got 0.9"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"num_minibatches": 2}, "num_minibatches must be 1, as t moves once a step, got 2"),
    ],
)
def test_taid_refuses(setting, message):
    with pytest.raises(ConfigurationError, match=message):
        TAIDConfig(**setting)
