"""Rollouts against plain forward passes, a naive player that recomputes everything, and a replay in the environment."""

from __future__ import annotations

import copy
from datetime import datetime

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_policy import SPELLINGS, TAGS, make_envs, make_player, make_policy, make_tokenizer, make_world
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from agentic_rag_env.env import AgenticRAGEnv
from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.lifted import LiftedVectorEnv
from agentic_rag_env.probes import Prompt
from agentic_rag_env.retrievers.bm25 import BM25Config, BM25Retriever
from agentic_rag_env.spaces import FreeText
from agentic_rag_env.types import Ending
from agentic_rag_env.vector import AgenticRAGVectorEnv
from algorithms.learner.collate import collate, predicting_positions
from algorithms.learner.seeding import rng
from algorithms.learner.types import Trajectory, Turn
from algorithms.rollout import cached_engine, kv_cache
from algorithms.rollout.config import RolloutConfig
from algorithms.rollout.engine import Action
from algorithms.rollout.generator import Generator
from algorithms.rollout.player import Player
from algorithms.rollout.sampling import sample
from algorithms.rollout.tokenization import decode, encode_plain, encode_prompts, opened_thought
from algorithms.rollout.trajectory_files import pack, unpack
from algorithms.training.batches import without_failed_searches
from algorithms.training.episode_figures import trajectory_metrics

CLOSING = ("</search>", "</answer>")
BASE = {"max_new_tokens": 20, "max_tokens": 400}


def make_toy_player(spelling="whole", seed=0, num_envs=3, world=None, env_settings=None, model=None, **config):
    model = model or make_policy(spelling, seed)
    envs = make_envs(num_envs, world, **(env_settings or {}))
    return make_player(model, make_tokenizer(spelling), envs, RolloutConfig(**{**BASE, **config}))


def full_ids(trajectory: Trajectory) -> np.ndarray:
    """What a model has read at the end of an episode."""
    return np.concatenate([trajectory.prompt_ids, *(turn.read_ids for turn in trajectory.turns)])


def plain_logprobs(model, trajectories, temperature=1.0) -> torch.Tensor:
    """Log-probs of all model-written tokens from one forward pass per trajectory, without cache, mask or padding."""
    logprobs = []
    for trajectory in trajectories:
        batch = collate([trajectory], pad_id=0)
        with torch.no_grad():
            logits = model(input_ids=batch.input_ids).logits[0].float() / (temperature or 1.0)
        _, columns = predicting_positions(batch.response_mask)
        tokens = batch.written_ids[batch.response_mask]
        logprobs.append(logits.log_softmax(-1)[columns, tokens])
    return torch.cat(logprobs)


def sampled_logprobs(trajectories) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([turn.action_logprobs for one in trajectories for turn in one.turns]))


def assert_same(ours: list[Trajectory], theirs: list[Trajectory], tolerance: float = 1e-4) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(full_ids(one), full_ids(other))
        assert [len(turn.action_ids) for turn in one.turns] == [len(turn.action_ids) for turn in other.turns]
        assert [turn.info for turn in one.turns] == [turn.info for turn in other.turns]
        for name in ("group_id", "reward", "correct", "terminated", "truncated"):
            assert getattr(one, name) == getattr(other, name), name
    torch.testing.assert_close(sampled_logprobs(ours), sampled_logprobs(theirs), atol=tolerance, rtol=0)


def play_naively(player: Player, questions, seed) -> list[Trajectory]:
    """One episode after the other in the single environment, the whole history through the model for every token."""
    config, tokenizer, model = player.engine.config, player.engine.tokenizer, player.engine.model
    eos = tokenizer.eos_token_id
    trajectories = []
    for number, question in enumerate(questions):
        rules = player.envs.rules
        env = AgenticRAGEnv(
            dataset=player.envs.dataset,
            retriever=player.envs.retriever,
            max_turns=rules.max_turns,
            top_k=player.envs.top_k,
        )
        text, _ = env.reset(options={"question_index": question})
        draws = rng(*seed, "episode", number)
        prompt = encode_plain(tokenizer, [text])[0]
        ids, turns, total = prompt.tolist(), [], 0.0
        while True:
            uniforms = draws.random(config.max_new_tokens)
            action, logprobs = [], []
            while True:
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
                token = choose(logits, uniforms[len(action)], config)
                action.append(token)
                ids.append(token)
                logprobs.append(float((logits / (config.temperature or 1.0)).log_softmax(-1)[token]))
                written = tokenizer.decode(action)
                if token == eos or any(tag in written for tag in CLOSING):
                    break
                if len(action) == config.max_new_tokens or len(ids) == config.max_tokens:
                    break
            text, reward, terminated, truncated, info = env.step(
                tokenizer.decode(action[:-1] if token == eos else action)
            )
            total += float(reward)
            observation = encode_plain(tokenizer, [text])[0]
            ended = terminated or truncated
            end_unread = token == eos and len(observation) > 0  # Search-R1 goes on without it
            told = len(action) - end_unread
            if not ended and len(ids) - len(action) + told + len(observation) >= config.max_tokens:
                ended, info = True, info | {"ending": Ending.OUT_OF_TOKENS}
            kept = observation[:0] if ended else observation
            end_unread = end_unread and not ended
            if end_unread:
                ids.pop()
            written = np.array(action, dtype=np.int64)
            turns.append(Turn(written, np.array(logprobs, dtype=np.float32), kept, info, end_unread))
            ids += kept.tolist()
            if ended:
                break
        trajectories.append(
            Trajectory(prompt, turns, number, "policy", total, info["correct"], terminated, not terminated)
        )
    return trajectories


