"""Holds every word that the environment writes to the model (the protocol of Search-R1, identical in DGPO).

The passage block and the hint follow the reference implementation to the letter, so that published checkpoints work.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import did_you_mean
from agentic_rag_env.types import Passage

#: Prompt templates by name. `search_r1` instructs a real model; `bare` is for models that were made for the protocol.
PROMPTS = {
    "search_r1": (
        "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get "
        "new information. After reasoning, if you find you lack some knowledge, you can call a search engine by "
        "<search> query </search> and it will return the top searched results between <information> and "
        "</information>. You can search as many times as your want. If you find no further external knowledge "
        "needed, you can directly provide the answer inside <answer> and </answer>, without detailed illustrations. "
        "For example, <answer> Beijing </answer>. Question: {question}\n"
    ),
    "bare": "{question}\n",
}

#: The hint that the agent reads after a turn without a valid action.
MALFORMED_HINT = (
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>. "
    "If I want to give the final answer, I should put the answer between <answer> and </answer>. Let me try again.\n"
)

INFORMATION_OPEN = "\n\n<information>"
INFORMATION_CLOSE = "</information>\n\n"


def render_prompt(template: str, question: str) -> str:
    """The first observation of an episode.

    Args:
        template: A name in `PROMPTS`, or another template, which contains `{question}`.
        question: The question; a question mark is added where none ends it.

    Raises:
        ConfigurationError: The template is no known name and does not contain `{question}`.
    """
    if not isinstance(template, str):
        raise ConfigurationError(
            f"prompt must be the name of a template or a text with '{{question}}', got {template!r}."
        )
    if template in PROMPTS:
        template = PROMPTS[template]
    elif "{question}" not in template:
        raise ConfigurationError(
            f"prompt {template!r} is neither a named template nor contains '{{question}}'."
            f"{did_you_mean(template, PROMPTS)}"
        )
    question = question.strip()
    return template.replace("{question}", question if ends_with_question_mark(question) else question + "?")


def ends_with_question_mark(text: str) -> bool:
    """Whether a text ends with a question mark of any script; blanks after it don't matter."""
    return "QUESTION MARK" in unicodedata.name(text.rstrip()[-1:] or " ", "")


def format_passages(passages: Iterable[Passage], max_chars: int | None = None) -> str:
    """Passages in the form that the agent reads: a line `Doc 1(Title: ...) text` for each, outer blanks stripped.

    Args:
        passages: The passages, best first.
        max_chars: Most characters of the result, from its beginning; the rest of the passages is not copied.
    """
    contents = [passage.contents for passage in passages]
    is_cut = max_chars is not None and any(len(text) > max_chars for text in contents)
    if is_cut:
        # Blanks at the end of the last text are stripped even where they lie beyond the cut.
        stripped = contents[-1].rstrip()
        contents[-1] = stripped if "\n" in stripped else contents[-1]
        is_cut = any(len(text) > max_chars for text in contents)  # type: ignore[operator]
    lines = []
    for rank, text in enumerate(contents, 1):
        title, _, rest = text[:max_chars].partition("\n")
        lines.append(f"Doc {rank}(Title: {title}) {rest}")
    joined = "\n".join(lines)
    return (joined if is_cut else joined.strip())[:max_chars]


def information_block(text: str) -> str:
    """Wrap passage text in the tags that announce retrieved information."""
    return f"{INFORMATION_OPEN}{text}{INFORMATION_CLOSE}"
