"""The images that a .beton was made from, opened again as its sidecar describes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mrmae_ds.data.convert.folder import ImageFolder, open_folder
from mrmae_ds.data.convert.imagenet import open_imagenet
from mrmae_ds.errors import UserError


def open_origin(source: Path, sidecar: dict[str, Any]) -> ImageFolder:
    """The images of ``source`` that the described .beton should hold, in its order.

    Args:
        source: what was written, wherever it lies now. sidecar: of the .beton; "origin" says how it was opened.

    Raises:
        UserError: if the .beton was not made from files, or the tree has changed in shape or number.
    """
    origin = dict(sidecar.get("origin") or {})
    layout, part, count = (origin.pop(key, None) for key in ("layout", "part", "count"))
    if layout == "folder":
        train, val, _ = open_folder(source, **origin)
    elif layout == "imagenet":
        train, val, _ = open_imagenet(source, **origin)
    else:
        raise UserError(
            "the sidecar names no folder of images, so there is nothing to compare with; "
            "mrmae_ds.data.convert.compare.compare compares with any data set"
        )
    dataset = {"train": train, "val": val}[part].limited(count, part)
    skipped = [entry["row"] for entry in sidecar.get("skipped", ())]
    kept = dataset.take(np.setdiff1d(np.arange(len(dataset)), skipped))
    if len(kept) != sidecar["num_samples"]:
        raise UserError(
            f"{source}: has {len(kept):,} images for {part} (without those left out), the .beton "
            f"{sidecar['num_samples']:,}; the tree has changed since"
        )
    return kept
