"""Demonstrations by a script, for training questions whose gold passages are known.

The script searches for the question first, and then for titles of gold passages that it has seen. It answers with the
shortest golden answer that stands in what it has read. It is honest: a query holds only words of the question and of
passages already seen, and an answer holds only text of these. The tags around passages and their numbers are no text. A
question that can't be answered in this way is dropped as `not_derivable`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from agentic_rag_env.actions import Answer, Search, parse_action
from agentic_rag_env.answers import holds_answer, normalize_answer
from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.probes.gold import find_gold
from agentic_rag_env.types import Passage
from algorithms.learner.config import DemonstrationsConfig
from algorithms.training.demonstrations.source import DEMONSTRATION_SOURCES, Authored, Dialogue

NOT_DERIVABLE = "not_derivable"
#: Longer answers are sentences, which nobody answers word for word.
_MAX_ANSWER_WORDS = 8
#: What `prompts.format_passages` and `information_block` write around passages.
_LAYOUT = re.compile(r"</?information>|Doc\s*\d+\s*\(Title:")


@DEMONSTRATION_SOURCES.register("expert", DemonstrationsConfig)
class Expert(Authored):
    """Writes by a script. A subclass under another name can change `next_turn`.

    Raises:
        ConfigurationError: The environment brings tasks of its own.
        DataError: The metadata of a question has gold passages in an unknown form.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.envs.rules is None:
            raise ConfigurationError(
                "demonstrations.source=expert searches for gold passages, and the environment brings tasks without "
                "any; choose file or endpoint, or write a source of your own."
            )
        questions = [self.envs.dataset[index] for index in range(self.num_items)]
        self.gold = find_gold(questions, self.envs.dataset.corpus)

    def write(self, dialogues: Sequence[Dialogue]) -> list[str]:
        """Write the next turn of each episode, if it is honest."""
        texts = []
        for dialogue in dialogues:
            text = self.next_turn(dialogue)
            if text is None or not is_honest(text, dialogue):
                dialogue.dropped, text = NOT_DERIVABLE, ""
            texts.append(text)
        return texts

    def next_turn(self, dialogue: Dialogue) -> str | None:
        """Write the script's next turn; None if it has none. `is_honest` may still refuse the turn."""
        question = dialogue.question
        if not dialogue.actions:
            return _search("I need to look this up.", question.text.strip())
        gold = self.gold[dialogue.item]
        seen = _seen(dialogue)
        missing = [passage for passage in gold.passages if not _was_read(passage, dialogue)]
        complete = not missing or (gold.any_suffices and len(missing) < len(gold.passages))
        # The last turn is for the answer.
        may_search = len(dialogue.actions) < min(self.envs.rules.max_turns, self.envs.rules.num_calls - 1)
        if not complete and may_search:
            for passage in missing:
                if self._may_be_named(passage, dialogue):
                    return _search(f"I should read about {passage.title}.", passage.title)
        answers = [answer for answer in question.golden_answers if _is_visible(answer, seen)]
        if not answers:
            return None
        return f"<think> I have found the answer. </think><answer> {min(answers, key=len)} </answer>"

    def _may_be_named(self, passage: Passage, dialogue: Dialogue) -> bool:
        """Whether a title was seen and not searched for before."""
        asked = [parse_action(action) for action in dialogue.actions]
        queries = [normalize_answer(action.query) for action in asked if isinstance(action, Search)]
        visible = f"{dialogue.question.text}\n{_seen(dialogue)}"
        return normalize_answer(passage.title) not in queries and holds_answer(visible, [passage.title])


def is_honest(text: str, dialogue: Dialogue) -> bool:
    """Whether a turn says only what could be known when it was written.

    Every word of a query stands in the question or in a passage. An answer stands in what was read as a whole.
    """
    action = parse_action(text)
    if isinstance(action, Search):
        visible = f"{dialogue.question.text} {_seen(dialogue)}"
        return set(normalize_answer(action.query).split()) <= set(normalize_answer(visible).split())
    return isinstance(action, Answer) and _is_visible(action.text, _seen(dialogue))


def _search(thought: str, query: str) -> str:
    return f"<think> {thought} </think><search> {query} </search>"


def _seen(dialogue: Dialogue) -> str:
    """The text of the passages that were read."""
    return _LAYOUT.sub(" ", "\n".join(dialogue.observations))


def _is_visible(answer: str, seen: str) -> bool:
    return len(answer.split()) <= _MAX_ANSWER_WORDS and holds_answer(seen, [answer])


def _was_read(passage: Passage, dialogue: Dialogue) -> bool:
    # Without blanks, because not every tokenizer gives them back as they were.
    return "".join(f"(Title: {passage.title})".split()) in "".join("".join(dialogue.observations).split())