def choose(logits: torch.Tensor, uniform: float, config: RolloutConfig) -> int:
    """The smallest id whose cumulative probability exceeds the uniform number (all of them, no top-p, no top-k)."""
    if config.temperature == 0:
        return int(logits.argmax())
    probabilities = (logits / config.temperature).softmax(-1).numpy()
    return int(np.argmax(np.cumsum(probabilities) > uniform * probabilities.sum()))


@settings(max_examples=30, deadline=None)
@given(
    spelling=st.sampled_from(sorted(SPELLINGS)),
    seed=st.integers(0, 10_000),
    num_envs=st.integers(1, 6),
    temperature=st.sampled_from([0.0, 0.6, 1.0, 1.4]),
    top_p=st.sampled_from([1.0, 0.8]),
    top_k=st.sampled_from([0, 5]),
    max_new_tokens=st.integers(1, 24),
    max_tokens=st.integers(40, 300),
    max_turns=st.integers(1, 3),
    final_turn=st.sampled_from(["none", "no_search", "forced"]),
    group=st.integers(1, 4),
)
def test_any_rollout_is_what_the_model_and_the_environment_say(
    spelling, seed, num_envs, temperature, top_p, top_k, max_new_tokens, max_tokens, max_turns, final_turn, group
):
    env_settings = {"max_turns": max_turns, "final_turn": final_turn}
    config = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    player = make_toy_player(
        spelling,
        seed,
        num_envs,
        make_world(seed),
        env_settings,
        max_new_tokens=max_new_tokens,
        max_tokens=max_tokens,
        **config,
    )
    questions = [index % 8 for index in range(seed, seed + 7)]
    groups = [number // group for number in range(7)]
    trajectories, stats = player.rollout(questions, seed=(seed, 1), group_ids=groups, source="teacher")

    expected = plain_logprobs(player.engine.model, trajectories, temperature)
    torch.testing.assert_close(sampled_logprobs(trajectories), expected, atol=1e-4, rtol=0)
    assert len(expected) == int(collate(trajectories, 0).response_mask.sum())
    malformed = [t for trajectory in trajectories for t in trajectory.turns[:-1] if t.info["action"] == "malformed"]
    assert 0 <= stats.sampled_tokens - len(expected) <= len(malformed), "the end-of-text tokens left out"
    assert stats.computed_tokens == sum(trajectory.num_tokens - 1 for trajectory in trajectories)
    assert [trajectory.group_id for trajectory in trajectories] == groups
    assert {trajectory.source for trajectory in trajectories} == {"teacher"}
    single = AgenticRAGEnv(dataset=player.envs.dataset, top_k=2, **env_settings)
    for question, trajectory in zip(questions, trajectories, strict=True):
        assert trajectory.num_tokens == len(full_ids(trajectory)) <= max_tokens
        replay(single, question, trajectory, player)


def replay(env: AgenticRAGEnv, question: int, trajectory: Trajectory, player: Player) -> None:
    """The texts of the actions, given to a single environment, lead to the recorded transcript and result."""
    tokenizer, config = player.engine.tokenizer, player.engine.config
    eos = tokenizer.eos_token_id
    transcript, _ = env.reset(options={"question_index": question})
    reward, length = 0.0, len(trajectory.prompt_ids)
    for position, turn in enumerate(trajectory.turns):
        action = turn.action_ids.tolist()
        last = position == len(trajectory.turns) - 1
        limit = min(config.max_new_tokens, config.max_tokens - length)
        assert 1 <= len(action) <= limit
        assert turn.end_unread == (not last and action[-1] == eos)
        length += len(action) - turn.end_unread + len(turn.observation_ids)
        assert eos not in action[:-1]
        assert not any(tag in tokenizer.decode(action[:-1]) for tag in CLOSING)
        text = tokenizer.decode(action[:-1] if action[-1:] == [eos] else action)
        if last:
            assert action[-1] == eos or any(tag in text for tag in CLOSING) or len(action) == limit
        observation, step_reward, terminated, truncated, info = env.step(text)
        reward += float(step_reward)
        no_room = last and not terminated and not truncated
        assert turn.info == info | ({"ending": Ending.OUT_OF_TOKENS} if no_room else {})
        assert (terminated or truncated) <= last
        transcript += tokenizer.decode(action[:-1] if turn.end_unread else action) + ("" if last else observation)
        assert last == (not len(turn.observation_ids)) or observation == ""
        assert eos not in turn.observation_ids
    assert tokenizer.decode(full_ids(trajectory)) == transcript
    if not (terminated or truncated):
        assert length + len(tokenizer.encode(observation, split_special_tokens=True)) >= config.max_tokens
    assert (trajectory.terminated, trajectory.truncated) == (terminated, not terminated)
    assert (trajectory.reward, trajectory.correct) == (reward, info["correct"])


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_episodes_as_a_naive_player_for_any_number_of_environments(spelling, temperature):
    questions = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    model = make_policy(spelling, seed=4)
    engines = [
        make_toy_player(spelling, num_envs=num_envs, model=model, temperature=temperature) for num_envs in (1, 3, 8)
    ]
    expected = play_naively(engines[0], questions, seed=(5, 6))
    for player in engines:
        trajectories, _ = player.rollout(questions, seed=(5, 6))
        assert_same(trajectories, expected)


def test_the_toy_policies_do_search_and_answer():
    """Else the other tests would say little."""
    for spelling in ("whole", "pieces", "overrun"):
        trajectories, _ = make_toy_player(spelling, num_envs=8).rollout(list(range(8)) * 8, seed=(0,))
        turns = [turn for trajectory in trajectories for turn in trajectory.turns]
        assert {"search", "answer", "malformed"} == {turn.info["action"] for turn in turns}, spelling
        assert any(turn.info["passages"] and len(turn.observation_ids) for turn in turns)


def test_seed_and_position_decide_an_episode():
    player = make_toy_player(num_envs=4)
    first, _ = player.rollout([3] * 6, seed=(1, 2))
    again, _ = player.rollout([3] * 4, seed=(1, 2))
    other, _ = player.rollout([3] * 6, seed=(1, 3))
    assert_same(first[:4], again)
    texts = [tuple(full_ids(trajectory)) for trajectory in first]
    assert len(set(texts)) == len(texts)
    assert texts != [tuple(full_ids(trajectory)) for trajectory in other]


def test_greedy_ignores_the_seed():
    player = make_toy_player(num_envs=4, temperature=0.0)
    assert_same(player.rollout([0, 1, 2], seed=(1,))[0], player.rollout([0, 1, 2], seed=(2,))[0], tolerance=0)


def test_no_token_goes_through_the_model_twice():
    """With one environment nothing is padded, so the model sees exactly every token but the last of each episode."""
    player = make_toy_player(num_envs=1)
    seen = []
    player.engine.model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone())
    )
    trajectories, stats = player.rollout([0, 1, 2, 3], seed=(0,))
    expected = np.concatenate([full_ids(trajectory)[:-1] for trajectory in trajectories])
    np.testing.assert_array_equal(torch.cat([ids.flatten() for ids in seen]).numpy(), expected)
    assert stats.computed_tokens == len(expected)


