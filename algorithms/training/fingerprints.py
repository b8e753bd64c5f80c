"""Hashes of what a run was asked and of what it searched. Equal data have equal hashes, wherever the files are."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import agentic_rag_env
from agentic_rag_env.corpus import fingerprint
from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.errors import AgenticRAGError
from agentic_rag_env.files import sha256
from agentic_rag_env.registry import DATASETS, ENVS, PROBES, RETRIEVERS, REWARDS, modules_of_files
from agentic_rag_env.retrievers.base import hash_of
from agentic_rag_env.types import Question
from agentic_rag_env.weight_files import WEIGHT_INDEX
from algorithms.learner.adapter_folders import find_adapter
from algorithms.rollout.tokenization import encode_prompts
from algorithms.training.demonstrations.source import DEMONSTRATION_SOURCES

if TYPE_CHECKING:
    from algorithms.training.build import RunEnvs

_PACKAGES = ("torch", "transformers", "gymnasium", "bm25s", "hydra-core", "agentic-rag-env")
#: Those whose parts decide what an episode is.
_REGISTRIES = (ENVS, DATASETS, RETRIEVERS, REWARDS, PROBES)
#: The architecture, which tokens end a text, and which of several files hold the weights.
_MODEL_SETTINGS = ("config.json", "generation_config.json", WEIGHT_INDEX)
#: The code that an episode and its figures may depend on: the environment's package, and the rooms that play and
#: measure.
_ZOO, _PACKAGE = Path(__file__).parents[1], Path(agentic_rag_env.__file__).parent
_CODE = (_PACKAGE, *(_ZOO / room for room in ("learner", "rollout", "training")))
#: Packages that parts may come from, and whose files do not change between versions.
_COUNTED_BY_VERSION = ("agentic_rag_env", "algorithms", "gymnasium")


def fingerprints(tested: RunEnvs, num_tested: int, trained: Sequence[Question] | None = None) -> dict[str, str | None]:
    """Hashes of the data behind the figures of a run.

    Args:
        tested: The environments of the evaluation.
        num_tested: How many of their questions were asked, the first ones.
        trained: The training questions; None if nothing was trained.

    Returns:
        `questions` and `training_questions` hash ids, texts and golden answers, in their order. `corpus` hashes the
        dataset's passages. `retriever` hashes all that the results of a search depend on, the passages included. None
        stands for what does not exist or can't be known. No hash depends on a path or reads a corpus on disk again.
    """
    corpus = tested.dataset.corpus
    return {
        "questions": of_questions(tested.dataset[:num_tested]),
        "training_questions": None if trained is None else of_questions(trained),
        "corpus": None if corpus is None else fingerprint(corpus),
        "retriever": of_retriever(tested.retriever),
    }


def of_questions(questions: Sequence[Question]) -> str:
    """Hash of ids, texts and golden answers in their order."""
    return hash_of([[question.id, question.text, list(question.golden_answers)] for question in questions])


def of_retriever(retriever: Any) -> str | None:
    """Ask a retriever for its fingerprint; None for a service that can't be asked or has none."""
    try:
        said = getattr(retriever, "fingerprint", None)
    except AgenticRAGError as error:
        # The line is the same wherever this is asked, so it is said once.
        warnings.warn(f"What was searched is not known to the summary: {error}", stacklevel=1)
        return None
    return None if said is None else str(said)


def of_playing(settings: Mapping[str, Any], model_folder: str, tokenizer: Any, dataset: QuestionSet) -> str:
    """Hash of everything that decides which episodes a model plays.

    Args:
        settings: Settings of environment, retriever, reward, rollout, device and the like, as plain data.
        model_folder: A folder whose weights and settings are read; a hub id counts by its name.
        tokenizer: Tokenizer with which the model reads and writes.
        dataset: Its questions, and its passages if it has any.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    adapter = find_adapter(model_folder) if Path(model_folder).is_dir() else None
    for place in [model_folder] if adapter is None else [model_folder, adapter.base]:
        folder = Path(place)
        for file in sorted(folder.iterdir()) if folder.is_dir() else []:
            if file.suffix in (".safetensors", ".bin") or file.name in _MODEL_SETTINGS:
                digest.update(bytes.fromhex(sha256(file)))
        digest.update(place.encode() if not folder.is_dir() else b"")
    digest.update(b"" if adapter is None else repr(adapter.scale).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    splitting = backend.to_str() if backend else sorted(tokenizer.get_vocab().items())
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    # What a template makes of a message counts, since it may write the day.
    read = [ids.tolist() for ids in encode_prompts(tokenizer, [""])]
    digest.update(repr((splitting, tokenizer.chat_template, special, read)).encode("utf-8", "backslashreplace"))
    passages = None if dataset.corpus is None else fingerprint(dataset.corpus)
    digest.update(repr((of_questions(dataset), passages)).encode())
    return digest.hexdigest()[:32]


def of_code() -> str | None:
    """Hash of the code that plays and measures episodes, plug-ins included; None if some of it is in no file."""
    if (plugins := _plugin_files()) is None:
        return None
    files = plugins.union(*(folder.rglob("*.py") for folder in _CODE))
    return hash_of([versions(), *map(sha256, sorted(files))])


def of_plugins(*parts: Any) -> str | None:
    """Hash of the files of plug-ins that an episode may depend on; empty without plug-ins, None if one is in no file.

    Args:
        parts: Further objects whose code counts, such as an environment that no registry here knows.
    """
    if (files := _plugin_files(*parts)) is None:
        return None
    return hash_of([*map(sha256, sorted(files))]) if files else ""


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that figures may depend on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _plugin_files(*parts: Any) -> set[Path] | None:
    """Files of the code from elsewhere: of plug-ins, of the parts, and of the packages to which their modules belong.

    What a process has loaded besides does not count, so that a second run in it has the hashes of a first one.
    """
    names = {type(part).__module__ for part in parts}
    names |= {registry.get(name).factory.__module__ for registry in _REGISTRIES for name in registry.names()}
    for registry in (*_REGISTRIES, DEMONSTRATION_SOURCES):
        names |= {point.module for point in entry_points(group=f"agentic_rag_env.{registry.group}")}
    names |= modules_of_files()  # which those names have loaded
    found: set[Path] = set()
    for name in names:
        if name.partition(".")[0] in _COUNTED_BY_VERSION:
            continue
        module = sys.modules.get(name)
        if (place := getattr(module, "__file__", None)) is None:
            return None
        file = Path(place)
        depth = 0 if name == place else name.count(".") + hasattr(module, "__path__")
        found |= {file, *(file.parents[depth - 1].rglob("*.py") if depth else ())}
    return {file for file in found if not any(file.is_relative_to(own) for own in (_ZOO, _PACKAGE))}
