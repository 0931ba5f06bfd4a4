"""Write a table as LaTeX: `booktabs` rules, with the notes and the runs below it."""

from __future__ import annotations

from collections.abc import Sequence

from mrmae_ds.tables import paper
from mrmae_ds.tables.base import Table
from mrmae_ds.tables.markdown import COST_COLUMNS, COSTS, ERRORS, cell_marks, cost_lines, grids, run_columns, run_lines

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
# Not special in LaTeX, so that a bold number can be marked before its text is escaped.
_BOLD, _END = "\x01", "\x02"
_SOURCES = (
    "Rows marked paper are copied from the paper's Table {number}; a dash is blank in the paper. Rows marked ours, in "
    "bold, were measured by the runs below, on the dataset named in the row; accuracies on different datasets are not "
    "comparable. Cells that were not run are blank. ep: epochs of pre-training."
)


def to_latex(table: Table) -> str:
    r"""Return a `table` environment and, if runs fill cells, two more with these runs and their costs.

    Documents need `\usepackage{booktabs,graphicx}`.
    """
    marks = cell_marks(table)
    first = 1 + len(table.headings)
    bodies = [_tabular(head, body, first) for head, body in grids(table, marks, f"{_BOLD}{{}}{_END}")]
    notes = [_SOURCES.format(number=table.number), *paper.errata_of(table.number)]
    parts = [
        "% \\usepackage{booktabs,graphicx}",
        _float(f"{table.title}.", f"tab:paper{table.number}", bodies, notes),
    ]
    if marks:
        label = f"tab:paper{table.number}"
        runs = _tabular(run_columns(table), list(run_lines(table, marks)), None)
        costs = _tabular(list(COST_COLUMNS), list(cost_lines(table, marks)), 2)
        reference = f"our numbers in Table~\\ref{{{label}}}"
        parts.append(_float(f"Runs behind {reference}.", f"{label}runs", [runs], [ERRORS], escaped=True))
        parts.append(_float(f"Cost of the runs behind {reference}.", f"{label}cost", [costs], [COSTS], escaped=True))
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Escape plain text for LaTeX; a leading bracket must not become the option of a preceding line break."""
    shown = "".join(_SPECIAL.get(character, character) for character in text)
    if shown.startswith("["):
        shown = f"{{[}}{shown[1:]}"
    return shown.replace(_BOLD, r"\textbf{").replace(_END, "}")


def _float(caption: str, label: str, bodies: Sequence[str], notes: Sequence[str], escaped: bool = False) -> str:
    text = caption if escaped else escape(caption)
    lines = ["\\begin{table}[p]", "\\centering", f"\\caption{{{text}}}", f"\\label{{{label}}}"]
    for body in bodies:
        lines += ["\\resizebox{\\linewidth}{!}{%", body, "}", "", "\\medskip"]
    lines += [r"\raggedright\footnotesize", "\\\\\n".join(escape(note) for note in notes), "\\end{table}"]
    return "\n".join(lines)


def _tabular(head: Sequence[str], body: Sequence[Sequence[str]], numbers_from: int | None) -> str:
    kinds = "".join("r" if numbers_from is not None and i >= numbers_from else "l" for i in range(len(head)))
    rows = [" & ".join(escape(cell) for cell in line) + r" \\" for line in (head, *body)]
    begin = [f"\\begin{{tabular}}{{{kinds}}}", "\\toprule", rows[0], "\\midrule"]
    return "\n".join([*begin, *rows[1:], "\\bottomrule", "\\end{tabular}"])