def test_rows_that_wait_cost_nothing():
    """With many environments only the padding of appended texts is computed beside the tokens themselves."""
    player = make_toy_player(num_envs=8)
    appended, sampled = [], []

    def count(module, args):
        (sampled if args[0].shape[1] == 1 else appended).append(args[0].numel())

    player.engine.model.get_input_embeddings().register_forward_pre_hook(count)
    trajectories, stats = player.rollout(list(range(8)) * 3, seed=(0,))
    tokens_after_actions = sum(len(trajectory.turns) for trajectory in trajectories)
    assert sum(sampled) == stats.sampled_tokens - tokens_after_actions
    assert sum(appended) >= stats.computed_tokens - sum(sampled)


def test_a_changed_policy_is_played_as_it_is_now():
    player = make_toy_player(num_envs=4)
    player.rollout([0, 1, 2, 3], seed=(0,))
    with torch.no_grad():
        for parameter in player.engine.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    trajectories, _ = player.rollout([0, 1, 2, 3], seed=(0,))
    torch.testing.assert_close(
        sampled_logprobs(trajectories), plain_logprobs(player.engine.model, trajectories), atol=1e-4, rtol=0
    )


def test_training_mode_is_restored_and_dropout_off():
    model = make_policy("whole")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    player = make_toy_player(model=model)
    model.train()
    trajectories, _ = player.rollout([0, 1], seed=(0,))
    assert model.training
    torch.testing.assert_close(
        sampled_logprobs(trajectories), plain_logprobs(model.eval(), trajectories), atol=1e-4, rtol=0
    )


