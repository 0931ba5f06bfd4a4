"""Detectors on disk: finished stages, and released files of the authors' ViTDet-style code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mrmae_ds.detection.detector import Detector, assemble_detector
from mrmae_ds.errors import ConfigError, UserError
from mrmae_ds.models.sizes import FAMILIES, make_spec
from mrmae_ds.weights.detectors import DetectorFile, detector_difference, detector_of, load_detector_file
from mrmae_ds.weights.export import Exported, export_target, provenance
from mrmae_ds.weights.finished_run import with_present_keys
from mrmae_ds.weights.model_file import save_weights, size_from_metadata, spec_from_metadata
from mrmae_ds.weights.paths import find_weights
from mrmae_ds.weights.resolve import resolve


@dataclass(frozen=True)
class SavedDetector:
    """A usable detector on disk.

    Attributes:
        file: its tensors.
        metadata: of its model file, or what is known of another project's.
    """

    file: DetectorFile
    metadata: dict[str, Any]

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""
        return self.file.sizes()[1]

    def load(self) -> Detector:
        """Build the detector in eval mode on the CPU.

        Raises:
            UserError: if its tensors are not those of its sizes.
        """
        (config, side), positions = self.file.sizes(), size_from_metadata(self.metadata)
        model = assemble_detector(spec_from_metadata(self.metadata), config, side, positions, self.file.num_classes)
        load_detector_file(model, self.file)
        return model.eval()


def open_detector(source: Path) -> SavedDetector:
    """Open a finished stage ``detect`` or a released detector; all tensors are compared with the model of its sizes.

    Args:
        source: stage folder, or weights file.

    Raises:
        UserError: if it holds no whole detector, is damaged, or its heads, statistics or classes are not known.
    """
    weights = resolve(find_weights(source))
    file = detector_of(weights)
    if file is None:
        raise UserError(
            f"{weights.where}: holds no whole detector ({weights.identity.title}); name a finished stage, "
            "runs/NAME/detect, or a file of the authors' ViTDet-style code"
        )
    return saved_detector(file)


def saved_detector(file: DetectorFile) -> SavedDetector:
    """Return the detector of a file, as :func:`open_detector` does."""
    if problem := detector_problem(file):
        raise UserError(f"{file.weights.where}: {problem}")
    return SavedDetector(file, with_present_keys(file.metadata()))


def detector_problem(file: DetectorFile) -> str:
    """Return the reason why a detector cannot be taken whole; "" if it has all tensors of the model of its sizes."""
    identity = file.weights.identity
    if file.problem:
        return file.problem
    if identity.grid is None:
        return "the rows of its pos_embed do not form a square grid"
    config, side = file.sizes()
    try:
        sizes = {**identity.sizes, "num_heads": identity.origin.num_heads or 1}
        spec = make_spec(FAMILIES[identity.family], sizes, "its encoder")
        with torch.device("meta"):
            model = assemble_detector(spec, config, side, identity.grid[0] * spec.stride, file.num_classes)
    except ConfigError as error:
        return str(error)
    return detector_difference(file, model.state_dict())


def export_detector(source: Path, out: Path | None = None, force: bool = False) -> Exported:
    """Export a whole detector to a model file of this project.

    Args:
        source: as in :func:`open_detector`.
        out: output file or folder; None writes a file named after run and stage to the working directory.
        force: replace an existing file that this project did not write.

    Raises:
        UserError: as for :func:`open_detector`, or if ``out`` must not be written.
    """
    detector = open_detector(source)
    path = detector.file.weights.raw.path
    metadata = detector.metadata | {"layout": "safetensors", **provenance(path)}
    target = export_target(path, metadata, "safetensors", out, force)
    save_weights(target, detector.file.tensors, metadata)
    line = f"from mrmae_ds.detection.saved import open_detector; model = open_detector(Path({str(target)!r})).load()"
    return Exported(target, f"from pathlib import Path; {line}")
