"""Registers this project's models with timm when timm is imported, before or after this package.

Importing timm here would make every ``import mrmae_ds`` import torch: commands that need neither would start slowly,
and what distributed/launch.py sets in the environment would come after torch has read it.
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
    """Finds timm as the other finders do, and adds our registration to the end of its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See :class:`importlib.abc.MetaPathFinder`."""
        if fullname != "timm":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                importlib.import_module(REGISTRY)

            # On the loader itself, which was made for this spec: whatever else it can do stays as it is.
            setattr(spec.loader, "exec_module", exec_module)  # noqa: B010
        return spec


def register_with_timm() -> None:
    """Register now if timm is there, else as soon as it is imported."""
    if "timm" in sys.modules:
        importlib.import_module(REGISTRY)
    else:
        sys.meta_path.insert(0, _TimmFinder())
