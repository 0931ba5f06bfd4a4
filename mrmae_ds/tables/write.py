"""Tables of results: the paper's and, apart from them, what our own runs measured.

Rules that keep them honest. An accuracy of ours comes from a finished fine-tuning run, or from the evaluation of
several fine-tuned models together, and nothing else; what did not run stays blank. A row is the paper's or ours, never
both, and one of ours holds runs of one method, one number of models, one pre-training length and one data set, so that
nothing unlike is averaged or set side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mrmae_ds.files import write_text
from mrmae_ds.records.record import RunRecord, find_records
from mrmae_ds.tables import paper

Run = tuple[Path, RunRecord]


@dataclass(frozen=True)
class Cell:
    """One number. With `runs` it was measured: the mean over them, which differ in their seed alone.

    `spread` is the sample standard deviation over seeds, None for one seed. `value` is None for the paper's dash.
    """

    value: float | None
    spread: float | None = None
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True)
class Row:
    """Cells from one source by column; a column that is missing is blank.

    `epochs` are those of pre-training (0: none, None: unknown); `dataset` is "" for a row that was not run; `labels`
    is what the row says in words, by heading.
    """

    method: str
    source: Literal["paper", "ours"]
    label: str
    dataset: str
    epochs: float | None
    cells: dict[str, Cell]
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def measured(self) -> dict[str, Cell]:
        """Our cells that runs fill, by column."""
        return {column: cell for column, cell in self.cells.items() if cell.runs}


@dataclass(frozen=True)
class Table:
    """A table: the paper's `number`, its `title`, headings in words, columns of numbers, rows.

    `left_out` tells of fine-tuning runs that fill no cell, and why; `probes` are finished linear probes, for which the
    paper has no table.
    """

    number: int
    title: str
    headings: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]
    probes: tuple[Run, ...] = ()

    @property
    def measured(self) -> list[tuple[Row, str, Cell]]:
        """Our filled cells in reading order, each with its row and column."""
        return [(row, c, row.measured[c]) for row in self.rows for c in self.columns if c in row.measured]

    def to_markdown(self) -> str:
        """Return the table with its footnotes and the runs behind each of our cells, as Markdown."""
        from mrmae_ds.tables.markdown import to_markdown

        return to_markdown(self)

    def to_csv(self) -> str:
        """Return one line a row and column, with its source, so that a spreadsheet cannot mix them up."""
        from mrmae_ds.tables.csv import to_csv

        return to_csv(self)

    def to_latex(self) -> str:
        """Return the table, its footnotes and the runs as LaTeX, for documents that load `booktabs`."""
        from mrmae_ds.tables.latex import to_latex

        return to_latex(self)


def paper_table(number: int, records: Iterable[Run]) -> Table:
    """Build the paper's Table 1, 3, 4, 5 or 6 from run folders and their records (see `find_records`)."""
    if number == paper.TABLE_6.number:
        from mrmae_ds.tables.scaling import scaling_table

        return scaling_table(records)
    from mrmae_ds.tables.ablations import rows_table

    return rows_table(number, records)


def write_table(
    roots: Sequence[str | Path], out_dir: str | Path, number: int | None = None
) -> tuple[Table, list[Path]]:
    """Build a table from the runs below `roots` and write it.

    Args:
        roots: folders that hold runs, at any depth.
        out_dir: gets Markdown, CSV, LaTeX, an image of the table, and one of accuracy over parameters and GPU-hours.
        number: the paper's table; None is the scaling table, Table 6, under a name without a number.

    Returns:
        The table and the files.

    Raises UserError for a root that is no folder and for a record that cannot be read.
    """
    from mrmae_ds.tables.plot_cost import plot_costs
    from mrmae_ds.tables.plot_scaling import plot

    table = paper_table(number or paper.TABLE_6.number, find_records(roots))
    folder, stem = Path(out_dir), f"table{number or ''}"
    texts = {"md": table.to_markdown(), "csv": table.to_csv(), "tex": table.to_latex()}
    written = [folder / f"{stem}.{kind}" for kind in texts]
    for path, text in zip(written, texts.values(), strict=True):
        write_text(path, text)
    images = {folder / f"{stem}.png": plot, folder / f"{stem}_cost.png": plot_costs}
    for path, draw in images.items():
        draw(table, path)
    return table, [*written, *images]
