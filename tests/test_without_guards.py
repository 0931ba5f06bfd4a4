"""Every guard of tests/support/without_guards.py exists, and its tests do. That script takes too long for the suite."""

from __future__ import annotations

import re

import pytest

from tests.support.processes import REPOSITORY
from tests.support.without_guards import GUARDS


@pytest.mark.parametrize("name", GUARDS)
def test_the_guard_exists(name: str) -> None:
    guard = GUARDS[name]
    assert (REPOSITORY / "mrmae_ds" / guard.path).read_text(encoding="utf-8").count(guard.guard) == 1
    path, *selection = guard.tests
    names = re.findall(r"^def (test_\w+)", (REPOSITORY / path).read_text(encoding="utf-8"), re.MULTILINE)
    if selection:
        option, words = selection
        assert option == "-k" and any(word in name for name in names for word in words.split(" or ")), words
    assert names
