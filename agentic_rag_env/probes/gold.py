"""Finds what is known about the evidence of a question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from agentic_rag_env.answers import comparable
from agentic_rag_env.corpus import quoted_contents
from agentic_rag_env.errors import DataError
from agentic_rag_env.types import Passage, Question

#: Tells passages apart: title as answers are compared, and text.
Identity: TypeAlias = tuple[str, str]


@dataclass(frozen=True)
class Gold:
    """The evidence of one question.

    Attributes:
        passages: Gold passages to be read, in the order of the hops; empty where their texts are not known.
        ids: Ids of the gold passages in the corpus; empty where they are not known.
        identities: The identities of the passages of these ids; those that the corpus lacks are left out.
        titles: Titles of the gold passages as answers are compared, without repetition; empty where they are not known.
        any_suffices: Whether one of the passages is as good as all.
    """

    passages: tuple[Passage, ...] = ()
    ids: frozenset[str] = frozenset()
    identities: Mapping[str, Identity] = field(default_factory=dict)
    titles: frozenset[str] = frozenset()
    any_suffices: bool = False

    @property
    def pieces(self) -> frozenset[str]:
        """The pieces of evidence that have to be found: ids, or titles where ids are not known."""
        return self.ids or self.titles

    @property
    def num_needed(self) -> int:
        """How many of the pieces make the evidence complete."""
        return min(1, len(self.pieces)) if self.any_suffices else len(self.pieces)

    def share(self, found: int, of: int) -> float:
        """The share of the evidence that is found.

        Args:
            found: Number of pieces found.
            of: Number of all pieces.
        """
        return float(found > 0) if self.any_suffices else found / of

    def found_in(self, passages: Iterable[Passage]) -> frozenset[str]:
        """The pieces of evidence that are among retrieved passages.

        A gold passage counts by its id or by its identity, because some retrievers have other ids than the corpus.
        """
        if not self.ids:
            return self.titles & titles(passages)
        found = list(passages)
        ids, identities = {passage.id for passage in found}, set(map(identity, found))
        return frozenset(one for one in self.ids if one in ids or self.identities.get(one) in identities)


def find_gold(questions: Sequence[Question], corpus: Iterable[Passage] | None) -> list[Gold]:
    """The evidence of each question, from the first of these fields of its metadata that is there.

    | field | holds |
    | --- | --- |
    | `supporting` | ids of passages of the corpus; any one of them is enough where `supporting_mode` is "any" |
    | `gold_passages` | passages: strings (title on the first line), or objects with `contents`, or `title` and `text` |
    | `paragraphs` | MuSiQue: objects with `title`, `paragraph_text` and `is_supporting` |
    | `positive_ctxs` | NQ as in DPR: objects with `title` and `text`; the first one is taken |
    | `supporting_titles` | titles alone: enough to tell what was found, nothing to read |

    Args:
        questions: Any number of questions.
        corpus: Passages in which ids are looked up; None if there are none.

    Raises:
        DataError: A field has another form; the message names the question.
    """
    wanted = {identifier for question in questions for identifier in _ids(question)}
    by_id = {passage.id: passage for passage in corpus or () if passage.id in wanted} if wanted else {}
    return [_gold(question, by_id) for question in questions]


def identity(passage: Passage) -> Identity:
    """Tell a passage from others, whatever its id is, whether or not its title is quoted, and however it is spaced."""
    return comparable(passage.title), " ".join(passage.text.split())


def titles(passages: Iterable[Passage]) -> frozenset[str]:
    """Titles of passages as answers are compared; passages without a title are left out."""
    return frozenset(filter(None, (comparable(passage.title) for passage in passages)))


def _gold(question: Question, by_id: Mapping[str, Passage]) -> Gold:
    if ids := _ids(question):
        known = tuple(by_id[identifier] for identifier in ids if identifier in by_id)
        return Gold(
            known if len(known) == len(ids) else (),
            frozenset(ids),
            {passage.id: identity(passage) for passage in known},
            titles(known),
            any_suffices=question.metadata.get("supporting_mode") == "any",
        )
    listed = _list(question, "gold_passages")
    listed = listed or [item for item in _list(question, "paragraphs") if _is_supporting(item, question)]
    listed = listed or _list(question, "positive_ctxs")[:1]
    if listed:
        given = [_passage(item, question, place) for place, item in enumerate(listed)]
        passages = tuple({identity(passage): passage for passage in given}.values())
        return Gold(passages, titles=titles(passages))
    named = [comparable(str(title)) for title in _list(question, "supporting_titles")]
    return Gold(titles=frozenset(filter(None, named)))


def _ids(question: Question) -> list[str]:
    """The distinct ids of a question's gold passages, in their order."""
    ids = _list(question, "supporting")
    for identifier in ids:
        if not isinstance(identifier, str):
            raise DataError(
                f"Question {question.id!r}, metadata field 'supporting': expected ids of passages, strings as in the "
                f"corpus, got {identifier!r:.80}."
            )
    return list(dict.fromkeys(ids))


def _list(question: Question, field: str) -> list[Any]:
    value = question.metadata.get(field)
    if value is None:
        return []
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise DataError(f"Question {question.id!r}, metadata field {field!r}: expected a list, got {value!r:.80}.")
    return list(value)


def _is_supporting(item: Any, question: Question) -> bool:
    if not isinstance(item, Mapping) or "is_supporting" not in item:
        raise DataError(
            f"Question {question.id!r}, metadata field 'paragraphs': each needs 'is_supporting', got {item!r:.80}."
        )
    return bool(item["is_supporting"])


def _passage(item: Any, question: Question, place: int) -> Passage:
    identifier = f"{question.id}/gold-{place}"
    if isinstance(item, Passage):
        return item
    if isinstance(item, str):
        return Passage(identifier, item)
    if isinstance(item, Mapping):
        text = item.get("text", item.get("paragraph_text"))
        if isinstance(item.get("contents"), str):
            return Passage(identifier, item["contents"])
        if isinstance(item.get("title"), str) and isinstance(text, str):
            return Passage(identifier, quoted_contents(item["title"], text))
    raise DataError(
        f"Question {question.id!r}: a gold passage is a string, or has 'contents', or 'title' and 'text'; got "
        f"{item!r:.80}."
    )
