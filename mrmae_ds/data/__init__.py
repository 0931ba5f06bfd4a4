"""Pictures: written once as .beton files, read back as reproducible uint8 batches."""

from mrmae_ds.data.beton import BetonInfo, check_beton, read_sidecar
from mrmae_ds.data.order import steps_per_epoch
from mrmae_ds.data.reader import Batch, CropSettings, Reader, build_reader

__all__ = [
    "Batch",
    "BetonInfo",
    "CropSettings",
    "Reader",
    "build_reader",
    "check_beton",
    "read_sidecar",
    "steps_per_epoch",
]
