"""Every guard of tests/support/without_guards.py is found in the code; running it takes longer than a suite should."""

from __future__ import annotations

import pytest

from tests.support.processes import REPOSITORY
from tests.support.without_guards import GUARDS


@pytest.mark.parametrize("name", GUARDS)
def test_the_guard_stands_where_it_is_looked_for(name: str) -> None:
    guard = GUARDS[name]
    assert (REPOSITORY / "mrmae_ds" / guard.path).read_text(encoding="utf-8").count(guard.guard) == 1
    assert (REPOSITORY / guard.tests[0]).is_file()
