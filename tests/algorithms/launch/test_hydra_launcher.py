"""Multiruns: slots that are never shared, jobs that fall alone, restarts that run what is missing, names, and locks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from fake_jobs import ROOT, FakeSweep, Silent, is_running, wait_until
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from small_runs import SFT, TINY, Run, assert_same_run, command, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.files import file_name
from algorithms.launch import job_pool
from algorithms.launch.hydra_launcher import _safe_path, make_slots
from algorithms.launch.job_pool import Job, Launcher, Slot
from algorithms.launch.resolvers import job_name
from algorithms.training import demonstrations, file_locks
from algorithms.training.model_names import resolve_model

# --- jobs and slots --------------------------------------------------------------------------------------------------


def test_nine_runs_on_eight_gpus_with_crashes(tmp_path):
    behaviours = {f"job-{index}": "fine" for index in range(9)}
    behaviours |= {"job-1": "3", "job-4": "SIGKILL", "job-8": "SIGSEGV"}
    sweep = FakeSweep(tmp_path, behaviours)
    failed = sweep.launch(8)
    assert {attempt.job.name: attempt.code for attempt in failed} == {
        "job-1": 3,
        "job-4": -signal.SIGKILL,
        "job-8": -signal.SIGSEGV,
    }
    assert sweep.starts() == dict.fromkeys(behaviours, 1)
    assert {line["slot"] for line in sweep.noted("start")} == set("01234567")
    assert sweep.complete() == behaviours.keys() - {"job-1", "job-4", "job-8"}
    assert (tmp_path / "job-4" / job_pool.LOG_FILE).read_text() == "the last words of job-4\n"

    assert sweep.launch(8) == []
    assert sweep.starts() == {name: 1 + (behaviours[name] != "fine") for name in behaviours}
    assert sweep.complete() == behaviours.keys()
    assert sweep.launch(8) == []
    assert sum(sweep.starts().values()) == 12
    sweep.assert_no_slot_twice_at_a_time()
    assert Counter(kind for kind, _ in sweep.watcher.told) == {"begun": 12, "failed": 3, "done": 6 + 9 + 9}


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_few_slots_are_used_again_and_again(tmp_path, num_slots):
    sweep = FakeSweep(tmp_path, {f"job-{index}": "fine" for index in range(7)})
    assert sweep.launch(num_slots) == []
    assert sweep.starts() == dict.fromkeys(sweep.behaviours, 1)
    assert len({line["slot"] for line in sweep.noted("start")}) == num_slots
    sweep.assert_no_slot_twice_at_a_time()


def test_a_job_that_ends_well_without_a_result_has_failed(tmp_path):
    sweep = FakeSweep(tmp_path, {"job": "0"})
    assert [attempt.code for attempt in sweep.launch(1)] == [0]
    assert sweep.watcher.told == [("begun", "job"), ("failed", "job")]


def test_a_job_that_cannot_be_started_is_the_only_one_that_fails(tmp_path):
    sweep = FakeSweep(tmp_path, {"job-0": "fine", "job-1": "fine"})
    (tmp_path / "job-0").write_text("a file where the run directory should be")
    failed = sweep.launch(1)
    assert [attempt.job.name for attempt in failed] == ["job-0"]
    assert "job-0" in failed[0].problem
    assert sweep.complete() == {"job-1"}


def test_what_a_killed_launcher_left_running_is_waited_for_and_not_started_twice(tmp_path):
    behaviours = {f"job-{index}": "wait" for index in range(5)}
    sweep = FakeSweep(tmp_path, behaviours)
    launcher = sweep.launch_elsewhere(3)
    sweep.wait_for_starts(3)
    launcher.kill()
    launcher.wait()
    orphans = sweep.noted("start")
    assert all(is_running(line["pid"]) for line in orphans)
    os.kill(orphans[0]["pid"], signal.SIGKILL)  # one of them falls before it is done
    threading.Timer(0.5, sweep.go).start()
    assert sweep.launch(2) == []  # fewer slots than before: the third one is still respected
    assert sweep.complete() == behaviours.keys()
    assert sweep.starts() == {**dict.fromkeys(behaviours, 1), orphans[0]["job"]: 2}
    assert sweep.noted("clash") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_launcher_that_is_asked_to_end_leaves_nothing_running(tmp_path, number):
    sweep = FakeSweep(tmp_path, {"job-0": "wait", "job-1": "stubborn", "job-2": "wait"})
    launcher = sweep.launch_elsewhere(2)
    sweep.wait_for_starts(2)
    launcher.send_signal(number)
    assert "KeyboardInterrupt" in launcher.communicate(timeout=60)[1]
    assert not any(is_running(line["pid"]) for line in sweep.noted("start"))
    assert sweep.starts() == {"job-0": 1, "job-1": 1}
    sweep.go()
    assert sweep.launch(2) == []
    assert sweep.complete() == sweep.behaviours.keys()


def test_what_an_ended_job_has_left_behind_ends_too(tmp_path):
    script = f"sleep 600 & echo $! > {tmp_path}/pid; touch {tmp_path}/summary.json"
    job = Job("job", tmp_path, lambda slot: ["sh", "-c", script], (tmp_path / "pid").exists, "job")
    assert Launcher([Slot(0)], tmp_path / "locks", Silent()).run([job]) == []
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not is_running(pid))


# --- how the machine is divided --------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """Pretends to be a machine with so many GPUs and cores."""

    def pretend(num_gpus, num_cores, **environment):
        for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)))

    return pretend


def environments(slots):
    return [(slot.environment["CUDA_VISIBLE_DEVICES"], slot.environment["OMP_NUM_THREADS"]) for slot in slots]


def test_a_slot_is_a_gpu(machine):
    machine(8, 64)
    assert environments(make_slots(None, None)) == [(str(index), "8") for index in range(8)]
    assert environments(make_slots(None, 2)) == [("0", "32"), ("1", "32")]
    assert environments(make_slots(3, 2)) == [("0", "21"), ("1", "21"), ("0", "21")]
    machine(2, 4, CUDA_VISIBLE_DEVICES="GPU-abc,5")
    assert environments(make_slots(None, None)) == [("GPU-abc", "2"), ("5", "2")]


def test_a_slot_is_a_share_of_the_cores_where_there_is_no_gpu(machine):
    machine(0, 2)
    assert environments(make_slots(None, None)) == [("", "1")] * 2
    assert environments(make_slots(1, None)) == [("", "2")]
    machine(0, 64)
    assert environments(make_slots(None, None)) == [("", "8")] * 8
    machine(4, 4)
    assert environments(make_slots(None, 0)) == [("", "1")] * 4
    machine(0, 8, OMP_NUM_THREADS="1")
    assert environments(make_slots(2, None)) == [("", "1")] * 2


def test_a_slot_may_have_several_gpus(machine):
    machine(8, 64)
    assert environments(make_slots(None, None, 2)) == [("0,1", "8"), ("2,3", "8"), ("4,5", "8"), ("6,7", "8")]
    assert environments(make_slots(None, 7, 3)) == [("0,1,2", "10"), ("3,4,5", "10")]  # the seventh is not used
    assert environments(make_slots(1, None, 4)) == [("0,1,2,3", "16")]
    machine(0, 8)
    assert environments(make_slots(None, None, 2)) == [("", "1")] * 4
    machine(0, 2)
    assert environments(make_slots(None, None, 3)) == [("", "1")]


def test_more_gpus_than_there_are_cannot_be_given_to_a_job(machine):
    machine(2, 4)
    with pytest.raises(ConfigurationError, match="gpus_per_job=3 needs more GPUs than the 2 here"):
        make_slots(None, None, 3)
    with pytest.raises(ConfigurationError, match="gpus_per_job must be an integer of at least 1, got 0"):
        make_slots(None, None, 0)


@pytest.mark.parametrize(
    ("num_slots", "gpus", "message"),
    [
        (0, None, "num_slots must be an integer of at least 1, or None, got 0"),
        (None, 3, "gpus must be from 0 to 2, or null; got 3"),
    ],
)
def test_a_machine_that_cannot_be_divided_so(machine, num_slots, gpus, message):
    machine(2, 4)
    with pytest.raises(ConfigurationError, match=message):
        make_slots(num_slots, gpus)


# --- names -----------------------------------------------------------------------------------------------------------

HARD_NAMES = [
    "a/b", "a_b", "a b", "..", ".", "-m", "", "x" * 300, "x" * 299 + "y", "größe", "a'b", 'a"b', "a\nb", "[0,1]",
    "{a:1}", "~a", "a=b", "${a}", "a,b", "a.", "nul", "NUL.txt", "com1", "c:x",
]  # fmt: skip


def test_names_are_safe_and_different():
    names = [file_name(text) for text in HARD_NAMES]
    assert len(set(names)) == len(names)
    for name in names:
        assert 0 < len(name) < 150
        assert not name.startswith((".", "-")) or name[1:].isalnum()
        # What Windows can't have as a name.
        assert not set(name) & set('<>:"/\\|?*')
        assert not name.endswith((".", " "))
        assert name.partition(".")[0].lower() not in ("con", "nul", "com1")
        assert OverridesParser.create().parse_override(f"resume=multirun/{name}").value() == f"multirun/{name}"


def test_a_job_is_called_by_its_overrides_in_whatever_order_they_came():
    name = job_name(["seed=0", "+experiment=paper", "algo.steps=10", "algo=ppo", "threads=1", "cache_dir=/a/b"])
    assert name == "algo-ppo+experiment-paper+seed-0+algo.steps-10"
    assert name == job_name(["algo=ppo", "algo.steps=10", "seed=0", "threads=2", "++experiment=paper"])
    assert job_name([]) == "defaults"


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """What `-m` would start, as lists of command lines, without starting it."""
    calls = []

    def run(self, planned):
        slot = Slot(0, {"OMP_NUM_THREADS": "2"})
        calls.append({job.name: job.command(slot) for job in planned if not job.is_complete()})
        return []

    monkeypatch.setattr(Launcher, "run", run)
    return calls


def pretend_run(path: Path, *overrides: str, done: bool = True) -> None:
    """Leave what the run of a job leaves, without training."""
    shown = command("--cfg", "job", *overrides)
    assert shown.code == 0
    (path / ".hydra").mkdir(parents=True)
    (path / ".hydra" / "config.yaml").write_text(shown.out)
    (path / "metrics.jsonl").touch()
    if done:
        (path / "summary.json").write_text("{}")


def test_each_job_is_the_command_with_its_overrides(tmp_path, launched):
    sweep = tmp_path / "a sweep"
    run = command("-m", "algo=ppo,dgpo", "seed=0,1", "num_envs=8", f"hydra.sweep.dir='{sweep}'")
    assert run.code == 0, run.err
    (started,) = launched
    assert list(started) == [f"algo-{a}+seed-{s}" for a in ("ppo", "dgpo") for s in (0, 1)], "num_envs is fixed"
    line = started["algo-dgpo+seed-1"]
    assert line[0] == sys.executable
    assert line[line.index("-m") + 1] == "algorithms.run"
    assert {"algo=dgpo", "seed=1", "num_envs=8", "threads=2", "hydra.mode=RUN"} <= set(line)
    assert f"hydra.run.dir='{sweep}/algo-dgpo+seed-1'" in line
    assert not any(part in line for part in ("algo=ppo", "seed=0", "-m algorithms"))
    metadata = EventAccumulator(str(sweep / "tb")).Reload().summary_metadata
    table = HParamsPluginData.FromString(metadata["_hparams_/experiment"].plugin_data.content).experiment
    assert [column.name for column in table.hparam_infos] == ["algo.name", "seed"]
    assert "custom_scalars__config__" in metadata


def test_more_seeds_may_follow_the_first(tmp_path, launched):
    sweep = f"hydra.sweep.dir={tmp_path}"
    for algorithms in ("ppo", "ppo,dgpo"):  # a lone job is called as one of several
        assert command("-m", f"algo={algorithms}", "seed=0", "num_envs=8", sweep).code == 0
    assert [list(each) for each in launched] == [["algo-ppo+seed-0"], ["algo-ppo+seed-0", "algo-dgpo+seed-0"]]
    pretend_run(tmp_path / "algo-ppo+seed-0", "algo=ppo", "seed=0", "num_envs=8")
    assert command("-m", "algo=ppo", "seed=0,1", "num_envs=8", sweep).code == 0
    assert list(launched[2]) == ["algo-ppo+seed-1"], "the first seed is done already"


@pytest.mark.parametrize(
    ("path", "imports_from_here"), [(["/bin", "/lib"], False), (["", "/lib"], True), ([None, "/lib"], True)]
)
@pytest.mark.parametrize("torchrun", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]])
def test_jobs_import_from_the_working_directory_only_if_this_process_does(
    tmp_path, monkeypatch, path, imports_from_here, torchrun
):
    """An installed command does not, so a user's own package `algorithms` there is not taken for ours."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path) if place is None else place for place in path])
    settings = _safe_path()
    assert all(settings.items() <= slot.environment.items() for slot in make_slots(2, 0))
    # What the variable does, with a package of the user's own:
    (tmp_path / "algorithms_of_mine").mkdir()
    (tmp_path / "algorithms_of_mine" / "__init__.py").touch()
    (tmp_path / "algorithms_of_mine" / "__main__.py").write_text("print('mine')")
    command, environment = [sys.executable, *torchrun, "-m", "algorithms_of_mine"], {**os.environ, **settings}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ("mine" in done.stdout) is imports_from_here


