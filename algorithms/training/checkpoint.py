"""Checkpoints that survive a crash at any moment: complete and verified, or not there at all.

A checkpoint is a folder `<run>/checkpoints/<step>/` in Hugging Face format, with the training state beside the
weights and a manifest of sizes and checksums. It is written under another name, synced to disk and renamed, so the
final name never holds half a checkpoint. The manifest shows what a broken disk does to the folder later.

Networks in shares are saved whole, tensor after tensor, so plain transformers and any number of processes can read
them. `save_pretrained` divides weights of more than 50 GB into several files with an index. The sharded
format of `torch.distributed.checkpoint` has a pickle in it, which is never read here.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from agentic_rag_env.errors import ConfigurationError, DataError
from agentic_rag_env.files import sha256, sync, sync_all
from agentic_rag_env.settings import COUNT, check_value, or_none
from agentic_rag_env.weight_files import require_own_weights
from algorithms.learner import sharding
from algorithms.learner.adapter_folders import require_adapter
from algorithms.learner.adapters import is_adapted, load_adapter, load_trained_state
from algorithms.learner.networks import no_progress_bars
from algorithms.training.agent_files import AGENT_FILE

MANIFEST = "manifest.json"
TRAINING_STATE = "training_state.pt"
_UNFINISHED = ".unfinished"
_REPLACED = ".replaced"


def checkpoint_name(step: int) -> str:
    """Name of a checkpoint's folder within its run directory."""
    return f"checkpoints/{step:06d}"


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a checkpoint holds beside the weights.

    Attributes:
        step: Training steps done.
        learner: `Learner.state_dict()`, tensors on the CPU.
        trainer: What the trainer has put in.
    """

    step: int
    learner: dict[str, Any]
    trainer: dict[str, Any]


def save(
    run_dir: str | os.PathLike[str],
    step: int,
    *,
    policy: PreTrainedModel,
    tokenizer: Any,
    critic_state: Mapping[str, Tensor] | None = None,
    learner_state: Mapping[str, Any],
    trainer_state: Mapping[str, Any],
    agent: Mapping[str, Any] | None = None,
    keep_last: int | None = None,
    keep_steps: Collection[int] = (),
) -> Path:
    """Write one checkpoint, then remove those that it makes superfluous.

    All but the newest `keep_last` are superfluous. So is any of a later step: the run was taken back to an earlier
    checkpoint, and the later one must not be taken for its latest.

    Args:
        run_dir: The run directory.
        step: Training steps done.
        policy: Saved with `save_pretrained`, in its own precision; of one with an adapter, the adapter alone.
        tokenizer: Saved beside it.
        critic_state: What `adapters.trained_state` returns of the critic, if there is one.
        learner_state: What `Learner.state_dict()` returns.
        trainer_state: Tensors, numbers, strings, None, and lists, tuples and dicts of them.
        agent: Content of `agent.json`; None: there is none.
        keep_last: How many to keep, this one included; None: all.
        keep_steps: Steps that are not removed for their age, such as the best so far.

    Returns:
        The checkpoint's folder.

    Raises:
        ConfigurationError: `keep_last` is below 1.
        TypeError: A state holds an object that could not be loaded back safely.
        OSError: The disk is full or not writable; earlier checkpoints are as they were.
    """
    check_value("keep_last", keep_last, or_none(COUNT, "all"))
    state: dict[str, Any] = {"learner": dict(learner_state), "trainer": dict(trainer_state)}
    _require_plain(state, "state")
    state["critic"] = None if critic_state is None else dict(critic_state)
    final = Path(run_dir) / checkpoint_name(step)
    root, unfinished = final.parent, final.with_name(final.name + _UNFINISHED)
    root.mkdir(parents=True, exist_ok=True)
    _clean_up(root)
    try:
        unfinished.mkdir()
        with no_progress_bars():
            policy.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        if agent is not None:
            (unfinished / AGENT_FILE).write_text(json.dumps(agent, indent=1) + "\n", encoding="utf-8")
        torch.save(state, unfinished / TRAINING_STATE)
        _write_manifest(unfinished, step)
        sync_all(unfinished)
        _put_in_place(unfinished, final)
    except BaseException as error:
        full = _is_disk_full(error, root)
        shutil.rmtree(unfinished, ignore_errors=True)
        if full:
            raise OSError(errno.ENOSPC, _disk_full_message(final)) from error
        raise
    _prune(root, step, keep_last, keep_steps)
    return final


def recovered(run_dir: str | os.PathLike[str]) -> Path | None:
    """Finish what a crash has left in the middle of a checkpoint's replacement; then see `latest`.

    For the process that writes the run, while no other one does.
    """
    _put_back(Path(run_dir) / "checkpoints")
    return latest(run_dir)


def latest(run_dir: str | os.PathLike[str]) -> Path | None:
    """Find the newest complete checkpoint of a run; None if none was saved. Broken ones are skipped with a warning.

    Nothing is written, since the run may still be going on.

    Raises:
        DataError: There are checkpoints, and all of them are broken.
    """
    root = Path(run_dir) / "checkpoints"
    saved = _checkpoints(root)
    for path in reversed(saved):
        problem = find_problem(path)
        if problem is None:
            return path
        warnings.warn(f"Checkpoint {path} is skipped: {problem}.", stacklevel=2)
    if saved:
        raise DataError(
            f"None of the {len(saved)} checkpoints in {root} is whole, so the run can't go on from where it was. Put "
            "one of them back from a copy; or remove that folder, and the run begins again at its first step."
        )
    return None


def is_newest(path: str | os.PathLike[str]) -> bool:
    """Whether no whole checkpoint of a later step lies beside a checkpoint."""
    path = Path(path)
    later = (each for each in _checkpoints(path.parent) if int(each.name) > int(path.name))
    return all(find_problem(each) is not None for each in later)


def require_whole(path: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint that is damaged, and name a whole one.

    Args:
        path: A folder of `<run>/checkpoints`.

    Raises:
        DataError: The checkpoint is damaged or missing.
    """
    path = Path(path)
    if problem := find_problem(path):
        whole = [each for each in _checkpoints(path.parent) if each != path and find_problem(each) is None]
        earlier = [each for each in whole if path.name.isdecimal() and int(each.name) < int(path.name)]
        way_on = f"A whole one is {(earlier or whole)[-1]}." if whole else "There is no whole one beside it."
        if earlier:
            way_on += " A run goes on from there once the later ones are removed, and ends the same."
        raise DataError(f"Checkpoint {path} can't be used: {problem}. {way_on}")


