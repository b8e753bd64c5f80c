"""Shares of the work, decisions of the first process, and an end for all."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from rank_processes import join, start, told
from torch import nn

from agentic_rag_env.errors import ConfigurationError
from algorithms.learner import ranks


def test_one_process_does_everything_itself():
    assert (ranks.count(), ranks.rank(), ranks.is_first()) == (1, 0, True)
    assert ranks.share([5, 6, 7]) == ranks.in_order([5, 6, 7]) == [5, 6, 7]
    assert ranks.gathered("own") == ["own"]
    assert ranks.decided(lambda: 4) == ranks.led(lambda: 4, print) == 4
    parameter = nn.Parameter(torch.ones(2))
    ranks.sum_gradients([parameter])
    assert parameter.grad is None
    assert ranks.summed(torch.ones(2)).tolist() == [1, 1]
    ranks.leave()
    ranks.fail()


def share_some_work(folder: Path) -> None:
    ranks.join()
    time.sleep(2)  # so that whatever looks after the others all the time is seen to do so silently
    rank = ranks.rank()
    found = {"count": ranks.count(), "rank": rank, "first": ranks.is_first()}
    own = ranks.share(range(7))
    found["own"] = list(own)
    found["in order"] = ranks.in_order([10 * number for number in own])
    found["of few"] = ranks.in_order(ranks.share(["a"]))
    found["gathered"] = ranks.gathered(rank)
    found["summed"] = ranks.summed(torch.tensor([1.0, rank])).tolist()
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
    parameters[0].grad = torch.tensor([1.0, rank])
    if rank == 1:
        parameters[1].grad = torch.tensor([3.0, 4.0])  # the others had no token to learn from
    parameters[3].grad = torch.tensor([2.0, 2.0])
    ranks.sum_gradients(parameters)
    found["gradients"] = [None if each.grad is None else each.grad.tolist() for each in parameters]
    found["decided"] = ranks.decided(lambda: [os.getpid(), ranks.count(), ranks.in_order(ranks.share([1, 2]))])

    def answer(question: int) -> list[int]:
        return ranks.in_order([question * number for number in ranks.share([1, 2, 3, 4])])

    def work() -> list[list[int]]:
        return [(ranks.ask(question), answer(question))[1] for question in (2, 3)]

    found["led"] = ranks.led(work, answer)
    found["pid"] = os.getpid()
    (folder / f"{rank}.json").write_text(json.dumps(found))
    ranks.leave()


def test_processes_that_share_a_gpu_are_refused():
    ranks.require_own_gpus([("a", "gpu-0"), ("a", "gpu-1"), ("b", "gpu-0")])
    with pytest.raises(ConfigurationError, match=r"3 processes on b have 2 GPUs.*--nproc-per-node 2"):
        ranks.require_own_gpus([("a", "gpu-0"), ("b", "gpu-0"), ("b", "gpu-1"), ("b", "gpu-0")])


def test_shares_and_decisions_of_three_processes(tmp_path):
    processes = start(3, tmp_path, share_some_work, tmp_path)
    join(processes, 120)
    assert [process.exitcode for process in processes] == [0, 0, 0], told(tmp_path)
    assert "socket" not in "".join(file.read_text() for file in tmp_path.glob("stderr-*"))
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [each["own"] for each in found] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [each["first"] for each in found] == [True, False, False]
    for rank, each in enumerate(found):
        assert (each["count"], each["rank"]) == (3, rank)
        assert each["in order"] == [0, 10, 20, 30, 40, 50, 60]
        assert each["of few"] == ["a"]
        assert each["gathered"] == [0, 1, 2]
        assert each["summed"] == [3, 3]
        assert each["gradients"] == [[3, 3], [3, 4], None, [6, 6]]
        assert each["decided"] == [found[0]["pid"], 1, [1, 2]]
        assert each["led"] == [[2, 4, 6, 8], [3, 6, 9, 12]]


def die(folder: Path, who: int, how: str) -> None:
    """One of three processes ends while the others wait in a collective operation, or compute."""
    ranks.join()
    if ranks.rank() == who:
        time.sleep(0.5)
        (folder / "died").write_text(str(time.time()))
        if how == "raises":
            try:
                raise OSError("the disk is gone")
            except OSError as error:
                ranks.fail()
                raise SystemExit(f"OSError: {error}") from error
        os.kill(os.getpid(), getattr(signal, how))
    if ranks.rank() == (who + 2) % 3:
        time.sleep(60)
    ranks.summed(torch.ones(3))


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP", "raises"])
@pytest.mark.parametrize("who", [0, 2])
def test_all_end_with_one_message(tmp_path, who, how):
    processes = start(3, tmp_path, die, tmp_path, who, how)
    join(processes, 60)
    assert time.time() - float((tmp_path / "died").read_text()) < 30  # 3 to 10 where nothing else runs
    assert all(process.exitcode for process in processes)
    assert len(told(tmp_path)) == 1, told(tmp_path)
    if how == "raises":
        assert told(tmp_path) == ["OSError: the disk is gone"]
    else:
        assert re.match(rf"Process {who} of 3 .*resume=", told(tmp_path)[0])


def be_asked_to_end(folder: Path) -> None:
    ranks.join()
    (folder / f"pid-{ranks.rank()}").write_text(str(os.getpid()))
    if ranks.rank() == 0:
        ranks.wait()
    time.sleep(60)


def test_sigterm_ends_a_process_inside_a_collective_operation(tmp_path):
    """As `torchrun` does it, which does not wait for Python code to run again."""
    processes = start(2, tmp_path, be_asked_to_end, tmp_path)
    while not all((tmp_path / f"pid-{rank}").exists() for rank in range(2)):
        time.sleep(0.1)
        assert all(process.is_alive() for process in processes)
    for process in processes:
        os.kill(process.pid, signal.SIGTERM)
    join(processes, 30)
    assert 128 + signal.SIGTERM in [process.exitcode for process in processes]
    assert len(told(tmp_path)) <= 1
