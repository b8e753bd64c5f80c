"""`make gpu-check` in the form that needs no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KEYS = {"figure", "value", "floor", "unit", "hardware", "measured"}


def check_report(entries: list[dict]) -> None:
    assert all(entry.keys() == KEYS for entry in entries)
    by_name = {entry["figure"]: entry for entry in entries}
    assert len(by_name) == len(entries)
    measured = {name: entry for name, entry in by_name.items() if entry["measured"]}
    assert {"DGPO step, whole step", "DGPO step, decode", "decode step", "episodes played"} <= measured.keys()
    assert all(entry["value"] > (entry["floor"] or 0) for entry in measured.values())
    computed = {name: entry for name, entry in by_name.items() if not entry["measured"]}
    assert all(entry["value"] is None and "data sheet" in entry["hardware"] for entry in computed.values())
    # 512 episodes of 250 + 3 * 83 + 2 * 475 tokens, two operations for each of 3.09B + 0.49B parameters, 989 TFLOP/s.
    assert computed["DGPO step of the paper, scoring"]["floor"] == pytest.approx(
        2 * (3.09e9 + 0.494e9) * 512 * 1449 / 989e12, rel=0.01
    )


def test_the_committed_report_says_what_was_measured_and_what_was_not():
    check_report(json.loads((ROOT / "benchmarks" / "gpu-check.json").read_text(encoding="utf-8")))


@pytest.mark.nightly
def test_the_small_form_writes_both_reports(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--small", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    entries = json.loads((tmp_path / "gpu-check.json").read_text(encoding="utf-8"))
    check_report(entries)
    table = (tmp_path / "gpu-check.md").read_text(encoding="utf-8")
    assert all(f"| {entry['figure']} |" in table for entry in entries)