def load(path: str | os.PathLike[str], *, policy: PreTrainedModel, critic: nn.Module | None = None) -> TrainingState:
    """Put the weights of a checkpoint into the given networks and return the rest.

    Nothing is executed from the file: weights are safetensors, the state is read with `weights_only=True`.

    Args:
        path: A checkpoint's folder.
        policy: A network of the architecture that was saved.
        critic: A critic of the architecture that was saved; None exactly if no critic was saved.

    Raises:
        DataError: The checkpoint is incomplete or damaged, or does not fit the networks.
    """
    path = Path(path)
    require_whole(path)
    # Processes that share a network take their shares out of the file, and none of them holds it whole.
    state = _plain_state(path, mmap=sharding.is_sharded(policy))
    if (state["critic"] is None) != (critic is None):
        saved, given = ("without a", "one was given") if critic is not None else ("with a", "none was given")
        raise DataError(f"Checkpoint {path} was saved {saved} critic and {given}; resume with the same algorithm.")
    try:
        _load_policy(path, policy)
        if critic is not None:
            load_trained_state(critic, state["critic"])
    except (RuntimeError, TypeError, AttributeError, ConfigurationError) as error:
        raise DataError(f"Checkpoint {path} does not fit the networks of this run: {error}") from error
    step = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["step"]
    return TrainingState(step, state["learner"], state["trainer"])


def _load_policy(path: Path, policy: PreTrainedModel) -> None:
    if is_adapted(policy):
        load_adapter(policy, require_adapter(path))
    else:
        with no_progress_bars():
            require_own_weights(str(path))
            saved = type(policy).from_pretrained(path, dtype=policy.dtype, use_safetensors=True, local_files_only=True)
        sharding.load_state(policy, saved.state_dict())


