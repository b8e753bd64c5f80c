"""Event files of TensorBoard, and how it shows what is in them: learning curves, and a table of what varies."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

#: Charts of the tab "Custom Scalars": category, chart, and the metrics in it.
_LAYOUT: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "Learning curves": {
        "exact match, dev split": ("dev/exact_match",),
        "exact match, rollouts": ("rollout/exact_match",),
        "searches per question": ("dev/num_searches", "rollout/num_searches"),
        "malformed turns": ("dev/malformed_fraction", "rollout/malformed_fraction"),
    },
    "Losses": {
        "loss": ("train/loss", "train/validation_loss"),
        "value loss of the critic": ("train/value_loss",),
        "entropy, nats": ("train/entropy",),
        "KL of an update, nats": ("train/approx_kl",),
    },
    "Time": {"seconds per step": ("time/rollout_s", "time/score_s", "time/update_s")},
}
#: Columns of results in the table of settings.
_RESULTS = ("eval/all/exact_match", "eval/all/exact_match/T=1", "dev/exact_match")


class EventFile:
    """Writes one event file; use it as a context manager.

    Args:
        folder: Its folder, made if absent. Other event files there stay.
        purge_from: Points from this step on that are in other files of the folder no longer count.
    """

    def __init__(self, folder: Path, purge_from: int | None = None) -> None:
        # Imported here: TensorBoard takes a second to load, and `--help` must not wait for it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._event, self._writer = Event, EventFileWriter(str(folder))
        if purge_from is not None:
            self._writer.add_event(Event(step=purge_from, file_version="brain.Event:2"))
            self._writer.add_event(Event(step=purge_from, session_log=SessionLog(status=SessionLog.START)))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add a point of a curve."""
        self._value(step, tag=tag, simple_value=value)

    def text(self, tag: str, text: str, step: int) -> None:
        """Show a text word for word."""
        # An indented block: TensorBoard reads Markdown, which would swallow <search> as an HTML tag. A lone carriage
        # return ends a line for it, too: without an indent, a stranger's links and images would follow.
        block = "\n".join("    " + line for line in text.splitlines())
        self._value(step, tag=f"{tag}/text_summary", tensor=_strings(block.encode()), metadata=_plugin("text"))

    def image(self, tag: str, png: bytes) -> None:
        """Show an image."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = struct.unpack(">II", png[16:24])  # every PNG file has its size there
        self._value(0, tag=tag, image=Summary.Image(encoded_image_string=png, width=width, height=height))

    def layout(self) -> None:
        """Lay out the learning curves. TensorBoard unites equal layouts of many runs."""
        from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MultilineChartContent

        categories = [
            Category(title=title, chart=[
                Chart(title=name, multiline=MultilineChartContent(tag=[f"^{tag}$" for tag in tags]))
                for name, tags in charts.items()
            ])
            for title, charts in _LAYOUT.items()
        ]  # fmt: skip
        content = Layout(category=categories).SerializeToString()
        self._value(0, tag="custom_scalars__config__", tensor=_strings(content), metadata=_plugin("custom_scalars"))

    def columns(self, settings: Iterable[str]) -> None:
        """Name the settings that are the columns of the table of settings, for all runs below."""
        from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb

        self._summary(hparams_config_pb([HParam(name) for name in settings], [Metric(tag) for tag in _RESULTS]))

    def settings(self, values: Mapping[str, Any]) -> None:
        """Name the run's settings for that table."""
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        shown = {name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in values.items()}
        self._summary(hparams_pb(shown))

    def flush(self) -> None:
        """Write what is still in memory."""
        self._writer.flush()

    def close(self) -> None:
        """Write everything and close the file."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _value(self, step: int, **value: Any) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._summary(Summary(value=[Summary.Value(**value)]), step)

    def _summary(self, summary: Any, step: int = 0) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))


def _strings(content: bytes) -> Any:
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    one = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    return TensorProto(dtype="DT_STRING", string_val=[content], tensor_shape=one)


def _plugin(name: str) -> Any:
    from tensorboard.compat.proto.summary_pb2 import SummaryMetadata

    return SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=name))
