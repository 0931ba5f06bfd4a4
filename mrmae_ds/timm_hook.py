"""Register this project's models with timm when timm is imported, before or after this package.

Importing timm here would make every ``import mrmae_ds`` import torch: commands that need neither would start slowly,
and distributed/launch.py would set environment variables only after torch has read them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "mrmae_ds.timm_registry"


class _TimmFinder(MetaPathFinder):
    """Meta path finder that runs the registration at the end of timm's import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of timm that another finder finds, with a patched loader; None for other modules."""
        if fullname != "timm":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                importlib.import_module(REGISTRY)

            # Patch the loader itself, which was made for this spec, so that all its other features are kept.
            setattr(spec.loader, "exec_module", exec_module)  # noqa: B010
        return spec


def register_with_timm() -> None:
    """Register now if timm is imported, otherwise as soon as it is."""
    if "timm" in sys.modules:
        importlib.import_module(REGISTRY)
    else:
        sys.meta_path.insert(0, _TimmFinder())
