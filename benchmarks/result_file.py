"""The JSON that a benchmark writes: what was found, beside what is needed to find it again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def write_result(path: Path, processes: int, device: str, **found: Any) -> None:
    """Write ``found`` with the command, the commit, the hardware and the versions.

    Args:
        path: of the JSON, replaced if it is there.
        processes: that took part. device: ``cpu`` or ``cuda``.
        found: what the benchmark found.
    """
    from mrmae_ds.records.environment import collect_hardware, collect_versions, git_state

    git = git_state(Path(__file__).parent)
    content = {
        "command": " ".join(["python", *sys.argv]),
        "commit": git.model_dump() if git else None,
        "hardware": collect_hardware(processes, device).model_dump(),
        "versions": collect_versions(),
        **found,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
