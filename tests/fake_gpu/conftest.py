"""Fixtures of the runs on the GPU stand-in."""

from __future__ import annotations

import pytest

from tests.fake_gpu.cases import Workspace


@pytest.fixture(scope="package")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Data, a teacher and engine configs; runs stay in it."""
    return Workspace(tmp_path_factory.mktemp("fake_gpu"))
