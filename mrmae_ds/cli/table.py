"""``mrmae table``: the paper's tables with the results of run records."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mrmae_ds.cli.parser import CommandParser

SUMMARY = "write the paper's tables, with results from run records beside the published ones"
TABLES = (1, 2, 3, 4, 5, 6)


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("runs", nargs="+", type=Path, help="folders that contain runs, at any depth")
    parser.add_argument(
        "--paper",
        type=int,
        choices=TABLES,
        action="append",
        help="number of the paper's table; may be repeated. Default: the scaling table (Table 6), written as table.*",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for table[N].md, .csv, .tex, .png and table[N]_cost.png; default: the first of runs",
    )


def run(args: argparse.Namespace) -> None:
    """Print the tables and write their files; without runs, those of the paper with our cells blank."""
    from mrmae_ds.records.record import find_records
    from mrmae_ds.tables.markdown import to_markdown
    from mrmae_ds.tables.write import write_table

    records = find_records(args.runs)
    if not records:
        print(
            f"{', '.join(map(str, args.runs))}: no run (record.json) at any depth, our cells are blank", file=sys.stderr
        )
    for number in args.paper or [None]:
        table, paths = write_table(records, args.out or args.runs[0], number)
        print(to_markdown(table))
        print(f"written: {', '.join(map(str, paths))}")