def test_a_restart_runs_what_is_missing_and_resumes_what_has_begun(tmp_path, launched):
    sweep = f"hydra.sweep.dir={tmp_path}"
    pretend_run(tmp_path / "algo-ppo+seed-0", "algo=ppo", "seed=0", "threads=1", "cache_dir=elsewhere")
    pretend_run(tmp_path / "algo-ppo+seed-1", "algo=ppo", "seed=1", done=False)
    (tmp_path / "algo-ppo+seed-2" / ".hydra").mkdir(parents=True)  # killed before it did anything
    run = command("-m", "seed=0,1,2,3", "algo=ppo", sweep)
    assert run.code == 0, run.err
    assert "4 runs, 1 of them done already" in run.out
    (started,) = launched
    assert list(started) == ["algo-ppo+seed-1", "algo-ppo+seed-2", "algo-ppo+seed-3"]
    resumed = started["algo-ppo+seed-1"]
    assert f"resume='{tmp_path}/algo-ppo+seed-1'" in resumed
    assert not any(part.startswith(("seed=", "algo=", "threads=")) for part in resumed)
    assert "seed=2" in started["algo-ppo+seed-2"]


def test_a_restart_may_say_otherwise_how_the_rest_is_carried_out(tmp_path, launched):
    """After a full disk, say. What has no effect on results is no other setting, and begun runs hear of it."""
    pretend_run(tmp_path / "algo-ppo+seed-0", "algo=ppo", "seed=0", done=False)
    free = ["keep_checkpoints=1", "checkpoint_every=5", "rollout.decode_during_search=16", "logger=[jsonl]"]
    run = command("-m", "seed=0,1", "algo=ppo", *free, f"hydra.sweep.dir={tmp_path}")
    assert run.code == 0, run.err
    (started,) = launched
    assert {each.partition("=")[0] for each in free} <= {
        part.lstrip("+").partition("=")[0] for part in started["algo-ppo+seed-0"]
    }
    resumed = started["algo-ppo+seed-0"]
    shown = command(*resumed[resumed.index("algorithms.run") + 1 :], "--cfg", "job")
    assert shown.code == 0, shown.err


