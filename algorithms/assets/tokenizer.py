"""The tokenizer of the bundled models: one token per word of the tiny world, bytes for everything else.

A byte-level BPE without merges: a word that is in the vocabulary is one token, any other text falls back to its UTF-8
bytes, and decoding always gives back exactly what was encoded. Tags and fixed phrases of the protocol are single tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from agentic_rag_env.datasets import tiny, tiny_names
from agentic_rag_env.prompts import INFORMATION_CLOSE, INFORMATION_OPEN, MALFORMED_HINT

EOS, PAD = "<eos>", "<pad>"
_WORDS = r" ?[\p{L}\p{M}]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
_PROTOCOL = (
    *(f"<{slash}{name}>" for name in ("think", "search", "information", "answer") for slash in ("", "/")),
    *(f"Doc {rank}(Title:" for rank in range(1, 6)),
    INFORMATION_OPEN,
    INFORMATION_CLOSE,
    MALFORMED_HINT,
)


def world_texts() -> Iterable[str]:
    """Text in which every word of the tiny world occurs as it does in passages, questions and thoughts."""
    for pool in tiny_names.POOLS.values():
        yield "".join(f" {name}" for name in pool)
    for relation in tiny.RELATIONS.values():
        for template in (*relation.passages, *relation.phrases):
            yield " " + template.format(s="", v="")
            yield template.format(s="", v="")
        yield f" {relation.keyword}"
    for opening in tiny.OPENINGS:
        yield opening.format(phrase="")
    yield tiny.ALIAS_PASSAGE.format(s="", v="")
    yield " next done missing Title ) ). .\n ?\n ? . :\n\n\n"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer; the same one on every machine."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = {piece for text in world_texts() for piece, _ in splitter.pre_tokenize_str(text)}
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += sorted(words - set(pieces))
    vocab = {piece: index for index, piece in enumerate([PAD, EOS, *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in _PROTOCOL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
