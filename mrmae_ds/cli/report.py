"""``mrmae report``: one or several runs on a self-contained HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from mrmae_ds.cli.parser import CommandParser

SUMMARY = "write a self-contained HTML page of one run, or of several in comparison"


def add_arguments(parser: CommandParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that contain runs, at any depth")
    parser.add_argument("--out", type=Path, help="the HTML file; default: report.html in the first RUN")


def run(args: argparse.Namespace) -> None:
    """Write the page and print its path."""
    from mrmae_ds.report.page import write_report

    print(write_report(args.runs, args.out))
