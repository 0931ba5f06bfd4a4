"""A real Slurm cluster, shared by all tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slurm_cluster import Cluster, missing_programs

# Replaces Python: it runs $STUB instead of train.py, and fakes slurm/restarts.py unless $REAL_RESTARTS is set.
STUB = """#!/bin/bash
if [ "$1" = slurm/restarts.py ]; then
    [ -z "$REAL_RESTARTS" ] || exec {python} "$@"
    echo "mrmae-status-prefix={folder}/status/$SLURM_JOB_ID"; echo "mrmae-resume=$RESUME"; exit 0
fi
eval "$STUB"
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes that accept jobs."""
    missing = missing_programs()
    if missing:
        pytest.skip(
            f"Slurm is not installed: no {', '.join(missing)} (scripts/setup.sh --slurm installs slurm-wlm and munge)"
        )
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def stub_site(cluster: Cluster) -> Path:
    """Site settings whose Python is a shell script that runs $STUB."""
    folder = cluster.folder / "stub"
    (folder / "status").mkdir(parents=True)
    python = folder / "python"
    python.write_text(STUB.format(python=sys.executable, folder=folder))
    python.chmod(0o755)
    site = folder / "site.sh"
    site.write_text(f"PYTHON={python}\nexport DS_ACCELERATOR=cpu\nNETWORK_INTERFACE=lo\n")
    return site


# Python that runs tests/support/disturbed.py instead of train.py.
DISTURBED = """#!/bin/bash
[ "$1 $2" != "-u train.py" ] || set -- -u tests/support/disturbed.py "${{@:3}}"
exec {python} "$@"
"""


@pytest.fixture(scope="session")
def training_site(cluster: Cluster) -> Path:
    """Site settings of a cluster without GPUs."""
    folder = cluster.folder / "training"
    folder.mkdir()
    python = folder / "python"
    python.write_text(DISTURBED.format(python=sys.executable))
    python.chmod(0o755)
    site = folder / "site.sh"
    site.write_text(f"PYTHON={python}\nexport DS_ACCELERATOR=cpu OMP_NUM_THREADS=1\nNETWORK_INTERFACE=lo\n")
    return site
