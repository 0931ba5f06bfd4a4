"""The authors' reference values, read once a module."""

from __future__ import annotations

import pytest
from torch import Tensor

from ..fixtures import load_reference


@pytest.fixture(scope="module")
def mcmae() -> dict[str, Tensor]:
    return load_reference("mcmae")


@pytest.fixture(scope="module")
def mae() -> dict[str, Tensor]:
    return load_reference("mae")
