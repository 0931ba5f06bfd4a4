"""Scalar logs of a run: one line per step in `metrics.jsonl`, and the same numbers as TensorBoard events.

The figures use these names of scalars: `loss` for the total, `loss/<objective>` for its parts, `lr` for the learning
rate, `top1` (or `<split>/top1`) for an accuracy in percent.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from mrmae_ds.errors import UserError
from mrmae_ds.files import write_text

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
RESERVED = ("step", "nonfinite")


class MetricsWriter:
    """Write a run's scalars, one JSON line and one TensorBoard event per step. Use it on rank 0 only."""

    def __init__(self, run_dir: str | Path, resume_step: int | None = None) -> None:
        """Open `run_dir/metrics.jsonl` and an event file in `run_dir/tensorboard/`.

        Args:
            run_dir: the run's folder.
            resume_step: last optimizer step of the checkpoint that training resumes from. Later steps run again, so
                their log is dropped. None starts a new run and drops everything.
        """
        folder = Path(run_dir)
        path = folder / METRICS_FILE
        kept: list[dict[str, Any]] = []
        if resume_step is not None and path.exists():
            kept = [line for line in read_metrics(folder) if line["step"] <= resume_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._last_step = kept[-1]["step"] if kept else -1
        self._lines: IO[str] = path.open("a", encoding="utf-8")
        self._events = _EventWriter(folder / TENSORBOARD_FOLDER, resume_step)

    def write(self, step: int, scalars: Mapping[str, float | int]) -> None:
        """Log `scalars` of optimizer step `step` and flush both files.

        A non-finite value becomes null and is named in the line's `nonfinite`: {"loss": "nan"}.

        Raises:
            ValueError: if a step is logged twice or out of order, or a name is one of `RESERVED`.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} is logged after step {self._last_step}; log each step once, in order")
        if reserved := [name for name in scalars if name in RESERVED]:
            raise ValueError(f"scalar name {reserved[0]!r} is reserved; choose another")
        values = {name: value if isinstance(value, int) else float(value) for name, value in scalars.items()}
        nonfinite = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        line: dict[str, Any] = {"step": step, **{k: None if k in nonfinite else v for k, v in values.items()}}
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._lines.write(json.dumps(line, allow_nan=False) + "\n")
        self._lines.flush()
        self._events.write(step, values)
        self._last_step = step

    def close(self) -> None:
        """Flush and close both files."""
        self._lines.close()
        self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _EventWriter:
    """TensorBoard event file whose name lacks the host's.

    Run folders are published as they are, and torch's SummaryWriter puts the host's name into every file name.
    """

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            for old in folder.glob("*.tfevents.*"):
                old.unlink()
        name = f"events.out.tfevents.{time.time_ns() // 1000:016d}.{os.getpid()}"
        self._file = (folder / name).open("wb")
        self._writer = RecordWriter(self._file)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resume_step is not None:
            # Purges this step and later ones from the events of earlier files, as SummaryWriter's `purge_step` does.
            start = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        entries = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=entries)))

    def close(self) -> None:
        self._file.close()

    def _add(self, event: Event) -> None:
        self._writer.write(event.SerializeToString())
        self._file.flush()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Return the lines of `run_dir/metrics.jsonl`, oldest first, without a last line truncated by a crash.

    Raises:
        UserError: if the file is missing or another line is not a JSON object with a step.
    """
    path = Path(run_dir) / METRICS_FILE
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name the folder of a run that logged") from None
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        elif number < len(texts):
            raise UserError(f"{path}, line {number}: not a JSON object with a step; remove the line or the file")
    return lines
