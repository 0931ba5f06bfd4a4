"""Pictures: written once as .beton files, read back as reproducible uint8 batches."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
_HOME = {"BetonInfo": "beton", "check_beton": "beton", "read_sidecar": "beton", "steps_per_epoch": "order"}


def __getattr__(name: str) -> Any:
    """Import on first use: who only writes or describes a data set needs no torch, which takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME.get(name, 'reader')}"), name)
