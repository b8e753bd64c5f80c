"""Numbers must reach TensorBoard, `metrics.jsonl` and the terminal, and a resumed run must not contradict itself."""

from __future__ import annotations

import io
import json
import math
import re
import time
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard import plugin_util
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from algorithms.training import run_logger
from algorithms.training.loggers.base import without_surrogates
from algorithms.training.run_logger import RunLogger, write_results


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def open_logger(run_dir: Path, total: int = 5, file: io.StringIO | None = None, **settings) -> RunLogger:
    settings = {"loggers": ["tensorboard"], **settings}
    return RunLogger(run_dir, total, console=Console(file=file or io.StringIO(), width=150), **settings)


def lines(run_dir: Path, clock: bool = False) -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if clock or name != "time/clock"} for row in rows]


def events(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tb"), size_guidance={"tensors": 0, "scalars": 0}).Reload()


def scalars(run_dir: Path, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(run_dir).Scalars(name)]


def test_a_step_is_on_disk_at_once(tmp_path):
    logger = open_logger(tmp_path)
    logger.write(1, {"train/loss": 0.5, "rollout/exact_match": 0.25}, "dgpo")
    assert lines(tmp_path) == [{"step": 1, "stage": "dgpo", "train/loss": 0.5, "rollout/exact_match": 0.25}]
    assert scalars(tmp_path, "train/loss") == [(1, 0.5)]
    logger.close()


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    with open_logger(tmp_path) as logger:
        logger.write(1, {"a": math.nan, "b": math.inf, "c": 1}, "kd")
    assert lines(tmp_path) == [{"step": 1, "stage": "kd", "a": None, "b": None, "c": 1.0}]
    assert math.isnan(scalars(tmp_path, "a")[0][1])


def test_resuming_forgets_what_came_after_the_checkpoint(tmp_path):
    with open_logger(tmp_path) as logger:
        for step in range(5):
            logger.write(step, {"x": float(step)}, "kd")
    with open_logger(tmp_path, start_step=2) as logger:
        assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
        logger.write(3, {"x": 30.0}, "kd")
    assert [(line["step"], line["x"]) for line in lines(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    assert scalars(tmp_path, "x") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.parametrize("torn", [b'{"step": 2, "sta', b'{"step": 2}', b"\xff\xfe", b"nonsense\n"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "stage": "kd"}\n' + torn)
    with pytest.warns(UserWarning, match="lacks 1 of the 2"), open_logger(tmp_path, start_step=2) as logger:
        logger.write(3, {}, "kd")
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]


def test_what_was_lost_of_the_metrics_is_said_and_stops_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[]\n{"step": 3}\n{"step": 4}\n')
    with pytest.warns(UserWarning, match=r"metrics.jsonl lacks 1 of the 3 steps so far"):
        open_logger(tmp_path, start_step=3).close()
    assert lines(tmp_path) == [{"step": 1}, {"step": 3}]
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.warns(UserWarning, match=r"metrics.jsonl lacks 3 of the 3 steps so far"):
        open_logger(tmp_path, start_step=3).close()


def test_transcripts_are_shown_word_for_word(tmp_path):
    text = "<search> héllo \ud83d </search>\n```\n<information>\x00</information>"
    with open_logger(tmp_path) as logger:
        logger.text("transcript", text, 3)
    (event,) = events(tmp_path).Tensors("transcript/text_summary")
    shown = event.tensor_proto.string_val[0].decode()
    assert event.step == 3
    assert shown.split("\n") == [
        "    <search> héllo \\ud83d </search>", "    ```", "    <information>\x00</information>",
    ]  # fmt: skip
    assert without_surrogates("\udc80a") == "\\udc80a"


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\r\r", "\v", "\f", "\x1c", "\x85", "\u2028"])
def test_no_line_of_a_transcript_is_read_as_markdown(tmp_path, end):
    lines = ["Rome", "![x](http://e/)", "[y](http://e/)", "# z", "<img src=http://e/>"]
    with open_logger(tmp_path) as logger:
        logger.text("transcript", end.join(lines), 3)
    (event,) = events(tmp_path).Tensors("transcript/text_summary")
    shown = plugin_util.markdown_to_safe_html(event.tensor_proto.string_val[0])
    assert not re.search("<img|<a|<h1", shown)
    assert shown.startswith("<pre><code>Rome\n")


def test_a_message_steers_no_terminal(tmp_path):
    file = io.StringIO()
    with open_logger(tmp_path, 4, file) as logger:
        logger.message("a reply said \x1b[2J\ud83d")
    assert file.getvalue() == "a reply said \\x1b[2J\\ud83d\n"


def test_hyperparameters_are_what_the_overrides_chose(tmp_path):
    (tmp_path / ".hydra").mkdir()
    overrides = ["algo=dgpo", "algo.kl_coef=0.1", "+method=dgpo", "threads=1", "path='\\udc80'"]
    (tmp_path / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    algo = {"name": "dgpo", "kl_coef": 0.1, "betas": (0.9, 0.99)}
    settings = {"algo": algo, "resume": None, "path": "\udc80", "seed": 4, "threads": 1}
    open_logger(tmp_path, settings=settings, command="python -m algorithms.run algo=dgpo").close()
    write_results(tmp_path, ["tensorboard"], {"eval/tiny/exact_match": 0.5, "arc/reading/hit": 0.25}, step=7)
    content = events(tmp_path)
    session = HParamsPluginData.FromString(
        content.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info
    shown = {name: value.number_value or value.string_value for name, value in session.hparams.items()}
    assert shown == {"algo.name": "dgpo", "seed": 4, "algo.kl_coef": 0.1, "method": "dgpo", "path": "\\udc80"}
    columns = HParamsPluginData.FromString(
        content.summary_metadata["_hparams_/experiment"].plugin_data.content
    ).experiment
    assert {column.name for column in columns.hparam_infos} == shown.keys()
    assert columns.metric_infos[0].name.tag == "eval/all/exact_match"
    assert [(event.step, event.value) for event in content.Scalars("eval/tiny/exact_match")] == [(7, 0.5)]
    assert [(event.step, event.value) for event in content.Scalars("arc/reading/hit")] == [(7, 0.25)]
    (command,) = content.Tensors("run/command/text_summary")
    assert command.tensor_proto.string_val == [b"    python -m algorithms.run algo=dgpo"]
    (text,) = content.Tensors("run/settings/text_summary")
    assert b"      kl_coef: 0.1\n" in text.tensor_proto.string_val[0]


def test_learning_curves_are_laid_out_and_exist_by_these_names(tmp_path):
    open_logger(tmp_path).close()
    (event,) = events(tmp_path).Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["Learning curves", "Losses", "Time"]
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert charts["exact match, dev split"] == ["^dev/exact_match$"]
    assert charts["searches per question"] == ["^dev/num_searches$", "^rollout/num_searches$"]


def test_a_multirun_has_one_table_for_all_of_its_runs(tmp_path):
    (tmp_path / "tb").mkdir()
    open_logger(tmp_path / "seed-0", settings={"seed": 0}).close()
    metadata = events(tmp_path / "seed-0").summary_metadata
    assert "_hparams_/session_start_info" in metadata
    assert "_hparams_/experiment" not in metadata


def test_without_tensorboard_only_the_lines_are_written(tmp_path):
    with open_logger(tmp_path, loggers=["jsonl"]) as logger:
        logger.write(1, {"x": 1.0}, "kd")
        logger.text("transcript", "<search>", 1)
    write_results(tmp_path, ["jsonl"], {"eval/tiny/exact_match": 0.5}, step=1)
    assert lines(tmp_path) == [{"step": 1, "stage": "kd", "x": 1.0}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_time_left_includes_the_evaluation_as_soon_as_a_check_was_timed(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run_logger.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with open_logger(tmp_path, 40, file, checks_at_end=50.0) as logger:
        for step in range(1, 21):
            now[0] += 10.0
            logger.write(step, {"train/loss": 1.0} | ({"time/dev_s": 6.0} if step == 20 else {}), "kd")
    shown = file.getvalue().splitlines()
    assert shown[-2] == "kd 19/40  10.0 s/step  0:03:30 of training left  loss 1.000"
    # 20 steps of 10 s, and 50 times a check of 6 s.
    assert shown[-1] == "kd 20/40  10.0 s/step  0:08:20 left, about 0:05:00 of it evaluation  loss 1.000"


@pytest.mark.parametrize(
    ("jupyter", "widgets", "live"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_a_notebook_with_its_widgets_gets_a_live_line(monkeypatch, jupyter, widgets, live):
    monkeypatch.setattr(run_logger, "find_spec", lambda name: name if widgets else None)
    console = Console(file=io.StringIO(), force_jupyter=jupyter)
    monkeypatch.setattr(run_logger.Progress, "start", lambda progress: None)  # there is no kernel to show it
    line = run_logger._ProgressLine(4, 0, console, None)
    assert (line._live is not None) == live


def test_a_stage_shows_its_own_figures_and_its_own_pace(tmp_path, monkeypatch):
    """A critic's warm-up logs no loss of the policy, and steps of kd take a tenth of those of dgpo."""
    now = [100.0]
    monkeypatch.setattr(run_logger.time, "monotonic", lambda: now[0])
    file = io.StringIO()
    with open_logger(tmp_path, 20, file) as logger:
        for step in range(1, 11):
            now[0] += 2.0
            logger.write(step, {"train/loss": 1.5}, "kd")
        for step in range(11, 13):
            now[0] += 20.0
            logger.write(step, {"train/value_loss": 0.5, "rollout/exact_match": 0.25}, "dgpo")
    shown = file.getvalue().splitlines()
    assert shown[1] == "kd 6/20  2.0 s/step  0:00:28 of training left  loss 1.500"
    assert shown[-1] == "dgpo 12/20  20.0 s/step  0:02:40 of training left  exact match 0.250  value loss 0.500"


def test_every_line_has_a_clock(tmp_path):
    before = time.time()
    with open_logger(tmp_path, 2, io.StringIO()) as logger:
        logger.write(1, {"train/loss": 1.0}, "kd")
        logger.write(2, {"train/loss": 1.0}, "kd")
    clocks = [row["time/clock"] for row in lines(tmp_path, clock=True)]
    assert before - 0.01 <= clocks[0] <= clocks[1] <= time.time() + 0.01


def test_a_log_file_gets_plain_lines_now_and_then(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(run_logger.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    with open_logger(tmp_path, 100, file) as logger:
        for step in range(1, 101):
            now[0] += 2.0
            logger.write(step, {"train/loss": 1.5, "rollout/exact_match": 0.25}, "dgpo")
    shown = file.getvalue().splitlines()
    assert len(shown) == 21  # every ten seconds, and the last step
    assert shown[0] == "dgpo 1/100  2.0 s/step  0:03:18 of training left  exact match 0.250  loss 1.500"
    assert shown[-1] == "dgpo 100/100  2.0 s/step  0:00:00 of training left  exact match 0.250  loss 1.500"
    assert all(character.isprintable() for character in "".join(shown))


def test_a_terminal_gets_one_live_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with open_logger(tmp_path, 4, file) as logger:
        for step in range(1, 5):
            logger.write(step, {"dev/exact_match": 0.125}, "[kd]")
        logger.message("saved [bold]\ud800")
    shown = file.getvalue()
    assert "4/4" in shown
    assert "dev exact match 0.125" in shown
    assert "saved [bold]\\ud800" in shown
    assert "\x1b" in shown


def test_a_message_survives_a_terminal_that_knows_ascii_only(tmp_path):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with open_logger(tmp_path, 1, file) as logger:
        logger.message("é \ud800")
    file.flush()
    assert file.buffer.getvalue() == b"\\xe9 \\ud800\n"


def test_a_run_without_steps_and_a_repeated_step(tmp_path):
    with open_logger(tmp_path, 0) as logger:
        logger.write(0, {"train/loss": 1.0}, "kd")
        logger.write(0, {"train/loss": 2.0}, "kd")
    assert [line["train/loss"] for line in lines(tmp_path)] == [1.0, 2.0]
