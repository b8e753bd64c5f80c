"""Checks whether runs may be compared: finds differences that no method is meant to make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from algorithms.analysis.comparison.methods import Method, is_below
from algorithms.analysis.runs import ALL, Run

#: Settings that must agree: from a prefix to the meaning of a difference.
_MUST_AGREE = {
    "dataset.": "other questions or another corpus",
    "env.": "other limits or another prompt of the environment",
    "retriever.": "another retriever",
    "reward.": "another reward",
    "rollout.": "other decoding",
    "evaluation.temperatures": "other modes of decoding",
    "evaluation.num_questions": "another number of test questions",
    "evaluation.seed": "another seed of the sampled modes",
    "model.policy": "another model to start from",
}
#: Settings that should agree.
_SHOULD_AGREE = {
    "model.teacher": "another teacher",
    "num_envs": "another batch of episodes",
    "learner.": "other numerics",
    "trained.": "trained on other data, or in another way",
}
#: Data that must be the same under any name, with the meaning of a difference.
_DATA = {
    "questions": "other test questions",
    "training_questions": "other training questions",
    "corpus": "another corpus",
    "retriever": "other passages, or another way to search them",
}
#: Settings that may differ if these data are the same: places, names, and settings that make a search fast.
_TOLD_BY_DATA = {"dataset.": ("questions", "training_questions", "retriever"), "retriever.": ("retriever",)}
_BUDGETS = {"env_steps": "environment steps", "sampled_tokens": "sampled tokens", "trained_tokens": "trained tokens"}
#: Budgets further apart than this factor are pointed out.
_BUDGET_FACTOR = 1.5


@dataclass(frozen=True)
class Finding:
    """A reason for doubt.

    Attributes:
        text: What differs, with all values and the methods that have them.
        refuses: Whether the comparison makes no sense; otherwise it asks for caution.
    """

    text: str
    refuses: bool = False


def check(methods: Sequence[Method]) -> list[Finding]:
    """Find all reasons why the runs can't be compared, or only with caution."""
    runs = [(method, run) for method in methods for run in method.runs]
    findings = []
    # Of a checkpoint that comes from no run, `model.policy` is the compared model and not where its training started.
    trained = [(method, run) for method, run in runs if run.trained or "checkpoint" not in run.summary]
    evaluated = [(method, run) for method, run in runs if run.trained]
    free = frozenset[str]().union(*(run.settings_without_effect for _, run in runs))
    names = [
        name for name in dict.fromkeys(name for _, run in runs for name in run.settings) if not is_below(name, free)
    ]
    for table, refuses in ((_MUST_AGREE, True), (_SHOULD_AGREE, False)):
        for name in names:
            for prefix, meaning in table.items():
                concerned = {"model.policy": trained, "trained.": evaluated}.get(prefix, runs)
                if not name.startswith(prefix):
                    continue
                values = _values((method, run.settings.get(name, "absent")) for method, run in concerned)
                if len(values) > 1:
                    same = _same_data(runs, _TOLD_BY_DATA.get(prefix, ()))
                    told = "the fingerprints of the data agree, although" if same else f"{meaning}:"
                    findings.append(Finding(f"{told} {name} is {_told(values)}.", refuses and not same))
    modes = _values((method, ", ".join(run.modes)) for method, run in runs)
    counts = _values((method, run.figures(run.modes[0])[ALL]["n"]) for method, run in runs)
    for text, values in (("modes of decoding that were evaluated are", modes), ("test questions in all are", counts)):
        if len(values) > 1:
            findings.append(Finding(f"{text} {_told(values)}.", True))
    findings += _data(runs) + _questions(runs) + _seeds(methods) + _references(runs) + _failures(runs) + _versions(runs)
    return [*findings, *_without_language(methods), *_budgets(methods)]


def _values(of_methods: Iterable[tuple[Method, Any]]) -> dict[str, list[str]]:
    """Each value with the labels of the methods that have it."""
    found: dict[str, list[str]] = {}
    for method, value in of_methods:
        labels = found.setdefault(str(value), [])
        if method.label not in labels:
            labels.append(method.label)
    return found


def _told(values: dict[str, list[str]]) -> str:
    return ", but ".join(f"{value or 'empty'} in {', '.join(labels)}" for value, labels in values.items())


def _same_data(runs: Sequence[tuple[Method, Run]], names: Sequence[str]) -> bool:
    """Whether all runs say that some data are the same; data that no run has (training questions) count as same."""
    known = all(run.fingerprints.get("retriever") for _, run in runs)
    return bool(names) and known and all(len({run.fingerprints.get(name) for _, run in runs}) == 1 for name in names)


def _data(runs: Sequence[tuple[Method, Run]]) -> list[Finding]:
    """Compare the data themselves; they may differ although all settings agree, if a file was replaced."""
    findings = []
    for name, meaning in _DATA.items():
        values = _values((method, known) for method, run in runs if (known := run.fingerprints.get(name)))
        if len(values) > 1:
            findings.append(Finding(f"{meaning}: the fingerprint is {_told(values)}.", True))
    unknown = dict.fromkeys(method.label for method, run in runs if not run.fingerprints.get("retriever"))
    if unknown:
        text = (
            f"what was searched is not known of {', '.join(unknown)}: the retriever did not tell its fingerprint, so "
            "whether all have searched the same is not checked."
        )
        findings.append(Finding(text))
    return findings


