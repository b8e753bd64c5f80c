"""What the tokenizers of policy and teacher must have in common, so that both read what either writes."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from agentic_rag_env.errors import ConfigurationError
from algorithms.rollout.tokenization import encode_prompts, opened_thought


def reads_otherwise(policy: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Whether the teacher's chat template is not the policy's, so that each needs prompts of its own."""
    return teacher.chat_template != policy.chat_template


def require_same_opening(policy: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Require that both chat templates open a thought, or neither: else a tag would be read twice or never.

    Raises:
        ConfigurationError: One does.
    """
    opened = {name: opened_thought(tokenizer) for name, tokenizer in (("policy", policy), ("teacher", teacher))}
    if opened["policy"] != opened["teacher"]:
        (does,) = (name for name, tag in opened.items() if tag)
        raise ConfigurationError(
            f"The chat template of model.{does} opens the reply with {opened[does]}, and the other's does not, so they "
            "would not write the same turns. Give both folders the same chat_template."
        )


def require_shared_texts(policy: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, shared: int) -> None:
    """Require that what either tokenizer makes of texts can be read by both models.

    In texts, special tokens are not recognized. They occur only in what stands around a prompt.

    Args:
        policy: The policy's tokenizer.
        teacher: The teacher's tokenizer.
        shared: Ids below it are common to both models.

    Raises:
        ConfigurationError: A token that can occur is one model's alone.
    """
    for owner, other, tokenizer in (("policy", "teacher", policy), ("teacher", "policy", teacher)):
        alone = {token_id: token for token, token_id in tokenizer.get_vocab().items() if token_id >= shared}
        special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        if not reads_otherwise(policy, teacher):
            special -= set(encode_prompts(tokenizer, ["?"])[0].tolist())
        if occurring := sorted(alone.keys() - special):
            first = occurring[0]
            raise ConfigurationError(
                f"The {other} has no {alone[first]!r} (id {first} of model.{owner}; both have the ids below {shared}), "
                "so it can't read texts that are encoded with it. Give both the same added tokens, or take it out of "
                f"the tokenizer of model.{owner}."
            )
