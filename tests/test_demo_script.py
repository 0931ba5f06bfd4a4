"""scripts/demo.sh from another working directory; a whole run of it is `make demo`."""

from __future__ import annotations

from pathlib import Path

from tests.support.processes import REPOSITORY, environment, run


def test_data_are_relative_to_the_caller(tmp_path: Path) -> None:
    done = run(["bash", str(REPOSITORY / "scripts/demo.sh"), "--data", "nothing"], 120, environment(), tmp_path)
    assert done.status == 2 and f"error: {tmp_path}/nothing: no such folder" in done.stderr
