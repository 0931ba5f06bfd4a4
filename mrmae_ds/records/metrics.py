"""What a run logs as it goes: `metrics.jsonl`, one line a step, and the same numbers as TensorBoard events.

Names of scalars, by which the figures find them: `loss` is the total and `loss/<objective>` its parts, `lr`
the learning rate, `top1` (or `<split>/top1`) an accuracy in percent.
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
    """Writes a run's scalars, one JSON line and one TensorBoard event a step. For one process of a job
    only."""

    def __init__(self, run_dir: str | Path, resume_step: int | None = None) -> None:
        """Open `run_dir/metrics.jsonl` and an event file in `run_dir/tensorboard/`.

        `resume_step` is the last optimizer step of the checkpoint that training goes on from: what was logged
        of later steps is dropped, since those steps run again. None starts anew and drops everything.
        """
        folder = Path(run_dir)
        path = folder / METRICS_FILE
        kept: list[dict[str, Any]] = []
        if resume_step is not None and path.exists():
            kept = [line for line in read_metrics(folder) if line["step"] <= resume_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._last_step = kept[-1]["step"] if kept else -1
        self._lines: IO[str] = path.open("a", encoding="utf-8")
        self._events = _EventFile(folder / TENSORBOARD_FOLDER, resume_step)

    def write(self, step: int, scalars: Mapping[str, float | int]) -> None:
        """Log `scalars` of optimizer step `step`; the line is on its way to the disk when this returns.

        A value that is not finite becomes null, and the line's `nonfinite` says which it was: {"loss":
        "nan"}. Raises ValueError when a step is logged twice or out of order, or a name is one of `RESERVED`.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} is logged after step {self._last_step}; log each step once, in order")
        if clash := [name for name in scalars if name in RESERVED]:
            raise ValueError(f"scalar name {clash[0]!r} is reserved; choose another")
        values = {name: value if isinstance(value, int) else float(value) for name, value in scalars.items()}
        strange = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        line: dict[str, Any] = {"step": step, **{k: None if k in strange else v for k, v in values.items()}}
        if strange:
            line["nonfinite"] = strange
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


class _EventFile:
    """A TensorBoard event file without the host's name in its own, which TensorBoard's writers all put
    there."""

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
            # TensorBoard drops what earlier files hold of this step and later ones.
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
    """Return the lines of `run_dir/metrics.jsonl`, oldest first. A last line torn by a crash is left out.

    Raises UserError naming file and line when the file is missing or another line is not one of ours.
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