def test_a_restart_knows_the_protocol_that_a_policy_has_brought(tmp_path, launched):
    """Its run holds the policy's protocol, which is not on the command line."""
    policy = tmp_path / "policy"
    shutil.copytree(resolve_model("tiny-student"), policy)
    agent = {
        "format": 1, "action_ends": ["</search>", "</answer>"], "precision": "float32", "vocab_size": 749,
        "env": {"name": "agentic_rag", "prompt": "bare", "max_turns": 2, "top_k": 3, "final_turn": "no_search",
                "max_observation_chars": None, "max_observation_tokens": 500},
        "rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 24, "max_tokens": 512},
        "measured": {
            "dataset": {"name": "tiny", "split": "train"}, "retriever": {"name": "bm25"},
            "reward": {"name": "exact_match"}, "num_envs": 5,
            "evaluation": {"num_questions": 7, "temperatures": [0.0], "corpus": "own", "seed": 3},
        },
    }  # fmt: skip
    (policy / "agent.json").write_text(json.dumps(agent))
    words = ["algo=ppo", f"model.policy={policy}"]
    sweep = tmp_path / "sweep"
    as_played = ["env.max_turns=2", "rollout.max_new_tokens=24", "rollout.max_tokens=512"]
    pretend_run(sweep / "algo-ppo+seed-0", *words, "seed=0", *as_played)
    run = command("-m", "seed=0,1", *words, f"hydra.sweep.dir={sweep}")
    assert run.code == 0, run.err
    assert list(launched[0]) == ["algo-ppo+seed-1"]
    run = command("-m", "seed=0,1", *words, "env.max_turns=3", f"hydra.sweep.dir={sweep}")
    assert "env.max_turns is 2 there, 3 here" in run.err


