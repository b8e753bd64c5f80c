"""Sampled tokens per second: the rollout engine, and `model.generate` called for every turn on the whole transcript.

Run with `pytest benchmarks/test_rollout.py -s`; the last tests print both and their ratio, over the tiny world and at
three lengths of the history. They compare processor time, so that other load on the machine counts less. One test
compares elapsed time: rows that write on during a slow search against rows that pause.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from agentic_rag_env import FreeText
from agentic_rag_env.actions import CLOSING_TAGS
from agentic_rag_env.lifted import LiftedVectorEnv
from agentic_rag_env.types import Found
from agentic_rag_env.vector import AgenticRAGVectorEnv
from algorithms.assets.tokenizer import build_tokenizer
from algorithms.rollout.cached_engine import CachedEngine
from algorithms.rollout.config import RolloutConfig
from algorithms.rollout.player import Player
from algorithms.rollout.tokenization import encode_plain, encode_prompts

NUM_ENVS, MAX_NEW_TOKENS = 64, 30
QUESTIONS = list(range(NUM_ENVS))
#: Biases of the random policy: with them, four in five actions end by a tag and one in five searches.
BIASES = {"<search>": 6.5, "</search>": 4.3, "<answer>": 2.0, "</answer>": 1.5}


def make_policy(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Make a random model of the size of the bundled student."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config).eval()
    head = torch.nn.Linear(config.hidden_size, config.vocab_size)
    with torch.no_grad():
        head.weight.copy_(10 * model.get_output_embeddings().weight)
        head.bias.zero_()
        head.bias[2:258] = -5.0  # single bytes
        for tag, bias in BIASES.items():
            head.bias[tokenizer.convert_tokens_to_ids(tag)] = bias
    model.set_output_embeddings(head)
    return model


def play_with_engine(player: Player) -> int:
    """Play the questions with the engine and return the number of sampled tokens."""
    _, stats = player.rollout(QUESTIONS, seed=(0,))
    return stats.sampled_tokens


def play_with_generate(player: Player) -> int:
    """Play with the usual loop: keep text, encode all of it in every turn, generate, cut the text, step.

    Returns:
        The number of sampled tokens, up to the end of each action.
    """
    model, tokenizer, envs = player.engine.model, player.engine.tokenizer, player.envs
    torch.manual_seed(0)
    prompts, _ = envs.reset(options={"question_index": torch.tensor(QUESTIONS).numpy()})
    transcripts = dict(enumerate(prompts))
    num_tokens = 0
    while transcripts:
        inputs = tokenizer(
            list(transcripts.values()), return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        )
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            top_k=0,
            max_new_tokens=MAX_NEW_TOKENS,
            stop_strings=list(CLOSING_TAGS),
            tokenizer=tokenizer,
        )
        written = output[:, inputs["input_ids"].shape[1] :]
        num_tokens += int((written != tokenizer.pad_token_id).sum())
        texts = dict(zip(transcripts, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True))
        observations, _, terminations, truncations, _ = envs.step([texts.get(row) for row in range(NUM_ENVS)])
        transcripts = {
            row: transcript + texts[row] + observations[row]
            for row, transcript in transcripts.items()
            if not (terminations[row] or truncations[row])
        }
    return num_tokens


def make_player(**settings: Any) -> Player:
    """Make a player of the tiny world with the random policy."""
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    envs = AgenticRAGVectorEnv(NUM_ENVS, autoreset_mode=AutoresetMode.DISABLED)
    config = RolloutConfig(max_new_tokens=MAX_NEW_TOKENS, max_tokens=1024, **settings)
    engine = CachedEngine(make_policy(tokenizer), tokenizer, config, num_rows=NUM_ENVS, action_ends=CLOSING_TAGS)
    return Player(engine, envs)


@pytest.fixture(scope="module")
def player() -> Player:
    return make_player()


@pytest.mark.parametrize("play", [play_with_engine, play_with_generate])
def test_one_batch_of_episodes(benchmark, player, play):
    benchmark.group = f"{NUM_ENVS} episodes of the tiny world, random policy of 3 layers, 1 thread"
    num_tokens = benchmark.pedantic(play, (player,), rounds=3, warmup_rounds=1)
    benchmark.extra_info["sampled tokens per second"] = round(num_tokens / benchmark.stats.stats.min)


def test_the_engine_is_several_times_faster(player, capsys):
    rates = {}
    for play in (play_with_engine, play_with_generate):
        play(player)
        runs = []
        for _ in range(3):
            start = time.process_time()
            runs.append(play(player) / (time.process_time() - start))
        rates[play.__name__] = max(runs)
    ratio = rates["play_with_engine"] / rates["play_with_generate"]
    with capsys.disabled():
        print("\n" + ", ".join(f"{name}: {rate:.0f} tokens/s" for name, rate in rates.items()) + f", ratio {ratio:.1f}")
    assert ratio > 2


#: How long a search takes [seconds], and about how many decode steps take as long.
SEARCH_S, DURING_SEARCH = 0.05, 16


class SlowSearch:
    """A retriever that answers as late as a service elsewhere."""

    def __init__(self, retriever: Any) -> None:
        self.retriever = retriever

    def search(self, queries: Sequence[str], top_k: int) -> list[Found]:
        time.sleep(SEARCH_S)
        return self.retriever.search(queries, top_k)


def test_rows_that_write_on_during_a_search_take_less_time(capsys):
    seconds, questions = {}, np.arange(4 * NUM_ENVS)
    for max_steps in (0, DURING_SEARCH):
        player = make_player(decode_during_search=max_steps)
        player.envs.retriever = SlowSearch(player.envs.retriever)
        runs = []
        for _ in range(4):
            start = time.perf_counter()
            player.rollout(questions, seed=(0,))
            runs.append(time.perf_counter() - start)
        seconds[max_steps] = min(runs)
    ratio = seconds[0] / seconds[DURING_SEARCH]
    with capsys.disabled():
        print(
            f"\nsearches of {SEARCH_S} s: rows pause {seconds[0]:.2f} s, write on {seconds[DURING_SEARCH]:.2f} s, "
            f"ratio {ratio:.2f}"
        )
    assert ratio > 1.05


NUM_TALKS, NUM_TURNS, END = 16, 4, "</search>"
#: Tokens of an action, as many as the bundled student writes on average once it has learned to search.
ACTION_TOKENS = 12
#: Tokens of prompt and replies at the last turn, and how many times faster the engine is at least.
HISTORIES = {100: 2.0, 1000: 2.5, 3000: 2.5}


class Talk(gymnasium.Env[str, str]):
    """Four turns, with replies of a given number of words."""

    metadata = {"render_modes": [], "action_ends": [END]}  # noqa: RUF012
    observation_space = action_space = FreeText()  # type: ignore[assignment]

    def __init__(self, words: int) -> None:
        self.words = words

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return self._text(), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return self._text(), 0.0, False, False, {"correct": False}

    def _text(self) -> str:
        return " ".join(self.np_random.choice(["company", "works", "is", "the", "of", "next"], self.words))


gymnasium.register("Talk-v0", entry_point=Talk, max_episode_steps=NUM_TURNS)

_Transcripts = list[list[list[int]]]


def talk_with_engine(player: Player) -> _Transcripts:
    """Play with the engine, and return the ids of each action of each episode."""
    trajectories, _ = player.rollout(range(NUM_TALKS), seed=(0,))
    return [[turn.action_ids.tolist() for turn in trajectory.turns] for trajectory in trajectories]


def talk_with_generate(player: Player) -> _Transcripts:
    """Play with `generate` on all ids of every episode in every turn, and return the ids of each action."""
    model, tokenizer, envs = player.engine.model, player.engine.tokenizer, player.envs
    prompts, _ = envs.reset(options={"question_index": np.arange(NUM_TALKS)})
    histories = [ids.tolist() for ids in encode_prompts(tokenizer, list(prompts))]
    actions: _Transcripts = [[] for _ in range(NUM_TALKS)]
    for _ in range(NUM_TURNS):
        width = max(map(len, histories))
        input_ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in histories])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in histories])
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=ACTION_TOKENS,
            stop_strings=[END],
            tokenizer=tokenizer,
        )
        written = [[i for i in ids if i != tokenizer.pad_token_id] for ids in output[:, width:].tolist()]
        texts, _, _, _, _ = envs.step([tokenizer.decode(ids) for ids in written])
        for row, (ids, reply) in enumerate(zip(written, encode_plain(tokenizer, list(texts)), strict=True)):
            actions[row].append(ids)
            histories[row] += [*ids, *reply.tolist()]
    return actions


def talker(history: int) -> Player:
    """A greedy player of episodes whose prompt and three replies have so many tokens, an end of text excluded."""
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    policy = make_policy(tokenizer)
    with torch.no_grad():
        policy.get_output_embeddings().bias[[tokenizer.eos_token_id, tokenizer.pad_token_id]] = -100.0
    envs = LiftedVectorEnv("Talk-v0", NUM_TALKS, range(NUM_TALKS), {"words": history // NUM_TURNS})
    config = RolloutConfig(max_new_tokens=ACTION_TOKENS, max_tokens=4096, temperature=0.0)
    engine = CachedEngine(policy, tokenizer, config, num_rows=NUM_TALKS, action_ends=[END])
    return Player(engine, envs)


def least_seconds(function: Callable[[], object]) -> float:
    """Processor time of the fastest of three calls."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return min(seconds)


@pytest.mark.parametrize("history", HISTORIES)
def test_the_engine_is_faster_the_longer_the_history(history, capsys):
    player = talker(history)
    transcripts = talk_with_engine(player)
    assert transcripts == talk_with_generate(player), "greedy transcripts are the same"
    ours, otherwise = (least_seconds(lambda play=play: play(player)) for play in (talk_with_engine, talk_with_generate))
    num_tokens = sum(len(action) for actions in transcripts for action in actions)
    with capsys.disabled():
        print(
            f"\n{history} tokens of history, {num_tokens} written: engine {ours:.2f} s, "
            f"generate {otherwise:.2f} s, ratio {otherwise / ours:.1f}"
        )
    assert otherwise / ours >= HISTORIES[history]
