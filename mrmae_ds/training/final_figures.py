"""Figures written at the end of a stage: loss curves and, for pre-training, reconstructions."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from mrmae_ds.distributed.watchdog import Watchdog
from mrmae_ds.errors import UserError
from mrmae_ds.training.checkpoint.folder import clear_leftovers, torn_files

logger = logging.getLogger(__name__)

CURVES, IMAGES = "loss_curves.png", "images"


def draw(stage_dir: Path) -> None:
    """Draw loss curves and images of a finished stage. A failure is logged and leaves the stage finished.

    Args:
        stage_dir: output folder.
    """
    for what, draw_figure in {"loss curves": _draw_curves, "images": _draw_images}.items():
        try:
            draw_figure(stage_dir)
        except UserError as error:
            logger.warning("%s: finished, but its %s were not drawn: %s", stage_dir, what, error)
        except Exception:
            logger.warning("%s: finished, but its %s were not drawn", stage_dir, what, exc_info=True)


def _draw_curves(stage_dir: Path) -> None:
    from mrmae_ds.figures.plots import loss_curves

    loss_curves(stage_dir, stage_dir / CURVES)


def _draw_images(stage_dir: Path) -> None:
    from mrmae_ds.figures.visualize import show_run

    show_run(stage_dir)


def finish_drawing(stage_dir: Path, with_images: bool, watchdog: Watchdog) -> None:
    """Complete the figures of a finished stage whose process was killed while drawing, and remove torn files.

    Args:
        stage_dir: output folder.
        with_images: True if the stage has images too.
        watchdog: receives a heartbeat before drawing.
    """
    torn = torn_files(stage_dir)
    with contextlib.suppress(OSError):  # the folder may have become read-only
        clear_leftovers(stage_dir)
    lacks_images = with_images and not any((stage_dir / IMAGES).glob("*.png"))
    if torn or lacks_images or not (stage_dir / CURVES).is_file():
        watchdog.heartbeat("drawing")
        draw(stage_dir)