def test_growing_and_chunked_prefill_change_nothing(monkeypatch):
    questions = list(range(8))
    expected, _ = make_toy_player("bytes", num_envs=8).rollout(questions, seed=(3,))
    monkeypatch.setattr(kv_cache, "_FIRST_CAPACITY", 1)
    monkeypatch.setattr(cached_engine, "_MAX_PREFILL_TOKENS", 100)
    assert_same(make_toy_player("bytes", num_envs=8).rollout(questions, seed=(3,))[0], expected)


def test_keys_and_values_take_little_more_room_than_they_need():
    backbone, cache = make_policy("whole").base_model, kv_cache.EpisodeCache(2, 2000)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for start, stop in ((0, 5), (5, 70), (70, 1200), (1200, 1201), (1201, 1900)):
            positions = torch.arange(start, stop).expand(2, -1)
            cache.forward(backbone, torch.ones_like(positions), positions, length=int(positions.max()) + 1)
            keys, values = cache.stored
            assert keys.dtype == values.dtype == torch.bfloat16, "as attention reads them"
            assert keys.shape == values.shape
            assert stop <= keys.shape[2] < 2 * stop + 64
            assert keys.shape[2] <= 2000


def test_end_of_text_is_out_of_the_text_and_not_read_in_an_episode_that_goes_on():
    player = make_toy_player(model=make_policy("whole", eos_bias=50.0), num_envs=2)
    (trajectory,), _ = player.rollout([0], seed=(0,))
    eos = player.engine.tokenizer.eos_token_id
    assert [turn.action_ids.tolist() for turn in trajectory.turns] == [[eos], [eos], [eos]]
    assert [turn.end_unread for turn in trajectory.turns] == [True, True, False]
    hint = trajectory.turns[0].observation_ids.tolist()
    assert full_ids(trajectory).tolist() == [*trajectory.prompt_ids.tolist(), *hint, *hint, eos]
    assert {turn.info["action"] for turn in trajectory.turns} == {"malformed"}
    assert (trajectory.terminated, trajectory.truncated, trajectory.reward) == (False, True, 0.0)
    (restored,) = unpack(pack([trajectory]))
    assert [turn.end_unread for turn in restored.turns] == [True, True, False]
    assert full_ids(restored).tolist() == full_ids(trajectory).tolist()


def test_what_follows_a_malformed_turn_is_written_without_its_end_of_text():
    """The log-probability of every recorded token is that of one pass over the tokens read before it."""
    model = make_policy("whole", seed=1, eos_bias=4.0)
    trajectories, stats = make_toy_player(model=model).rollout(list(range(8)) * 2, seed=(0,))
    assert stats.sampled_tokens == sum(trajectory.num_action_tokens for trajectory in trajectories)
    unread = [turn for trajectory in trajectories for turn in trajectory.turns if turn.end_unread]
    assert {len(turn.action_ids) > 1 for turn in unread} == {True, False}
    torch.testing.assert_close(sampled_logprobs(trajectories), plain_logprobs(model, trajectories), atol=1e-4, rtol=0)


def test_every_end_of_text_id_of_the_generation_settings_ends_an_action():
    model = make_policy("whole")
    tokenizer = make_tokenizer("whole")
    also_eos = tokenizer.encode(" rome")[0]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, also_eos]
    with torch.no_grad():
        model.get_output_embeddings().bias[also_eos] = 50.0
    (trajectory,), _ = make_toy_player(model=model).rollout([0], seed=(0,))
    assert [turn.action_ids.tolist() for turn in trajectory.turns] == [[also_eos], [also_eos], [also_eos]]
    assert [turn.end_unread for turn in trajectory.turns] == [True, True, False]


def test_special_tokens_are_not_read_out_of_passages_but_tags_stay_whole():
    for spelling in SPELLINGS:
        tokenizer = make_tokenizer(spelling)
        text = "x<eos>y <search> z</search><answer>"
        (ids,) = encode_plain(tokenizer, [text])
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode("<eos>") == [tokenizer.eos_token_id]
        if spelling == "whole":
            assert {tokenizer.convert_tokens_to_ids(tag) for tag in ("<search>", "</search>", "<answer>")} <= set(ids)


def test_prompts_with_and_without_template_and_bos():
    tokenizer = copy.deepcopy(make_tokenizer("whole"))
    assert tokenizer.decode(encode_prompts(tokenizer, ["who ada?\n"])[0]) == "who ada?\n"
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    short, long = encode_prompts(tokenizer, ["who?", "who ada?\n"])
    assert tokenizer.decode(short) == "[user]who?<eos>[assistant]"
    assert tokenizer.decode(long) == "[user]who ada?\n<eos>[assistant]"
    assert tokenizer.eos_token_id in short


