"""Sampled tokens per second: the rollout engine, and `model.generate` called for every turn on the whole transcript.

Run with `pytest benchmarks/test_rollout.py -s`; the last test prints both and their ratio.
"""

from __future__ import annotations

import time

import pytest
import torch
from gymnasium.vector import AutoresetMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from agentic_rag_env.actions import CLOSING_TAGS
from agentic_rag_env.vector import AgenticRAGVectorEnv
from algorithms.assets.tokenizer import build_tokenizer
from algorithms.rollout.config import RolloutConfig
from algorithms.rollout.engine import CachedEngine
from algorithms.rollout.player import Player

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


@pytest.fixture(scope="module")
def player() -> Player:
    torch.set_num_threads(1)
    tokenizer = build_tokenizer()
    envs = AgenticRAGVectorEnv(NUM_ENVS, autoreset_mode=AutoresetMode.DISABLED)
    config = RolloutConfig(max_new_tokens=MAX_NEW_TOKENS, max_tokens=1024)
    engine = CachedEngine(make_policy(tokenizer), tokenizer, config, num_rows=NUM_ENVS, action_ends=CLOSING_TAGS)
    return Player(engine, envs)


@pytest.mark.parametrize("play", [play_with_engine, play_with_generate])
def test_one_batch_of_episodes(benchmark, player, play):
    benchmark.group = f"{NUM_ENVS} episodes of the tiny world, random policy of 3 layers, 1 thread"
    num_tokens = benchmark.pedantic(play, (player,), rounds=3, warmup_rounds=1)
    benchmark.extra_info["sampled tokens per second"] = round(num_tokens / benchmark.stats.stats.min)


def test_the_engine_is_several_times_faster(player, capsys):
    """The test compares CPU time of this process, so that other load on the machine counts less."""
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
