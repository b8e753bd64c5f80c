"""Freed memory stays for the next blocks, and goes back to the system only when a stage has grown."""

import ctypes

import pytest
import torch

from algorithms.training import host_memory

MIB = 2**20


only_glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library")


@only_glibc
def test_a_large_freed_block_is_kept_until_it_is_given_back():
    host_memory.keep_freed()
    block = torch.ones(64 * MIB)
    held = host_memory.resident()
    del block
    assert host_memory.resident() > held - 50 * MIB
    host_memory.give_back()
    assert host_memory.resident() < held - 200 * MIB


@only_glibc
def test_freed_tensors_are_given_back():
    torch.ones(8 * MIB)  # once a large block was freed, glibc keeps smaller ones
    freed, kept = [], []
    for _ in range(400):
        freed.append(torch.ones(MIB // 8))
        kept.append(torch.ones(1024))
    held = host_memory.resident()
    del freed
    host_memory.give_back()
    assert host_memory.resident() < held - 150 * MIB
    assert all(bool(each.eq(1).all()) for each in kept)


def test_memory_is_given_back_after_a_step_that_has_grown_by_a_quarter(monkeypatch):
    sizes, given = [3000 * MIB, 4000 * MIB, 4900 * MIB, 5100 * MIB, 4200 * MIB], []
    monkeypatch.setattr(host_memory, "give_back", lambda: given.append(len(sizes)))
    monkeypatch.setattr(host_memory, "resident", lambda: sizes.pop(0))
    memory = host_memory.StepMemory()
    for _ in range(5):
        memory.after_step()
    assert given == [1]  # after the fourth of five steps


def test_a_small_process_and_another_system_keep_what_they_have(monkeypatch):
    monkeypatch.setattr(host_memory, "give_back", lambda: pytest.fail("given back"))
    for sizes in ([500 * MIB, 500 * MIB, 1900 * MIB], [None, None, None]):
        monkeypatch.setattr(host_memory, "resident", lambda left=sizes: left.pop(0))
        memory = host_memory.StepMemory()
        for _ in range(3):
            memory.after_step()
