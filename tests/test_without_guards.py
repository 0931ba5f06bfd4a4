"""Every guard of tests/support/without_guards.py exists in the code. That script takes too long for the suite."""

from __future__ import annotations

import pytest

from tests.support.processes import REPOSITORY
from tests.support.without_guards import GUARDS


@pytest.mark.parametrize("name", GUARDS)
def test_the_guard_exists(name: str) -> None:
    guard = GUARDS[name]
    assert (REPOSITORY / "mrmae_ds" / guard.path).read_text(encoding="utf-8").count(guard.guard) == 1
    assert (REPOSITORY / guard.tests[0]).is_file()