@pytest.mark.parametrize("day", [3, 4])
def test_a_template_that_writes_the_day_reads_the_same_on_any_day(day, monkeypatch):
    from transformers.utils import chat_template_utils

    class Calendar(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 5, day)

    monkeypatch.setattr(chat_template_utils, "datetime", Calendar)
    tokenizer = copy.deepcopy(make_tokenizer("whole"))
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ date_string }}{{ messages[0].content }}"
    )
    assert tokenizer.decode(encode_prompts(tokenizer, ["who?"])[0]) == "26 Jul 2024who?"


def test_bos_goes_before_the_prompt_only():
    from tokenizers.processors import TemplateProcessing

    plain = make_tokenizer("whole")
    backend = plain.backend_tokenizer.from_str(plain.backend_tokenizer.to_str())
    backend.add_special_tokens(["<bos>"])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")
    assert encode_prompts(tokenizer, [" ada"])[0].tolist() == [bos, *plain.encode(" ada")]
    assert encode_plain(tokenizer, [" ada"])[0].tolist() == plain.encode(" ada")


def test_no_text_has_no_ids():
    assert encode_plain(make_tokenizer("whole"), []) == []


class Sums(gymnasium.Env[str, str]):
    """Its tool is busy at first, and then it calls the answer wrong."""

    metadata = {"render_modes": [], "action_ends": ["</answer>"]}  # noqa: RUF012
    observation_space = action_space = FreeText()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turn = 0
        return "sum? ", {}

    def step(self, action):
        self.turn += 1
        if self.turn == 1:
            return "again ", 0.0, False, False, {"error": "the tool is busy"}
        return "", 0.0, True, False, {"correct": False, "answer": "x", "error": "division by zero"}


def test_an_error_that_an_environment_reports_is_no_failed_search():
    gymnasium.register("Sums-v0", Sums)
    try:
        envs = LiftedVectorEnv("Sums-v0", 2, range(10))
        player = make_player(make_policy("whole"), make_tokenizer("whole"), envs, RolloutConfig(**BASE))
        played, stats = player.rollout(range(4), seed=(0,))
    finally:
        del gymnasium.registry["Sums-v0"]
    assert [one.ending for one in played] == [Ending.ANSWERED] * 4
    assert [one.error for one in played] == [None] * 4
    assert stats.retriever_errors == 0
    assert without_failed_searches(played) == played
    assert trajectory_metrics(played, stats)["rollout/retriever_errors"] == 0


def test_an_episode_without_room_is_cut_off():
    player = make_toy_player("bytes", num_envs=2, max_tokens=60, max_new_tokens=30)
    trajectories, _ = player.rollout(list(range(8)), seed=(0,))
    for trajectory in trajectories:
        assert trajectory.num_tokens <= 60
        if trajectory.turns[-1].info["action"] != "answer":
            assert (trajectory.truncated, trajectory.reward, trajectory.correct) == (True, 0.0, False)
            assert not len(trajectory.turns[-1].observation_ids)
            assert [turn.info["ending"] for turn in trajectory.turns[:-1]] == [None] * (len(trajectory.turns) - 1)
    endings = {trajectory.turns[-1].info["ending"] for trajectory in trajectories}
    assert "out_of_tokens" in endings
    assert endings <= {"answered", "out_of_turns", "out_of_tokens"}
    assert any(len(trajectory.turns) == 1 and trajectory.truncated for trajectory in trajectories)


def test_the_reward_sees_an_episode_that_is_cut_off():
    outcomes = []

    def reward(outcome):
        outcomes.append(outcome)
        return 1.0 if outcome.answer is not None else -0.5

    player = make_toy_player(num_envs=4, max_tokens=60, env_settings={"reward": reward})
    trajectories, _ = player.rollout(list(range(8)) * 2, seed=(0,))
    assert {trajectory.terminated for trajectory in trajectories} == {True, False}
    assert any(len(trajectory.turns) < 3 for trajectory in trajectories if not trajectory.terminated)
    assert [trajectory.reward for trajectory in trajectories] == [
        1.0 if trajectory.terminated else -0.5 for trajectory in trajectories
    ]
    engine = player.engine
    played = [
        tuple(
            (engine.action_end.text(turn.action_ids), decode(engine.tokenizer, turn.observation_ids.tolist()))
            for turn in trajectory.turns
        )
        for trajectory in trajectories
    ]  # fmt: skip
    assert sorted(outcome.turns for outcome in outcomes) == sorted(played)


def test_room_is_counted_to_the_token():
    """Actions are an end-of-text token alone; then either nothing fits behind the hint, or exactly one token does."""
    model, tokenizer = make_policy("whole", eos_bias=50.0), make_tokenizer("whole")
    (full,), _ = make_toy_player(model=model, max_tokens=512, env_settings={"max_turns": 2}).rollout([0], seed=(0,))
    hint = full.turns[0].observation_ids
    assert tokenizer.decode(hint).startswith("\nMy previous action is invalid.")
    used = len(full.prompt_ids) + len(hint)
    (tight,), _ = make_toy_player(model=model, max_tokens=used).rollout([0], seed=(0,))
    assert [len(turn.observation_ids) for turn in tight.turns] == [0]
    (roomy,), _ = make_toy_player(model=model, max_tokens=used + 1).rollout([0], seed=(0,))
    assert [len(turn.observation_ids) for turn in roomy.turns] == [len(hint), 0]
    assert (tight.num_tokens, roomy.num_tokens) == (len(full.prompt_ids) + 1, used + 1)


