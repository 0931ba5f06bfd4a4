"""What a finished stage is drawn as: its loss curves and, after pre-training, images."""

from __future__ import annotations

import contextlib
import sys
import traceback
from pathlib import Path

from mrmae_ds.distributed.watchdog import Watchdog
from mrmae_ds.errors import UserError
from mrmae_ds.training.checkpoint.folder import clear_leftovers, torn_files

CURVES, IMAGES = "loss_curves.png", "images"


def draw(stage_dir: Path) -> None:
    """Curves and images of a finished stage; it stays finished whatever becomes of them, so the reason is printed."""
    for what, draw in {"loss curves": _draw_curves, "images": _draw_images}.items():
        try:
            draw(stage_dir)
        except Exception as error:
            reason = str(error) if isinstance(error, UserError) else traceback.format_exc().strip()
            print(f"{stage_dir}: finished, but its {what} were not drawn: {reason}", file=sys.stderr, flush=True)


def _draw_curves(stage_dir: Path) -> None:
    from mrmae_ds.figures.plots import loss_curves

    loss_curves(stage_dir, stage_dir / CURVES)


def _draw_images(stage_dir: Path) -> None:
    from mrmae_ds.figures.visualize import show_run

    show_run(stage_dir)


def finish_drawing(stage_dir: Path, with_images: bool, watchdog: Watchdog) -> None:
    """Draw a finished stage again whose process was killed while it drew, and remove what that left.

    Args:
        stage_dir: of the stage.
        with_images: whether it has images too.
        watchdog: of this rank, which may have to wait for the drawing.
    """
    torn = torn_files(stage_dir)
    with contextlib.suppress(OSError):  # a folder that has become read-only is left as it is
        clear_leftovers(stage_dir)
    lacks_images = with_images and not any((stage_dir / IMAGES).glob("*.png"))
    if torn or lacks_images or not (stage_dir / CURVES).is_file():
        watchdog.heartbeat("drawing")
        draw(stage_dir)
