from __future__ import annotations

from mrmae_ds.reporting.paper import TABLE_6, slips_of

# Typed a second time from the paper's Table 6.
PRINTED = """
MAE     1600  79.5  83.6  85.9  86.9  -     87.8
MCMAE   800   82.6  84.6  84.9  86.2  -     -
MR-MAE  200   83.6  85.5  86.8  88.0  88.5  -
"""


def test_table_6_is_as_printed() -> None:
    assert TABLE_6.columns == ("Small", "Base", "Large", "Huge", "Huge-392", "Huge-448")
    lines = [line.split() for line in PRINTED.strip().splitlines()]
    for row, (method, epochs, *numbers) in zip(TABLE_6.rows, lines, strict=True):
        assert (row.method, row.epochs) == (method, int(epochs))
        expected = [None if number == "-" else float(number) for number in numbers]
        assert [row.cells[column] for column in TABLE_6.columns] == expected


def test_the_slips_reach_the_tables_they_touch() -> None:
    assert any("Huge-393" in text for text in slips_of(6))
    assert any("85.8" in text and "400" in text for text in slips_of(5))
    assert any("52.7" in text for text in slips_of(5))
    assert not any("52.7" in text for text in slips_of(6))
    assert all(any("visible" in text for text in slips_of(table)) for table in range(1, 7))