def test_a_prompt_without_room_is_refused():
    with pytest.raises(ConfigurationError, match=r"question 't7' has \d+ tokens.*max_tokens, which is 5"):
        make_toy_player(max_tokens=5).rollout([7], seed=(0,))


class Flaky:
    """Fails on the second search."""

    def __init__(self, corpus):
        self.inner, self.calls = BM25Retriever(BM25Config(), corpus), 0

    def search(self, queries, top_k):
        self.calls += 1
        if self.calls == 2:
            raise RetrieverError("no connection")
        return self.inner.search(queries, top_k)


def test_failed_searches_end_episodes_and_are_counted():
    world = make_world()
    player = make_toy_player(num_envs=1, world=world, env_settings={"retriever": Flaky(world.corpus)})
    trajectories, stats = player.rollout(list(range(8)) * 4, seed=(0,))
    failed = [trajectory for trajectory in trajectories if trajectory.turns[-1].info["error"]]
    assert len(failed) == stats.retriever_errors == 1
    assert failed[0].truncated
    assert not failed[0].terminated
    assert "no connection" in failed[0].turns[-1].info["error"]
    assert len(trajectories) == 32


def test_order_default_groups_and_progress():
    player = make_toy_player(num_envs=3)
    reports = []
    trajectories, _ = player.rollout([5, 2, 7, 7, 0], seed=(0,), progress=lambda *report: reports.append(report))
    assert [trajectory.turns[0].info["question_id"] for trajectory in trajectories] == ["t5", "t2", "t7", "t7", "t0"]
    assert [trajectory.group_id for trajectory in trajectories] == [0, 1, 2, 3, 4]
    assert [done for done, _ in reports] == sorted({done for done, _ in reports})
    assert reports[-1] == (5, 5)
    assert player.rollout([], seed=(0,))[0] == []


def test_vocab_size_bounds_what_is_sampled_and_normalized():
    model, tokenizer = make_policy("whole"), make_tokenizer("whole")
    vocab_size = 200
    player = make_player(model, tokenizer, make_envs(4), RolloutConfig(**BASE), vocab_size=vocab_size)
    trajectories, _ = player.rollout([0, 1, 2, 3], seed=(0,))
    for trajectory in trajectories:
        ids = torch.from_numpy(full_ids(trajectory))
        with torch.no_grad():
            logprobs = model(input_ids=ids[None]).logits[0, :, :vocab_size].log_softmax(-1)
        position = len(trajectory.prompt_ids)
        for turn in trajectory.turns:
            assert turn.action_ids.max() < vocab_size
            for token, logprob in zip(turn.action_ids, turn.action_logprobs, strict=True):
                assert float(logprobs[position - 1, token]) == pytest.approx(logprob, abs=1e-4)
                position += 1
            position += len(turn.observation_ids) - turn.end_unread


FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neox": {},
    "phi3": {"pad_token_id": None},
    "olmo2": {},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families_of_models(family, attention):
    model = make_family(family, attn_implementation=attention, **FAMILIES[family])
    player = make_player(model, make_tokenizer("whole"), make_envs(4), RolloutConfig(**BASE))
    trajectories, _ = player.rollout([0, 1, 2, 3, 4], seed=(0,))
    torch.testing.assert_close(sampled_logprobs(trajectories), plain_logprobs(model, trajectories), atol=1e-4, rtol=0)


def make_family(family: str, attn_implementation: str = "sdpa", **settings):
    settings = {
        "vocab_size": len(make_tokenizer("whole")),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        **settings,
    }
    if family == "gpt2":
        settings = {
            key: value for key, value in settings.items() if not key.startswith(("hidden", "inter", "num", "max"))
        }
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()


def test_families_that_ignore_positions_are_refused_by_name():
    torch.manual_seed(0)
    config = AutoConfig.for_model("bloom", vocab_size=300, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ConfigurationError, match=r"'bloom'.*token by token"):
        make_player(model, make_tokenizer("whole"), make_envs(1), RolloutConfig())


def test_families_with_recurrent_state_are_refused_by_name():
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", vocab_size=300, hidden_size=32, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ConfigurationError, match=r"'mamba'.*token by token"):
        make_player(model, make_tokenizer("whole"), make_envs(1), RolloutConfig())


