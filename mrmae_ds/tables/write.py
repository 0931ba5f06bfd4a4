"""Build one of the paper's tables from run records, and write it as text and plots."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mrmae_ds.files import write_text
from mrmae_ds.tables import paper
from mrmae_ds.tables.ablations import ablation_table
from mrmae_ds.tables.base import Run, Table
from mrmae_ds.tables.csv import to_csv
from mrmae_ds.tables.detection import detection_table
from mrmae_ds.tables.latex import to_latex
from mrmae_ds.tables.markdown import to_markdown
from mrmae_ds.tables.plot_ablations import plot_ablations
from mrmae_ds.tables.plot_cost import plot_cost
from mrmae_ds.tables.plot_scaling import plot_scaling
from mrmae_ds.tables.scaling import scaling_table


def build_table(number: int, records: Iterable[Run]) -> Table:
    """Build one of the paper's tables from run folders and their records (see `find_records`)."""
    if number == paper.TABLE_2.number:
        return detection_table(records)
    return scaling_table(records) if number == paper.TABLE_6.number else ablation_table(number, records)


def write_table(records: Iterable[Run], out_dir: str | Path, number: int | None = None) -> tuple[Table, list[Path]]:
    """Build a table and write it.

    Args:
        records: run folders and their records (see `find_records`).
        out_dir: folder for Markdown, CSV, LaTeX, a plot of the table, and one of accuracy (not of AP) over parameters
            and GPU-hours.
        number: the paper's table; None is the scaling table, Table 6, in files without a number.

    Returns:
        The table and the files.
    """
    table = build_table(number or paper.TABLE_6.number, records)
    folder, stem = Path(out_dir), f"table{number or ''}"
    texts = {
        folder / f"{stem}.md": to_markdown(table),
        folder / f"{stem}.csv": to_csv(table),
        folder / f"{stem}.tex": to_latex(table),
    }
    for path, text in texts.items():
        write_text(path, text)
    plot = plot_scaling if table.number == paper.TABLE_6.number else plot_ablations
    images = {folder / f"{stem}.png": plot}
    if table.number != paper.TABLE_2.number:
        images[folder / f"{stem}_cost.png"] = plot_cost
    for path, draw in images.items():
        draw(table, path)
    return table, [*texts, *images]
