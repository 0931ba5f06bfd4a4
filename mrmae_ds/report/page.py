"""Write the report of one or several runs as one HTML file that needs no other file and no network."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from mrmae_ds import __version__
from mrmae_ds.errors import UserError
from mrmae_ds.figures.plots import compare_curves
from mrmae_ds.files import check_writable, write_text
from mrmae_ds.report.collect import (
    STAGES,
    ReportedStage,
    collect_stages,
    cost_values,
    describe_results,
    differing_settings,
    filled_cells,
)

REPORT_FILE = "report.html"
MAX_WIDTH = 1600  # pixels of an embedded image
_JPEG_QUALITY = 88
# Logged scalars with a panel: losses, learning rate and results, in this order.
_PANELS = ("loss", "lr", "top1", "AP")


def write_report(roots: Sequence[Path], out: Path | None = None) -> Path:
    """Write a report of all stages at or below ``roots``.

    Args:
        roots: folders of runs or stages, or folders that contain some.
        out: the HTML file; None is ``report.html`` in the first root.

    Returns:
        The file.

    Raises:
        UserError: if there is no run, a file of one is unreadable, or the report cannot be written.
    """
    stages = collect_stages(roots)
    path = out or roots[0] / REPORT_FILE
    if path.is_dir():
        raise UserError(f"{path}: is a folder; --out names the HTML file")
    check_writable(path)
    write_text(path, render_report(stages))
    return path


def render_report(stages: Sequence[ReportedStage]) -> str:
    """Return the HTML of a report."""
    template = files("mrmae_ds.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        title=_title(stages),
        version=__version__,
        stages=stages,
        overview=[_overview(stage) for stage in stages],
        costs=[{"stage": stage.name, **cost_values(stage.record)} for stage in stages],
        groups=[_group(kind, group) for kind, group in _by_kind(stages).items()],
        cells=[asdict(cell) for cell in filled_cells(stages)],
    )


def _title(stages: Sequence[ReportedStage]) -> str:
    runs = list(dict.fromkeys(stage.record.name for stage in stages))
    return " and ".join(runs) if len(runs) < 3 else f"{len(runs)} runs"


def _by_kind(stages: Sequence[ReportedStage]) -> dict[str, list[ReportedStage]]:
    kinds: dict[str, list[ReportedStage]] = {}
    for stage in stages:
        kinds.setdefault(stage.record.stage, []).append(stage)
    return {kind: kinds[kind] for kind in (*STAGES, *kinds) if kind in kinds}


def _overview(stage: ReportedStage) -> dict[str, str]:
    record = stage.record
    epochs = f"{record.schedule.epochs_done:g} of {record.schedule.epochs:g}" if record.schedule.steps else ""
    return {
        "stage": stage.name,
        "status": record.status,
        "method": record.method,
        "size": record.size,
        "seed": str(record.seed),
        "data": record.data.dataset,
        "epochs": epochs,
        "result": describe_results(record),
    }


def _teachers(stage: ReportedStage) -> list[dict[str, str]]:
    return [
        {
            "stage": stage.name,
            "teacher": name,
            "kind": info.kind,
            "source": info.source,
            "sha256": (info.sha256 or "")[:12],
            "facts": "; ".join(f"{topic}: {fact}" for topic, fact in info.facts.items()),
        }
        for name, info in stage.record.teachers.items()
    ]


def _group(kind: str, stages: Sequence[ReportedStage]) -> dict[str, Any]:
    """Return the contents of the section on one kind of stage."""
    return {
        "kind": kind,
        "names": [stage.name for stage in stages],
        "differences": differing_settings(stages),
        "curves": [(name, _curve(stages, name)) for name in _logged(stages)],
        "images": [(f"{stage.name}/{_below(stage, path)}", _embed(path)) for stage in stages for path in stage.images],
        "settings": [(stage.name, stage.settings) for stage in stages],
        "teachers": [row for stage in stages for row in _teachers(stage)],
    }


def _logged(stages: Sequence[ReportedStage]) -> list[str]:
    """Return the scalars that have a panel and were logged by a stage, in the order of the panels."""
    names = dict.fromkeys(name for stage in stages for line in stage.lines for name in line)
    parts = {name: _panel_of(name) for name in names}
    return sorted((name for name, panel in parts.items() if panel), key=lambda name: _PANELS.index(parts[name] or ""))


def _panel_of(name: str) -> str | None:
    if name.startswith("loss/") or name.endswith("/loss"):
        return "loss"
    last = name.rpartition("/")[2]
    return last if last in _PANELS else None


def _curve(stages: Sequence[ReportedStage], name: str) -> str:
    """Return the panel of a scalar as the source of an <img>."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curve.png"
        compare_curves({stage.name: stage.lines for stage in stages}, name, path)
        return _source(path.read_bytes(), "png")


def _below(stage: ReportedStage, path: Path) -> str:
    return path.relative_to(stage.folder).as_posix()


def _embed(path: Path) -> str:
    """Return an image of a run as the source of an <img>, reduced where a page would be large."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a readable image ({error}); remove it or draw it again by mrmae show") from None
    image.thumbnail((MAX_WIDTH, 4 * MAX_WIDTH))
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=_JPEG_QUALITY, optimize=True)
    return _source(buffer.getvalue(), "jpeg")


def _source(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
