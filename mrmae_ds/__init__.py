"""MR-MAE ("Mimic before Reconstruct") pre-training at scale with DeepSpeed ZeRO-3.

``mrmae_ds.__all__`` is the public API; everything else is private by convention and may change in any release. The
command line (``mrmae``) and the keys of recipes and run records are public too.

``import mrmae_ds`` imports no torch, because torch reads environment variables that training sets first
(``distributed/launch.py``); the public names are imported on first access. After it the models are timm's too:
``timm.create_model("cvit_base", img_size=224, num_classes=10)``.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mrmae_ds.timm_hook import register_with_timm

_MODULES = {
    "MRMAE": "mrmae_ds.api",
    "ImageEncoder": "mrmae_ds.api",
    "Recipe": "mrmae_ds.config.recipe",
    "UserError": "mrmae_ds.errors",
    "load_recipe": "mrmae_ds.config.recipe",
}
__all__ = ["MRMAE", "ImageEncoder", "Recipe", "UserError", "__version__", "load_recipe"]

try:
    __version__ = version("mrmae_ds")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"

register_with_timm()


def __getattr__(name: str) -> Any:
    """Import a public name on first access."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """Return the module's names, including those not yet imported."""
    return sorted({*globals(), *__all__})