def test_plans_of_a_multirun(tmp_path, launched, monkeypatch):
    plan = tmp_path / "seed-0" / "preflight.json"
    plan.parent.mkdir()
    plan.write_text('{"fits": true}')  # of an earlier command
    words = ["-m", "seed=0,1", "preflight=true", f"hydra.sweep.dir={tmp_path}"]
    run = command(*words)
    assert run.code == 0, run.err
    assert list(launched[0]) == ["seed-0", "seed-1"]
    assert {"preflight=True", "seed=1"} <= set(launched[0]["seed-1"])
    assert f"all 2 plans are written: {tmp_path}/*/preflight.json" in run.out

    def planned(self, jobs):
        for job, fits in zip(jobs, ("true", "false"), strict=True):
            job.directory.mkdir(exist_ok=True)
            (job.directory / "preflight.json").write_text(f'{{"fits": {fits}}}')
        slot = Slot(0, {"OMP_NUM_THREADS": "2"})
        return [job_pool.Attempt(job, slot, code=1) for job in jobs if not job.is_complete()]

    monkeypatch.setattr(Launcher, "run", planned)
    run = command(*words)
    assert run.code == 1, "one doesn't fit"
    assert "1 of 2 runs failed" in run.err
    pretend_run(tmp_path / "seed-1", "seed=1", done=False)
    run = command(*words)
    assert run.code == 1
    assert "seed-1 holds a run; plan with another hydra.sweep.dir." in run.err


