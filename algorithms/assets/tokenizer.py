"""The tokenizer of the bundled models: one token per word of the tiny world, bytes for everything else.

It is Qwen2's tokenizer with the 256 bytes as its vocabulary and no merges. Every word of the tiny world, with the blank
before it, and every tag and fixed phrase of the protocol is an added token; any other text falls back to its UTF-8
bytes. `AutoTokenizer` loads only Qwen2's tokenizer for a Qwen2 model, whatever class the folder names.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, pre_tokenizers
from transformers import Qwen2Tokenizer

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


def build_tokenizer() -> Qwen2Tokenizer:
    """Make the tokenizer; it is the same on every machine."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    splitter = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    pieces = {piece for text in world_texts() for piece, _ in splitter.pre_tokenize_str(text)}
    words = sorted(piece for piece in pieces if len(piece.encode()) > 1)
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate([PAD, EOS, *alphabet])},
        merges=[],
        unk_token=None,  # type: ignore[arg-type]  # nothing is unknown
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in (*words, *_PROTOCOL)])
    return tokenizer
