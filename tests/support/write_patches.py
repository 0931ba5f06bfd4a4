"""Write the patches of DeepSpeed for upstream: ``python -m tests.support.write_patches``, into docs/patches."""

from __future__ import annotations

import difflib
from collections import defaultdict
from importlib import import_module
from pathlib import Path

from mrmae_ds.training.engine.deepspeed_edits import Edit, Patch, edited_source
from mrmae_ds.training.engine.deepspeed_patches import PATCHES

FOLDER = Path(__file__).parents[2] / "docs/patches"


def unified_diff(patch: Patch) -> str:
    """Return a patch as a unified diff against the installed DeepSpeed."""
    by_module: defaultdict[str, list[Edit]] = defaultdict(list)
    for edit in patch.edits:
        by_module[edit.module].append(edit)
    lines: list[str] = []
    for module, edits in by_module.items():
        text = edited = Path(str(import_module(module).__file__)).read_text()
        for function in {edit.target(): None for edit in edits}:
            own = [edit for edit in edits if edit.target() is function]
            edited = edited.replace(edited_source(function, []), edited_source(function, own))
        name = module.replace(".", "/") + ".py"
        lines += difflib.unified_diff(text.splitlines(True), edited.splitlines(True), f"a/{name}", f"b/{name}")
    return "".join(lines)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for patch in PATCHES:
        (FOLDER / f"{patch.name}.patch").write_text(unified_diff(patch))