def test_a_run_with_other_settings_is_not_taken_for_the_one_that_is_wanted(tmp_path, launched):
    pretend_run(tmp_path / "seed-0", "seed=0", "algo.kl_coef=0.25")
    run = command("-m", "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert run.code == 1
    assert f"{tmp_path}/seed-0 holds a run with other settings: algo.kl_coef is 0.25 there" in run.err
    assert launched == []
    pretend_run(tmp_path / "other" / "seed-0", "seed=0", "algo=ppo")
    run = command("-m", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'other'}")
    assert "algo.name is ppo there, dgpo here" in run.err


def test_the_same_job_twice(tmp_path, launched):
    run = command("-m", "seed=0,0", f"hydra.sweep.dir={tmp_path}")
    assert run.code == 1
    assert "two jobs would write into" in run.err
    assert launched == []


def test_an_experiment_may_hold_the_sweep(tmp_path, launched):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "table.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /algo: ppo\n"
        "algo:\n  batch_size: 64\n"
        f"hydra:\n  mode: MULTIRUN\n  sweep: {{dir: {tmp_path}/sweep}}\n"
        "  sweeper:\n    params: {algo: 'ppo,dgpo', seed: '0,1'}\n"
    )
    more = ["--config-dir", str(tmp_path), "+experiment=table"]
    assert command(*more).code == 0
    names = [f"algo-{algo}+seed-{seed}" for algo in ("ppo", "dgpo") for seed in (0, 1)]
    assert list(launched[0]) == names
    line = launched[0][names[3]]
    assert {"+experiment=table", "algo=dgpo", "seed=1", f"{tmp_path}", "hydra.mode=RUN"} <= set(line)
    with_resume = [part for part in line[3:] if not part.startswith("hydra.run.dir")]
    shown = command("--cfg", "job", *with_resume)  # what the job's own process will compose
    config = OmegaConf.create(shown.out)
    assert (config.algo.name, config.algo.batch_size, config.seed) == ("dgpo", 64, 1)
    assert command("-m", *more, "seed=1,2").code == 0
    assert list(launched[1]) == [names[1], names[1][:-1] + "2", names[3], names[3][:-1] + "2"]


