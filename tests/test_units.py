from __future__ import annotations

import pytest

from mrmae_ds.units import first_few, significant


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (0.0123456, "0.0123"), (1, "1.00"), (12.345, "12.3"), (999.9, "1,000"), (12345, "12,300")],
)
def test_numbers_are_rounded_to_three_significant_digits(number: float, text: str) -> None:
    assert significant(number) == text


def test_an_ellipsis_stands_for_the_rest() -> None:
    assert (first_few([], 2), first_few([1, 2], 2), first_few(["a", "b", "c"], 2)) == ("", "1, 2", "a, b, ...")
