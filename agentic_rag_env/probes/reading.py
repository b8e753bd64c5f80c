"""Probes of reading: the model is given the gold passages, so no failure is the search's fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from agentic_rag_env.actions import THINK_CLOSE, THINK_OPEN, Answer, Search, parse_action
from agentic_rag_env.answers import exact_match, f1_score, holds_answer, normalize_answer
from agentic_rag_env.probes.figures import Best, Figures
from agentic_rag_env.probes.material import DIRECTLY, Material, of_search
from agentic_rag_env.registry import PROBES
from agentic_rag_env.settings import COUNT, check_settings, or_none
from agentic_rag_env.types import Passage

#: Normalized answers by which a model declines to answer.
ABSTENTIONS = frozenset(
    "|unknown|i dont know|i do not know|not known|none|no answer|unanswerable|cannot answer|cannot be determined"
    "|not enough information|insufficient information|not available|na".split("|")
)


@dataclass
class SourceReferencingConfig:
    """How hard the reading is made.

    Attributes:
        num_distractors: k, the number of passages beside the gold ones that hold no golden answer, at least 1.
        num_questions: How many questions get distractors, from the first with gold passages on; None takes all of them.
    """

    num_distractors: int = 2
    num_questions: int | None = 300

    def __post_init__(self) -> None:
        check_settings(self, COUNT, "num_distractors")
        check_settings(self, or_none(COUNT, "all"), "num_questions")


@PROBES.register("source_referencing", SourceReferencingConfig)
@of_search
class SourceReferencing:
    """Source referencing: the model reads the answer off gold passages at once, without a thought.

    The passages stand in one information block after the prompt. The model's words open with a thought that is closed
    at once, and an answer: `<think></think><answer>`. The block is a perfect search result: all gold passages in the
    order of the hops, then distractors up to `top_k` passages. The figures are over the questions i = 1..n whose gold
    passages are known. EM and F1 are defined in `answers`; a text without `</answer>` scores 0.

    | figure | formula |
    | --- | --- |
    | `exact_match`, `f1` | mean_i EM_i, mean_i F1_i |
    | `format_failures` | share of i without `</answer>`, apart from those too long |
    | `too_long` | share of i whose prompt is too long for the model, which scores 0; left out if there is none |
    | `without_gold` | share of all questions that are left out for lack of gold passages |

    The figures of robustness are over the first `num_questions` of these for which k + 1 distractors are found.
    Distractors are the best matches of the question itself, then gold passages of other questions. The seed draws their
    order. The gold passages stay together behind p - 1 distractors. The first four figures are over the i whose prompts
    the model could read all, so that they compare like with like.

    | figure | formula |
    | --- | --- |
    | `alone_exact_match` | mean_i EM_i0, given the gold passages alone |
    | `position_<p>_exact_match` | mean_i EM_ip, among k distractors, p = 1..k+1 |
    | `distractors_exact_match` | mean_i mean_p EM_ip |
    | `distractors_effect` | mean_i (mean_p EM_ip - EM_i0), paired; below 0: distracted |
    | `distractors_too_long` | share of i with a prompt too long for the model; left out if there is none |
    | `absent_answered` | given k + 1 distractors only and no opening: share of i that answer, abstentions apart |
    | `absent_invented` | share of i that answer with what none of the passages holds |
    | `absent_searched`, `absent_abstained`, `absent_malformed` | share of i that search, decline, do neither |
    | `absent_too_long` | share of i whose prompt is too long for the model; left out if there is none |

    The shares answered, searched, abstained, malformed and too long sum to 1.

    Args:
        config: How many distractors there are, and for how many questions.
    """

    def __init__(self, config: SourceReferencingConfig) -> None:
        self.config = config

    def __call__(self, material: Material) -> Figures:
        """See the class."""
        figures = _without_gold(material)
        if not material.readable:
            return figures
        texts = material.direct_answers
        figures["exact_match"] = material.share(_scores(exact_match, material, material.readable, texts), "high")
        figures["f1"] = material.share(_scores(f1_score, material, material.readable, texts), "high")
        failed = [text is not None and _answer(text) is None for text in texts]
        figures["format_failures"] = material.share(failed, "low")
        figures |= _too_long(material, texts)
        distractors = self._distractors(material)
        if distractors:
            figures |= self._among_distractors(material, distractors)
            figures |= _without_evidence(material, distractors)
        return figures

    def _distractors(self, material: Material) -> dict[int, list[Passage]]:
        """The k + 1 distractors of each question that has so many, by its number, in the order of showing."""
        count, distractors = self.config.num_distractors + 1, {}
        for number in material.readable[: self.config.num_questions]:
            found = material.distractors(number, count)
            if len(found) == count:
                distractors[number] = [found[int(row)] for row in material.draw(number, 1).permutation(count)]
        return distractors

    def _among_distractors(self, material: Material, distractors: dict[int, list[Passage]]) -> Figures:
        numbers = list(distractors)
        gold = [material.gold[number].passages for number in numbers]

        written = [material.read(gold, numbers, DIRECTLY)]
        beside = [others[: self.config.num_distractors] for others in distractors.values()]
        for place in range(self.config.num_distractors + 1):
            shown = [
                [*others[:place], *passages, *others[place:]] for others, passages in zip(beside, gold, strict=True)
            ]
            written.append(material.read(shown, numbers, DIRECTLY))
        read = np.array([None not in texts for texts in zip(*written, strict=True)])
        figures = {} if read.all() else {"distractors_too_long": material.share(~read)}
        if not read.any():
            return figures
        alone, *by_place = (_scores(exact_match, material, numbers, texts)[read] for texts in written)
        means = np.mean(by_place, axis=0)
        return figures | {
            "alone_exact_match": material.share(alone, "high"),
            **{f"position_{place}_exact_match": material.share(of, "high") for place, of in enumerate(by_place, 1)},
            "distractors_exact_match": material.share(means, "high"),
            "distractors_effect": material.figure(means - alone, "high"),
        }


@PROBES.register("thinking")
@of_search
def thinking(material: Material) -> Figures:
    """Thinking: the same input as for source referencing, but the model's words open with `<think>` alone.

    The figures are over the questions i = 1..n whose gold passages are known. A thought has to be closed, and an answer
    has to follow in the same turn; everything else scores 0. Agents that search for every hop, whatever they see, show
    under `searched`.

    | figure | formula |
    | --- | --- |
    | `exact_match`, `f1` | mean_i EM_i, mean_i F1_i |
    | `gain` | mean (EM_i - EM_i of source referencing) over the i read in both; above 0: thinking helps |
    | `format_failures` | share of i without `</think>`, or with neither an answer nor a search after it; not too long |
    | `too_long` | share of i whose prompt is too long for the model, which scores 0; left out if there is none |
    | `searched` | share of i that close the thought and then search, though all evidence is there |
    | `exact_match_well_formed` | mean EM over the i that think and answer; left out if there is none |
    | `without_gold` | share of all questions that are left out for lack of gold passages |

    Args:
        material: The material, which needs `generate`.
    """
    figures = _without_gold(material)
    numbers = material.readable
    if not numbers:
        return figures
    written = material.read(material.evidence, numbers, THINK_OPEN)
    # Nothing is left of a thought that is never closed, and nothing is no action.
    texts = [text and text.partition(THINK_CLOSE)[2] for text in written]
    matches = _scores(exact_match, material, numbers, texts)
    direct = _scores(exact_match, material, numbers, material.direct_answers)
    answered = np.array([_answer(text) is not None for text in texts])
    searched = np.array([isinstance(parse_action(text or ""), Search) for text in texts])
    read = np.array([text is not None for text in texts])
    figures["exact_match"] = material.share(matches, "high")
    figures["f1"] = material.share(_scores(f1_score, material, numbers, texts), "high")
    both = read & np.array([text is not None for text in material.direct_answers])
    if both.any():
        figures["gain"] = material.figure((matches - direct)[both], "high")
    figures["format_failures"] = material.share(read & ~answered & ~searched, "low")
    figures |= _too_long(material, texts)
    figures["searched"] = material.share(searched)
    if answered.any():
        figures["exact_match_well_formed"] = material.share(matches[answered], "high")
    return figures


def _without_evidence(material: Material, distractors: dict[int, list[Passage]]) -> Figures:
    """Figures of what the model does when it is given only distractors."""
    texts = material.read(list(distractors.values()), list(distractors), "")
    actions = [None if text is None else parse_action(text) for text in texts]
    answers = [action.text if isinstance(action, Answer) else None for action in actions]
    abstained = [answer is not None and normalize_answer(answer) in ABSTENTIONS for answer in answers]
    answered = [answer is not None and not declined for answer, declined in zip(answers, abstained, strict=True)]
    invented = [
        says and not any(holds_answer(passage.contents, [answer or ""]) for passage in shown)
        for says, answer, shown in zip(answered, answers, distractors.values(), strict=True)
    ]
    searched = [isinstance(action, Search) for action in actions]
    malformed = [action is not None and not isinstance(action, (Answer, Search)) for action in actions]
    found: dict[str, tuple[Sequence[bool], Best]] = {
        "answered": (answered, "low"),
        "invented": (invented, "low"),
        "searched": (searched, None),
        "abstained": (abstained, None),
        "malformed": (malformed, "low"),
    }
    figures = {name: material.share(values, best) for name, (values, best) in found.items()}
    return {f"absent_{name}": figure for name, figure in (figures | _too_long(material, texts)).items()}


def _too_long(material: Material, texts: Sequence[str | None]) -> Figures:
    """The share of prompts that were too long for the model, if there are any; they are no failure of the model."""
    unread = [text is None for text in texts]
    return {"too_long": material.share(unread)} if any(unread) else {}


def _without_gold(material: Material) -> Figures:
    return {"without_gold": material.share([not gold.passages for gold in material.gold])}


def _answer(text: str | None) -> str | None:
    action = parse_action(text or "")
    return action.text if isinstance(action, Answer) else None


def _scores(
    score: Callable[[str | None, tuple[str, ...]], float],
    material: Material,
    numbers: Sequence[int],
    texts: Sequence[str | None],
) -> np.ndarray:
    """Scores [n] of the answers in texts to the questions with these numbers."""
    golden = [material.questions[number].golden_answers for number in numbers]
    return np.array([score(_answer(text), answers) for text, answers in zip(texts, golden, strict=True)])