def test_failures_are_shown_and_how_to_go_on(tmp_path, monkeypatch):
    def run(self, planned):
        job = planned[0]
        job.directory.mkdir()
        (job.directory / job_pool.LOG_FILE).write_text("many lines\nof [bold]output[/bold]\n")
        attempt = job_pool.Attempt(job, Slot(0), code=-9)
        self._watcher.ended(attempt, False)
        return [attempt]

    monkeypatch.setattr(Launcher, "run", run)
    done = command("-m", "seed=0,1,2", f"hydra.sweep.dir={tmp_path}")
    assert done.code == 1
    assert "[0/3 done, 1 failed] FAILED (killed by signal 9)  seed=0" in done.out
    assert "of [bold]output[/bold]" in done.out
    assert "to finish what is missing (3 of the runs)" in done.err
    assert f"python -m algorithms.run -m seed=0,1,2 hydra.sweep.dir={tmp_path}" in done.err


def test_a_process_of_another_launcher_finds_the_plug_ins():
    """What submitit pickles names this launcher, too; the process of its job has not begun with our command."""
    code = (
        "import pickle, algorithms.run\n"
        "found = pickle.loads(b'chydra_plugins.agentic_rag_env\\nSlotsLauncher\\n.')\n"
        "print(found is algorithms.launch.hydra_launcher.SlotsLauncher)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


# --- locks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def held():
    """Has a file locked by another process."""
    processes = []

    def hold(path: Path) -> subprocess.Popen:
        code = (
            "import sys, pathlib, algorithms.training.file_locks as file_locks\n"
            "print(file_locks.hold(pathlib.Path(sys.argv[1])), flush=True)\ninput()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout.readline() == "None\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def test_a_lock_ends_with_its_holder_even_if_that_is_killed(tmp_path, held):
    path = tmp_path / "lock"
    holder = held(path)
    assert file_locks.try_lock(path) is None
    assert file_locks.hold(path).startswith(f"process {holder.pid} on ")
    holder.kill()
    holder.wait()
    assert file_locks.hold(path) is None
    assert file_locks.hold(path) is None
    file_locks.release(path)
    held(path)


def test_where_a_file_system_knows_no_locks_one_is_warned_and_goes_on(tmp_path, monkeypatch):
    def refuse(descriptor: int, blocking: bool) -> bool:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(file_locks, "lock_descriptor", refuse)
    code = errno.ENOLCK
    with pytest.warns(UserWarning, match=f"{tmp_path} can't be guarded against a second writer: No locks available"):
        os.close(file_locks.try_lock(tmp_path / "lock"))
    code = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        file_locks.try_lock(tmp_path / "lock")


def test_a_second_launcher_is_refused_while_the_first_one_lives(tmp_path, held, launched):
    holder = held(tmp_path / ".launcher" / "launcher.lock")
    sweep = ("-m", "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    run = command(*sweep)
    assert run.code == 1
    assert f"the multirun in {tmp_path} is being run by process {holder.pid}" in run.err
    assert not (tmp_path / "multirun.yaml").exists()
    holder.kill()
    holder.wait()
    assert command(*sweep).code == 0


@pytest.mark.parametrize("going_on", [False, True])
def test_two_writers_never_share_a_run_directory(tmp_path, held, going_on):
    pretend_run(tmp_path, "seed=0") if going_on else None
    holder = held(tmp_path / ".hydra" / "lock")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run = command(f"resume={tmp_path}" if going_on else f"hydra.run.dir={tmp_path}")
    assert run.code == 1
    assert f"{tmp_path} is being written by process {holder.pid}" in run.err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_demonstrations_that_two_runs_want_are_collected_once(tmp_path):
    made, found = [], []

    def make():
        made.append(1)
        time.sleep(0.2)
        return demonstrations.Demonstrations([], 4, 9, 99)

    def want():
        found.append(demonstrations.cached(tmp_path / "key.jsonl.gz", make, None))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert found == [demonstrations.Demonstrations([], 4, 9, 99)] * 4


# --- a whole one -----------------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_a_multirun_that_is_killed_and_restarted_gives_what_an_uninterrupted_one_gives(tmp_path):
    own = [*TINY, "algo=sft", *SFT, "algo.epochs=8", "num_envs=8", f"cache_dir={tmp_path / 'cache'}"]
    line = [sys.executable, "-m", "algorithms.run", "-m", *own, "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    first = subprocess.Popen([*line, "hydra.launcher.num_slots=2"], cwd=ROOT, env=environment)
    wait_until(lambda: any((tmp_path / "sweep").glob("*/checkpoints/*/manifest.json")))
    first.terminate()
    assert first.wait() == 130
    runs = sorted(path for path in (tmp_path / "sweep").iterdir() if (path / ".hydra").is_dir())
    assert len(runs) == 2
    assert not any((path / "summary.json").exists() for path in runs)
    again = subprocess.run(
        [*line, "hydra.launcher.num_slots=1"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert "[2/2 done]" in again.stdout
    for seed, path in enumerate(runs):
        alone = train(tmp_path / f"alone-{seed}", tmp_path / "cache", *own[len(TINY) :], f"seed={seed}")
        assert_same_run(Run(path), alone)


@pytest.mark.nightly
def test_a_job_of_a_multirun_may_have_two_processes(tmp_path):
    own = [*TINY, "algo=sft", *SFT, "algo.epochs=1", "num_envs=8", f"cache_dir={tmp_path / 'cache'}"]
    line = [sys.executable, "-m", "algorithms.run", "-m", *own, f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    line += ["hydra.launcher.gpus_per_job=2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = (Run(path.parent) for path in (tmp_path / "sweep").glob("*/summary.json"))
    assert run.summary["machine"]["processes"] == 2


@pytest.mark.nightly
def test_submitit_runs_what_is_missing_and_trains_nothing_twice(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    own = [*TINY, "algo=sft", *SFT, "num_envs=8", f"cache_dir={tmp_path / 'cache'}"]
    line = [sys.executable, "-m", "algorithms.run", "-m", "hydra/launcher=submitit_local", *own, "seed=0,1"]
    line.append(f"hydra.sweep.dir={tmp_path / 'sweep'}")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}

    def launch() -> dict[str, list[int]]:
        """When the files of each run were last written."""
        done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        names = ("metrics.jsonl", ".hydra/config.yaml", "summary.json")
        runs = sorted(path.parent for path in (tmp_path / "sweep").glob("*/summary.json"))
        assert len(runs) == 2
        return {run.name: [(run / name).stat().st_mtime_ns for name in names] for run in runs}

    first = launch()
    interrupted, finished = first
    (tmp_path / "sweep" / interrupted / "summary.json").unlink()
    again = launch()
    assert again[finished] == first[finished]
    assert again[interrupted][:2] == first[interrupted][:2], "measured again, not trained again"
    assert again[interrupted][2] > first[interrupted][2]
