"""JSON result file of a benchmark: the results, and what is needed to reproduce them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def write_result(path: Path, processes: int, device: str, **results: Any) -> None:
    """Write results with the command, the commit, the hardware and the versions.

    Args:
        path: JSON file; an existing one is replaced.
        processes: number of ranks.
        device: ``cpu`` or ``cuda``.
        results: results of the benchmark.
    """
    from mrmae_ds.records.environment import collect_hardware, collect_versions, git_state

    git = git_state(Path(__file__).parent)
    content = {
        "command": " ".join(["python", *sys.argv]),
        "commit": git.model_dump() if git else None,
        "hardware": collect_hardware(processes, device).model_dump(),
        "versions": collect_versions(),
        **results,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
