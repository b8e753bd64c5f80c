"""Trajectories on disk: gzipped JSON lines, readable by a person and restored bit for bit."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any, cast

import numpy as np

from agentic_rag_env.files import read_rows, written_whole
from agentic_rag_env.types import Passage, Question, StepInfo
from algorithms.learner.config import working_dtype
from algorithms.learner.types import Trajectory, Turn


def write_trajectories(
    path: Path,
    trajectories: Iterable[Trajectory],
    tokenizer: Any,
    questions: Iterable[Question] = (),
    token_figures: Iterable[Mapping[str, np.ndarray]] = (),
) -> None:
    """Write trajectories with their text. The file appears whole or not at all.

    Args:
        path: Path that ends in `.jsonl.gz`; its folder is made.
        trajectories: What to write.
        tokenizer: Decodes the text beside the ids.
        questions: Questions of the trajectories, in their order, for readers of the file. Further ones are ignored.
        token_figures: Further figures of the model-written tokens of each trajectory, [n] float by name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = chain(questions, repeat(None)), chain(token_figures, repeat({}))
    with written_whole(path) as partial, gzip.open(partial, "wt", encoding="utf-8") as file:
        for trajectory, question, figures in zip(trajectories, *beside, strict=False):
            row = _to_json(trajectory, tokenizer)
            if question is not None:
                row["question"] = _question_to_json(question)
            for name, values in figures.items():
                _add_figure(row["turns"], name, values)
            file.write(json.dumps(row) + "\n")


def read_trajectories(path: Path) -> list[Trajectory]:
    """Read what `write_trajectories` wrote.

    Raises:
        DataError: The file has another form; the message names it and the line.
    """
    return list(read_rows(path, _from_json))


def pack(trajectories: Iterable[Trajectory]) -> bytes:
    """Turn trajectories into plain data without their text, for a checkpoint."""
    return gzip.compress("\n".join(json.dumps(_to_json(each)) for each in trajectories).encode(), mtime=0)


def unpack(packed: bytes) -> list[Trajectory]:
    """Restore the trajectories that `pack` has turned into plain data."""
    return [_from_json(json.loads(line)) for line in gzip.decompress(packed).decode().splitlines()]


def transcript(trajectory: Trajectory, tokenizer: Any) -> str:
    """Decode the whole episode: what was read and written, in order."""
    ids = [trajectory.prompt_ids]
    for turn in trajectory.turns:
        ids += [turn.action_ids, turn.observation_ids]
    return tokenizer.decode(np.concatenate(ids).tolist(), clean_up_tokenization_spaces=False)


def _to_json(trajectory: Trajectory, tokenizer: Any = None) -> dict[str, Any]:
    def text(ids: np.ndarray) -> str | None:
        return tokenizer and tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)

    return {
        "question_id": trajectory.turns[-1].info["question_id"],
        "correct": trajectory.correct,
        "reward": trajectory.reward,
        "terminated": trajectory.terminated,
        "truncated": trajectory.truncated,
        "ending": trajectory.ending,
        "source": trajectory.source,
        "group_id": trajectory.group_id,
        "message": trajectory.prompt,
        "prompt": text(trajectory.prompt_ids),
        "prompt_ids": trajectory.prompt_ids.tolist(),
        **_wide(trajectory),
        "turns": [
            {
                "action": text(turn.action_ids),
                "observation": text(turn.observation_ids),
                "action_ids": turn.action_ids.tolist(),
                "action_logprobs": turn.action_logprobs.astype(float).tolist(),
                "observation_ids": turn.observation_ids.tolist(),
                **({"end_unread": True} if turn.end_unread else {}),
                "info": {**turn.info, "passages": [dataclasses.asdict(passage) for passage in turn.info["passages"]]},
            }
            for turn in trajectory.turns
        ],
    }


def _wide(trajectory: Trajectory) -> dict[str, str]:
    """Name the dtype of log-probabilities that are not float32."""
    return {"logprobs": "float64"} if trajectory.turns[0].action_logprobs.dtype.itemsize == 8 else {}


def _question_to_json(question: Question) -> dict[str, Any]:
    known = {name: question.metadata.get(name) for name in ("dataset", "hops")}
    return {"text": question.text, "golden_answers": list(question.golden_answers), **known}


def _add_figure(turns: Sequence[dict[str, Any]], name: str, values: np.ndarray) -> None:
    """Spread a figure of all model-written tokens of a trajectory over its turns."""
    ends = np.cumsum([len(turn["action_ids"]) for turn in turns])
    for turn, part in zip(turns, np.split(values, ends[:-1]), strict=True):
        turn[name] = part.astype(float).tolist()


def _from_json(row: dict[str, Any]) -> Trajectory:
    dtype = working_dtype(row.get("logprobs", "float32"))
    return Trajectory(
        prompt_ids=np.array(row["prompt_ids"], dtype=np.int64),
        turns=[
            Turn(
                action_ids=np.array(turn["action_ids"], dtype=np.int64),
                action_logprobs=np.array(turn["action_logprobs"], dtype=dtype),
                observation_ids=np.array(turn["observation_ids"], dtype=np.int64),
                info=cast(
                    "StepInfo",
                    turn["info"] | {"passages": tuple(Passage(**passage) for passage in turn["info"]["passages"])},
                ),
                end_unread=turn.get("end_unread", False),
            )
            for turn in row["turns"]
        ],
        group_id=row["group_id"],
        source=row["source"],
        reward=row["reward"],
        correct=row["correct"],
        terminated=row["terminated"],
        truncated=row["truncated"],
        prompt=row.get("message", ""),
    )
