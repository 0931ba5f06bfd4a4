from __future__ import annotations

import os

import pytest

from mrmae_ds.units import counted, describe_difference, first_few, printable, significant


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (0.0123456, "0.0123"), (1, "1.00"), (12.345, "12.3"), (999.9, "1,000"), (12345, "12,300")],
)
def test_numbers_are_rounded_to_three_significant_digits(number: float, text: str) -> None:
    assert significant(number) == text


def test_counts_have_the_right_number() -> None:
    assert [counted(1, "file"), counted(1200, "file"), counted(1, "class"), counted(0, "class")] == [
        "1 file", "1,200 files", "1 class", "0 classes",
    ]  # fmt: skip


def test_an_ellipsis_stands_for_the_rest() -> None:
    assert (first_few([], 2), first_few([1, 2], 2), first_few(["a", "b", "c"], 2)) == ("", "1, 2", "a, b, ...")


@pytest.mark.parametrize(
    ("ours", "theirs", "text"),
    [
        (["a", "b"], ["a", "b"], ""),
        (["a", "b"], ["a", "c"], "number 1 is 'b', the other 'c'"),
        (["a"], ["a", "b"], "1 names, the other has 2"),
        (["caf\u00e9"], ["cafe\u0301"],
         r"number 0 is 'caf\xe9', the other 'cafe\u0301': the same text in another Unicode form"),
    ],
)  # fmt: skip
def test_difference_of_lists_is_visible(ours: list[str], theirs: list[str], text: str) -> None:
    assert describe_difference(ours, theirs) == text


def test_names_are_printed_on_one_line_without_control_characters() -> None:
    assert printable("a\nb\x1b[31m\x80 \xfc.png") == "a\\nb\\x1b[31m\\x80 \xfc.png"
    assert printable(os.fsdecode(b"x\xff")) == "x\\xff"
    assert printable("\ud800 \u2028") == "\\ud800 \\u2028"  # of JSON, and no text that can be encoded
    assert first_few(["a\nb", "c"], 1) == "a\\nb, ..."