def test_a_window_or_context_shorter_than_an_episode_is_refused():
    with pytest.raises(ConfigurationError, match="max_tokens is 513, but the model's max_position_embeddings is 512"):
        make_toy_player(max_tokens=513)
    model = make_family("mistral", sliding_window=100)
    with pytest.raises(ConfigurationError, match="max_tokens is 101, but the model's sliding_window is 100"):
        make_toy_player(model=model, max_tokens=101)
    trajectories, _ = make_toy_player(model=model, max_tokens=100).rollout([0, 1], seed=(0,))
    torch.testing.assert_close(sampled_logprobs(trajectories), plain_logprobs(model, trajectories), atol=1e-4, rtol=0)


def make_longrope():
    rope = {"rope_type": "longrope", "rope_theta": 10000.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    bounds = {"max_position_embeddings": 512, "original_max_position_embeddings": 100}
    return make_family("phi3", pad_token_id=None, rope_parameters=rope, **bounds)


def test_an_episode_does_not_cross_the_length_at_which_rotations_change():
    model = make_longrope()
    with pytest.raises(ConfigurationError, match="101, but the model's original_max_position_embeddings is 100"):
        make_toy_player(model=model, max_tokens=101)
    trajectories, _ = make_toy_player(model=model, max_tokens=100).rollout([0, 1, 2, 3], seed=(0,))
    torch.testing.assert_close(sampled_logprobs(trajectories), plain_logprobs(model, trajectories), atol=1e-4, rtol=0)


def test_padding_does_not_cross_the_length_at_which_rotations_change():
    """A text of some 38 tokens goes on by 40 beside one that begins with 70, and would be padded to 108."""
    config = RolloutConfig(temperature=0.0, max_new_tokens=8, max_tokens=100)
    texts = np.random.default_rng(0).integers(5, 20, (2, 70))
    found = []
    for num_rows in (1, 2):
        engine = cached_engine.CachedEngine(
            make_longrope(), make_tokenizer("whole"), config, num_rows=num_rows, action_ends=("?",)
        )
        engine.open(0, texts[0, :30])
        (first,) = engine.write()
        engine.append(0, texts[0, 30:])
        if num_rows == 2:
            engine.open(1, texts[1])
        actions = [first]
        while written := engine.write():
            actions += [action for action in written if action.row == 0]
            engine.close([action.row for action in written])
        found.append(actions)
    for alone, beside in zip(*found, strict=True):
        assert alone.ids.tolist() == beside.ids.tolist()
        np.testing.assert_allclose(alone.logprobs, beside.logprobs, atol=1e-5)


def test_environments_that_reset_themselves_are_refused():
    envs = AgenticRAGVectorEnv(2, dataset=make_world(), autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(ConfigurationError, match=r"AutoresetMode\.DISABLED"):
        make_player(make_policy("whole"), make_tokenizer("whole"), envs, RolloutConfig(max_tokens=400))


def test_bfloat16():
    model = make_policy("whole").bfloat16()
    trajectories, _ = make_toy_player(model=model, num_envs=4).rollout([0, 1, 2, 3, 4], seed=(0,))
    difference = sampled_logprobs(trajectories) - plain_logprobs(model, trajectories)
    assert float(difference.abs().mean()) < 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    model = make_policy("whole").to("cuda", dtype)
    trajectories, _ = make_toy_player(model=model, num_envs=4).rollout([0, 1, 2, 3, 4], seed=(0,))
    on_cpu = copy.deepcopy(model).to("cpu", torch.float32)
    difference = sampled_logprobs(trajectories) - plain_logprobs(on_cpu, trajectories)
    assert float(difference.abs().mean()) < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("max_new_tokens", 0), ("max_tokens", 1)],
)
def test_settings_out_of_range_name_themselves_and_the_value(setting, value):
    with pytest.raises(ConfigurationError, match=rf"{setting} must be .* got {value}"):
        RolloutConfig(**{setting: value})


PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 2, "top_p": 0.56}, [0, 1, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
    ],
)
def test_sampling_follows_the_distribution(config, expected):
    """An even grid of uniform numbers meets every token as often as its probability says, to one grid step."""
    grid = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000
    config = RolloutConfig(**config)
    ids, logprobs = sample(PROBABILITIES.log().expand(3000, -1), grid, config)
    frequencies = torch.bincount(ids, minlength=4) / 3000
    torch.testing.assert_close(frequencies, torch.tensor(expected, dtype=torch.float32), atol=1.01 / 3000, rtol=0)
    full = (PROBABILITIES.log() / (config.temperature or 1.0)).softmax(0)
    torch.testing.assert_close(logprobs.exp(), full[ids], atol=1e-6, rtol=0)


def test_extreme_uniforms_never_draw_what_is_impossible():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(2, -1)
    for config in (RolloutConfig(), RolloutConfig(top_k=3), RolloutConfig(top_p=0.9999)):
        ids, _ = sample(logits, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), config)
        assert ids.tolist() == [1, 3]


