"""Text becomes ids and back: the environment's text is encoded once, and the model's ids are decoded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from agentic_rag_env.actions import THINK_OPEN
from agentic_rag_env.errors import ConfigurationError

#: Stands for a text while a chat template is rendered around it.
_PLACE = "\ue000"
#: Templates of the Llama 3 family write the day; with this one, which is their own default, no prompt depends on the
#: calendar.
_DAY = "26 Jul 2024"


def encode_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Encode first observations.

    With a chat template, the text becomes the message of a user, and the template opens the reply. Without one, the
    text is taken as it is, behind a BOS token if the tokenizer adds one.

    Returns:
        Ids [p] int64 of each text.
    """
    if tokenizer.chat_template:
        tokens = control_tokens(tokenizer)
        return [_in_template(tokenizer, text, tokens) for text in texts]
    bos = tokenizer.bos_token_id
    prefix = [bos] if bos is not None and tokenizer.encode("")[:1] == [bos] else []
    return [np.concatenate((np.array(prefix, dtype=np.int64), ids)) for ids in encode_plain(tokenizer, texts)]


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the tokens that are no text, such as those that end one."""
    # Llama 3 names two of its control tokens as special; the others are so without a name.
    unnamed = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return frozenset([*tokenizer.all_special_tokens, *unnamed])


def _in_template(tokenizer: PreTrainedTokenizerBase, text: str, tokens: Iterable[str]) -> np.ndarray:
    """Encode a text as the message of a user; the template then opens the reply, [p] int64."""
    if not any(token in text for token in tokens):
        chat = [{"role": "user", "content": text}]
        return np.array(_rendered(tokenizer, chat, return_dict=False), dtype=np.int64)
    # A question that spells a control token stays text: such tokens are read only in what the template puts around it.
    chat = [{"role": "user", "content": _PLACE}]
    around = _rendered(tokenizer, chat, tokenize=False)
    before, after = (tokenizer.encode(part, add_special_tokens=False) for part in str(around).split(_PLACE))
    return np.array([*before, *encode_plain(tokenizer, [text])[0], *after], dtype=np.int64)


def opened_thought(tokenizer: PreTrainedTokenizerBase) -> str:
    """Find the tag of a thought with which a chat template opens the model's reply; empty if there is none."""
    if not tokenizer.chat_template:
        return ""
    chat = [{"role": "user", "content": _PLACE}]
    around = str(_rendered(tokenizer, chat, tokenize=False))
    return THINK_OPEN if around.rpartition(_PLACE)[2].rstrip().endswith(THINK_OPEN) else ""


def _rendered(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], **form: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, date_string=_DAY, **form)
    except Exception as error:  # a template is a small program of the model's author, and may raise anything
        raise ConfigurationError(
            f"The chat template of {tokenizer.name_or_path!r} can't render a user's message "
            f"({type(error).__name__}: {error}). Mend chat_template in that folder, or remove it there: the text is "
            "then read as it is."
        ) from error


def encode_plain(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Encode texts as they are: no token is added, and special tokens are not recognized.

    A passage that spells an end-of-text token thus stays text. Tags that are ordinary tokens of the vocabulary stay
    whole.

    Returns:
        Ids [n] int64 of each text.
    """
    if not len(texts):  # transformers can't encode nothing
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)
    return [np.array(ids, dtype=np.int64) for ids in encoded["input_ids"]]


@dataclass(frozen=True)
class PlainEncoder:
    """Counts tokens for the environment's observation budget, exactly as `encode_plain` will encode the observation."""

    tokenizer: PreTrainedTokenizerBase

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Encode a text; no token is added."""
        return encode_plain(self.tokenizer, [text])[0].tolist()

    def token_ends(self, text: str) -> list[int] | None:
        """Find where each token ends, in characters; None for a slow tokenizer, which can't tell."""
        if not self.tokenizer.is_fast:
            return None
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        return [end for _, end in encoded["offset_mapping"]]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode ids exactly: special tokens are kept, and blanks are not touched."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