def _questions(runs: Sequence[tuple[Method, Run]]) -> list[Finding]:
    """Compare the questions that the predictions name."""
    findings = []
    for mode in dict.fromkeys(mode for _, run in runs for mode in run.modes):
        evaluated = [(method, run) for method, run in runs if mode in run.modes]
        known = [(method, run) for method, run in evaluated if mode in run.outcomes]
        for _, run in evaluated:
            if mode not in run.outcomes:
                findings.append(Finding(f"{run.path} has no predictions of {mode}; it is left out of paired tests."))
        for method, run in known[1:]:
            first_method, first = known[0]
            if differ := len(run.outcomes[mode].keys() ^ first.outcomes[mode].keys()):
                findings.append(
                    Finding(f"{differ} test questions, {mode}, of {method.label} ({run.path}) are not those of "
                            f"{first_method.label} ({first.path}) or the other way round.", True)
                )  # fmt: skip
    return findings


def _seeds(methods: Sequence[Method]) -> list[Finding]:
    findings = []
    for method in methods:
        for seed, count in Counter(method.seeds).items():
            if count > 1:
                where = ", ".join(str(run.path) for run in method.runs if run.seed == seed)
                findings.append(
                    Finding(f"{method.label} has {count} runs with seed {seed}: {where}; give one of them.", True)
                )
    numbers = {method.label: len(method.runs) for method in methods}
    if len(set(numbers.values())) > 1:
        told = ", ".join(f"{label} {count}" for label, count in numbers.items())
        findings.append(Finding(f"numbers of seeds differ: {told}."))
    return findings


def _references(runs: Sequence[tuple[Method, Run]]) -> list[Finding]:
    """The raw policy and the teacher were not trained, so their figures must be the same in all runs."""
    findings = []
    for model, mode in product(("raw", "teacher"), runs[0][1].modes):
        scored = ((method, run.figures(mode, model)) for method, run in runs)
        values = _values((method, f"{figures[ALL]['exact_match']:.4f}") for method, figures in scored if figures)
        if len(values) > 1:
            findings.append(Finding(f"the untrained model {model!r}, {mode}, has exact match {_told(values)}."))
    return findings


def _failures(runs: Sequence[tuple[Method, Run]]) -> list[Finding]:
    findings = []
    for method, run in runs:
        errors = sum(run.figures(mode)[ALL].get("retriever_errors", 0) for mode in run.modes)
        if errors:
            findings.append(Finding(f"{errors} test episodes of {method.label} ({run.path}) ended by a failed search."))
        if run.summary.get("teacher_in_memory_during_policy_evaluation"):
            findings.append(Finding(f"{run.path}: a teacher was in memory while the policy was evaluated."))
        for stage, of in run.summary.get("demonstrations", {}).items():
            if of["found"] < of["wanted"]:
                text = f"{method.label} ({run.path}) had {of['found']} of {of['wanted']} demonstrations for {stage}."
                findings.append(Finding(text))
        skipped = [stage["name"] for stage in run.summary.get("stages", []) if not stage["steps"]]
        if skipped:
            findings.append(Finding(f"{method.label} ({run.path}) skipped {', '.join(skipped)}: it is another method."))
    return findings


def _versions(runs: Sequence[tuple[Method, Run]]) -> list[Finding]:
    findings = []
    for part in ("versions", "machine"):
        for name in sorted({name for _, run in runs for name in run.summary.get(part, {})}):
            values = _values((method, run.summary.get(part, {}).get(name)) for method, run in runs)
            if len(values) > 1:
                findings.append(Finding(f"{part}: {name} is {_told(values)}."))
    return findings


def _without_language(methods: Sequence[Method]) -> list[Finding]:
    """Methods with environment steps but no sampled tokens are not language models; they choose from a list."""
    spent = {method.label: [run.summary.get("costs", {}) for run in method.runs] for method in methods}
    found = [
        label
        for label, costs in spent.items()
        if all(each.get("env_steps") and not each.get("sampled_tokens") for each in costs)
    ]
    text = (
        f"no language model: {', '.join(found)} took its steps without writing a token, from a list of actions that "
        "the others don't have; read its score as a yardstick."
    )
    return [Finding(text)] if found else []


def _budgets(methods: Sequence[Method]) -> list[Finding]:
    """Methods of different kinds rarely have equal budgets; report the budgets beside the scores."""
    told = []
    for cost, meaning in _BUDGETS.items():
        spent = {
            method.label: sum(run.summary.get("costs", {}).get(cost, 0.0) for run in method.runs) / len(method.runs)
            for method in methods
        }
        used = {label: value for label, value in spent.items() if value > 0}
        if used and max(used.values()) > _BUDGET_FACTOR * min(used.values()):
            least, most = min(used, key=used.__getitem__), max(used, key=used.__getitem__)
            told.append(f"{meaning} from {used[least]:,.0f} ({least}) to {used[most]:,.0f} ({most})")
    return [Finding(f"budgets differ: {'; '.join(told)}; see the table of costs.")] if told else []
