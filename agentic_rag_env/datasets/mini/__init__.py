"""Two small sets of real questions that come with the package, each with Wikipedia passages to search.

`ATTRIBUTION.md` beside this file names sources and licences and gives the figures; `make.py` wrote the files.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from agentic_rag_env.corpus import read_corpus
from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.datasets.rows import read_questions
from agentic_rag_env.datasets.selection import sample
from agentic_rag_env.registry import DATASETS
from agentic_rag_env.settings import check_settings, one_of
from agentic_rag_env.types import Question

#: Where the files are: a folder for each set, which holds `corpus` and a file for each split.
FOLDER = Path(__file__).parent
SPLITS = ("train", "dev", "test")
ENDING = ".jsonl.zst"


@dataclass
class MiniConfig:
    """Which questions of a set to use; the passages are the same for all of them.

    Attributes:
        split: `train`, `dev` or `test`. Questions of two splits never rest on passages of the same page.
        num_questions: Keep a random sample of this size of the split, in its order; None keeps all.
        seed: Decides the sample; the same seed draws the same one, and a larger sample contains the smaller.
    """

    split: str = "train"
    num_questions: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, one_of(SPLITS), "split")


@DATASETS.register("nq_mini", MiniConfig)
def nq_mini(config: MiniConfig) -> QuestionSet:
    """One-hop questions that people typed into a search engine, from Natural Questions, and 10,000 passages.

    All of them are from the published training set, so a model trained here may be measured on the published dev and
    test sets. Answers have five words or fewer, as in NQ-open.

    The metadata of a question holds `supporting`, a list with the id of its one gold passage. It also holds
    `supporting_mode` "any", because other passages may answer too. `_load` explains `answer_in_training` and how
    figures are grouped by it.

    Sources: Kwiatkowski et al., "Natural Questions", TACL 2019, and Lamm et al., "QED", TACL 2021, whose paragraphs are
    the gold passages. The other passages are also from Wikipedia; search engines found them for questions of NQ.
    The licence is CC BY-SA 4.0.
    """
    return _load("nq_mini", config)


@DATASETS.register("hotpot_mini", MiniConfig)
def hotpot_mini(config: MiniConfig) -> QuestionSet:
    """Two-hop questions that crowd workers wrote about two Wikipedia pages, from HotpotQA, and 10,000 passages.

    They are from the published training and dev sets, as `published_split` in the metadata says. Everybody reports
    figures on the published dev set. A model trained here must be measured on it without the questions whose
    `source_id` is in this set.

    The metadata of a question holds `supporting`, the ids of its two gold passages, both of which it needs
    (`supporting_mode` "all"). It also holds the `type` "bridge" or "comparison" where that is known. `_load` explains
    `answer_in_training` and how figures are grouped by it.

    Source: Yang et al., "HotpotQA", EMNLP 2018; the passages are first paragraphs of pages. Licence: CC BY-SA 4.0.
    """
    return _load("hotpot_mini", config)


def _load(name: str, config: MiniConfig) -> QuestionSet:
    """Read a split of a set; the corpus is one object for all splits.

    Figures of an evaluation are grouped by the `dataset` of a question's metadata. For dev and test questions it is
    `nq_mini/seen_answers` or `nq_mini/new_answers`. It tells whether a golden answer is also one of a training question
    (the field `answer_in_training`). So what a model remembers is not mistaken for what it finds.
    """
    questions = read_questions(FOLDER / name / f"{config.split}{ENDING}", name)
    chosen = sample(questions, config.num_questions, config.seed, f"split {config.split!r} of {name}")
    return QuestionSet(
        name, [_grouped(question) for question in chosen], read_corpus(FOLDER / name / f"corpus{ENDING}")
    )


def _grouped(question: Question) -> Question:
    seen = question.metadata.get("answer_in_training")
    if seen is None:
        return question
    group = f"{question.metadata['dataset']}/{'seen' if seen else 'new'}_answers"
    return dataclasses.replace(question, metadata={**question.metadata, "dataset": group})