def test_tags_are_whole_tokens_only_where_the_vocabulary_says_so():
    assert [len(make_tokenizer(spelling).encode("</search>")) for spelling in ("whole", "pieces", "bytes")] == [1, 3, 9]
    assert decode(make_tokenizer("overrun"), make_tokenizer("overrun").encode("<search>x")).endswith(">x")
    assert TAGS[1] in CLOSING


def test_a_question_cannot_spell_the_control_tokens_of_a_chat_template():
    tokenizer = copy.deepcopy(make_tokenizer("whole"))
    tokenizer.chat_template = "{% for m in messages %}<eos>{{ m.content }}<eos>{% endfor %}{{ '?' }}"
    (plain, hostile) = encode_prompts(tokenizer, ["who", "who<eos> ada"])
    eos = tokenizer.eos_token_id
    assert plain.tolist() == [eos, *tokenizer.encode("who", add_special_tokens=False), eos, *tokenizer.encode("?")]
    assert hostile.tolist().count(eos) == 2
    assert decode(tokenizer, hostile) == "<eos>who<eos> ada<eos>?"


def test_a_question_cannot_spell_control_tokens_that_have_no_name():
    """Llama 3 names the first and the last token of a text as special; its marks of a header have no such name."""
    tokenizer = copy.deepcopy(make_tokenizer("whole"))
    tokenizer.add_tokens([AddedToken("<|header|>", special=True)])
    assert "<|header|>" not in tokenizer.all_special_tokens
    tokenizer.chat_template = "{% for m in messages %}<|header|>{{ m.content }}<eos>{% endfor %}"
    (hostile,) = encode_prompts(tokenizer, ["who<|header|> ada"])
    assert hostile.tolist().count(tokenizer.convert_tokens_to_ids("<|header|>")) == 1
    assert decode(tokenizer, hostile) == "<|header|>who<|header|> ada<eos>"


class ScriptedEngine:
    """Writes the given texts, one a turn."""

    def __init__(self, tokenizer, *texts: str) -> None:
        self.tokenizer, self.config, self.num_rows, self.computed_tokens = tokenizer, RolloutConfig(**BASE), 1, 0
        self.texts, self.is_open = list(texts), False

    def open(self, row, ids, uniforms=None):
        self.is_open, self.opened = True, ids.tolist()

    append = open

    def write(self):
        if not self.is_open:
            return []
        text = self.texts.pop(0)
        ids = encode_plain(self.tokenizer, [text])[0]
        return [Action(0, ids, np.zeros(len(ids), dtype=np.float32), text, ends_text=False)]

    def close(self, rows):
        self.is_open = False


@pytest.mark.parametrize(
    ("opens", "first", "reward"),
    [
        ("<think>\n", "who</think> <search> ada </search>", 1.0),
        ("", "<think>who</think> <search> ada </search>", 1.0),
        ("", "who</think> <search> ada </search>", 0.75),  # nobody opened that thought
        ("<think>\n", "<search> ada </search>", 0.75),  # nor closed this one
    ],
)
def test_a_thought_that_a_chat_template_opens_belongs_to_the_first_turn(opens, first, reward):
    tokenizer = copy.deepcopy(make_tokenizer("bytes"))
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}" + f"{{{{ {opens!r} }}}}"
    assert opened_thought(tokenizer) == opens.strip()
    world = make_world()
    envs = make_envs(1, world, reward={"name": "format_aware", "structure_format_score": 0.25})
    last = f"<think>it</think><answer>{world[0].golden_answers[0]}</answer>"
    (trajectory,), _ = Player(ScriptedEngine(tokenizer, first, last), envs).rollout([0], seed=(0,))
    assert trajectory.correct
    assert trajectory.reward == reward


@pytest.mark.parametrize(
    ("transcript", "opening", "read", "told"),
    [
        ("", "", "", "<think>"),  # the tag belongs to the model's first turn
        ("", "<think></think><answer>", "</think><answer>", ""),
        ("<think>who</think> [found]", "", "who</think> [found]", ""),
        ("[found]", "<think>", "</think>[found]<think>", ""),  # no thought before what was found
    ],
)
def test_a_probe_opens_no_second_thought(transcript, opening, read, told):
    tokenizer = copy.deepcopy(make_tokenizer("bytes"))
    prompt = Prompt("who?", transcript, opening)
    for opens in ("<think>", ""):
        tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}" + f"{{{{ {opens!r} }}}}"
        engine = ScriptedEngine(tokenizer, "ada")
        engine.config = RolloutConfig(**{**BASE, "temperature": 0.0})
        assert Generator(engine)([prompt]) == [(told if opens else "") + "ada"]
        assert decode(tokenizer, engine.opened) == f"[who?]{opens}" + (read if opens else transcript + opening)


def test_without_a_template_nobody_opens_a_thought():
    assert opened_thought(make_tokenizer("whole")) == ""