def read_trainer_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what the trainer put into a checkpoint, without any weights.

    Args:
        path: A checkpoint's folder; `latest` returns one.

    Raises:
        DataError: The state holds more than plain data, or is damaged.
    """
    return _plain_state(Path(path), mmap=True)["trainer"]


def find_problem(path: Path, checksums: bool = True) -> str | None:
    """Say what is wrong with a checkpoint; None if it is complete.

    Args:
        path: The checkpoint's folder.
        checksums: Read every byte; otherwise only names and sizes are compared.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        step, files = int(manifest["step"]), dict(manifest["files"])
        expected = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was not finished"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its {MANIFEST} is damaged ({error!r})"
    if path.name != f"{step:06d}":
        return f"its {MANIFEST} says step {step}"
    for name, (size, digest) in expected.items():
        file = path / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"its {MANIFEST} names a file outside of it"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if checksums and sha256(file) != digest:
            return f"{name} does not have the checksum it was saved with"
    return None


def _plain_state(path: Path, mmap: bool = False) -> dict[str, Any]:
    """Read the training state without executing anything; refuse one with more than tensors and plain data."""
    file = path / TRAINING_STATE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        if not all(isinstance(state[name], dict) for name in ("learner", "trainer")) or "critic" not in state:
            raise TypeError("it has not the parts of a training state")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, IndexError) as error:
        first = " ".join(str(error).split())[:200]
        raise DataError(
            f"{file} can't be read without executing what is in it, or is damaged ({type(error).__name__}: {first}). "
            "It is not used; begin a new run from the weights beside it: model.policy=" + str(path)
        ) from error
    return state


def _checkpoints(root: Path) -> list[Path]:
    """List the folders named after a step, oldest first."""
    return sorted((path for path in root.glob("*") if path.name.isdecimal()), key=lambda path: int(path.name))


def _put_back(root: Path) -> None:
    """Finish what a crash between the two renames of `_put_in_place` left."""
    for replaced in root.glob(f"*{_REPLACED}"):
        final = replaced.with_suffix("")
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.replace(final)


def _clean_up(root: Path) -> None:
    _put_back(root)
    for leftover in root.glob(f"*{_UNFINISHED}"):
        shutil.rmtree(leftover)


def _require_plain(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _require_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _require_plain(item, f"{where}[{index}]")
    elif value is not None and type(value) not in (bool, int, float, str, bytes) and not isinstance(value, Tensor):
        raise TypeError(
            f"{where} is a {type(value).__name__}, which can't be loaded back safely; store tensors, numbers, strings,"
            " None, and lists, tuples or dicts of them."
        )


def _write_manifest(folder: Path, step: int) -> None:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    entries = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files
    }
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": entries}, indent=1), encoding="utf-8")


def _put_in_place(unfinished: Path, final: Path) -> None:
    """Rename the folder. An older checkpoint of the same step is moved first, because a folder can't be replaced."""
    if final.exists():
        replaced = final.with_name(final.name + _REPLACED)
        final.replace(replaced)
        unfinished.replace(final)
        shutil.rmtree(replaced)
    else:
        unfinished.replace(final)
    sync(final.parent)


def _prune(root: Path, step: int, keep_last: int | None, keep_steps: Collection[int]) -> None:
    others = [path for path in _checkpoints(root) if int(path.name) != step]
    superfluous = [path for path in others if int(path.name) > step]
    if keep_last is not None:
        earlier = [path for path in others if int(path.name) < step]
        complete = [path for path in earlier if find_problem(path, checksums=False) is None]
        kept = complete[-(keep_last - 1) :] if keep_last > 1 else []
        superfluous += [path for path in earlier if path not in kept and int(path.name) not in keep_steps]
    for path in superfluous:
        doomed = path.with_name(f"{path.name}{_UNFINISHED}")
        path.replace(doomed)
        shutil.rmtree(doomed)


def _is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether a write failed because the disk is full. safetensors and torch do not always raise an OSError then."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, Exception) and (
        "No space left" in str(error) or "os error 28" in str(error) or shutil.disk_usage(folder).free < 1 << 20
    )


def _disk_full_message(final: Path) -> str:
    earlier = _checkpoints(final.parent)
    resume = f"the latest is still {earlier[-1]}" if earlier else "there is none yet"
    free = shutil.disk_usage(final.parent).free / 2**20
    return (
        f"No space left to save checkpoint {final} ({free:.0f} MiB free once the attempt was removed). Earlier"
        f" checkpoints are untouched: {resume}. Free some space, then resume the run"
    )
