"""Draws among many ids go through blocks, and give the token that a cumulative sum in full precision gives."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from algorithms.rollout import sampling
from algorithms.rollout.config import RolloutConfig
from algorithms.rollout.sampling import ActionEnd, sample

WIDTHS = (151_936, sampling._MIN_FOR_BLOCKS, 50_257, sampling._MIN_FOR_BLOCKS - 1)
DRAWS = 40
LOWEST, HIGHEST = 0.0, 1 - 2.0**-53


def make_logits(width: int, shape: str) -> torch.Tensor:
    """[width] float32: hardly any difference, a language model's few likely words, or all but some impossible."""
    logits = torch.randn(width, generator=torch.Generator().manual_seed(width))
    if shape == "peaked":
        return logits * 5
    if shape == "sparse":
        return logits.masked_fill(torch.arange(width) % 1009 != 700, -torch.inf)
    return logits * 0.1


def cumulative(logits: torch.Tensor, temperature: float) -> np.ndarray:
    """[width] the distribution, in NumPy's extended precision."""
    scaled = logits.numpy().astype(np.longdouble) / temperature
    weights = np.exp(scaled - scaled.max())
    return np.cumsum(weights) / weights.sum()


@pytest.mark.parametrize("shape", ["flat", "peaked", "sparse"])
@pytest.mark.parametrize("width", WIDTHS)
def test_only_a_uniform_at_a_border_may_draw_another_token(width, shape):
    logits, temperature = make_logits(width, shape), 0.7
    reached = cumulative(logits, temperature)
    draws = np.random.default_rng(width).random(DRAWS)
    # Half of the uniforms lie just outside the tolerance of a border, on either side.
    borders = reached[np.searchsorted(reached, draws[: DRAWS // 2])].astype(np.float64)
    draws[: DRAWS // 2] = np.clip(borders + np.where(np.arange(DRAWS // 2) % 2, 1.1e-6, -1.1e-6), LOWEST, HIGHEST)
    draws = np.append(draws, [LOWEST, HIGHEST])
    config = RolloutConfig(temperature=temperature)
    ids, logprobs = sample(logits.expand(len(draws), -1), torch.from_numpy(draws), config)
    expected = np.searchsorted(reached, draws, side="right")
    for token, right, uniform, logprob in zip(ids.tolist(), expected.tolist(), draws, logprobs.tolist(), strict=True):
        chance = reached[token] - (reached[token - 1] if token else 0)
        assert chance > 0
        assert logprob == pytest.approx(float(np.log(chance)), rel=1e-5, abs=1e-5)
        if token != right:
            low, high = min(token, right), max(token, right)
            assert abs(reached[low] - uniform) < 1e-6
            assert reached[high - 1] - reached[low] < 1e-6
    if shape == "sparse":
        assert ids.tolist() == expected.tolist()


@pytest.mark.parametrize("restriction", [{"top_k": 20_000}, {"top_p": 0.5}, {"top_p": 0.999, "top_k": 30_000}])
def test_a_restricted_draw_goes_through_blocks_too(restriction, monkeypatch):
    logits = make_logits(50_257, "flat").expand(DRAWS, -1)
    draws = torch.rand(DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    through_blocks = sample(logits, draws, RolloutConfig(**restriction))
    monkeypatch.setattr(sampling, "_MIN_FOR_BLOCKS", 10**9)
    at_once = sample(logits, draws, RolloutConfig(**restriction))
    assert through_blocks[0].tolist() == at_once[0].tolist()
    assert through_blocks[1].tolist() == at_once[1].tolist()


def test_impossible_ids_at_the_ends_of_blocks_are_never_drawn():
    width, block = sampling._MIN_FOR_BLOCKS + 100, sampling._BLOCK
    possible = [3 * block - 1, 3 * block, 7 * block + 5]
    logits = torch.full((width,), -torch.inf)
    logits[possible] = 0.0
    third = 1 / 3
    draws = [LOWEST, third - 1e-5, third + 1e-5, 2 * third - 1e-5, 2 * third + 1e-5, HIGHEST]
    ids, _ = sample(logits.expand(6, -1), torch.tensor(draws, dtype=torch.float64), RolloutConfig())
    assert ids.tolist() == [possible[0]] * 2 + [possible[1]] * 2 + [possible[2]] * 2


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, as in the vocabulary of an English model that reads another script."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words with their leading blank, which the decoder drops at the start of a text, as Llama 2's does."""
    words = ["<unk>", "\u2581It", "\u2581is", "\u2581FINAL", "\u2581ANSWER", ":"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Split(":", "isolated")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("make_tokenizer", "end", "text"),
    [
        (byte_tokenizer, "</answer>", "so </answer>"),
        (byte_tokenizer, "</\u7b54\u6848>", "so </\u7b54\u6848>"),
        (byte_tokenizer, "\u3011", "so \u3011"),
        (byte_tokenizer, "</r\u00e9ponse>", "</r\u00e9ponse>"),
        (byte_tokenizer, "no more", "it is no more"),
        (word_tokenizer, "FINAL ANSWER:", "It is FINAL ANSWER:"),
        (word_tokenizer, "FINAL ANSWER:", "FINAL ANSWER:"),
    ],
)
def test_an_action_ends_with_the_token_that_completes_its_end(make_tokenizer, end, text):
    tokenizer = make_tokenizer()
    action_end = ActionEnd(SimpleNamespace(generation_config=None), tokenizer, len(tokenizer), [end])
    ids = np.array(tokenizer.encode(text))
    assert tokenizer.decode(ids) == text
    closing = [bool(action_end.may_close[ids[n - 1]]) and action_end.closes(ids[:n]) for n in range(1, len(ids) + 1)]
    assert closing == [False] * (len(ids) - 1) + [True]
