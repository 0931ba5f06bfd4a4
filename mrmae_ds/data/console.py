"""What the scripts in ``data/`` share: how they report and how they fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from mrmae_ds.data.beton import BetonInfo
from mrmae_ds.data.verify import describe_beton
from mrmae_ds.errors import UserError


def report(write: Callable[[], Sequence[BetonInfo]]) -> int:
    """Write data sets and say what was written.

    Returns the exit status: 0, or 2 after printing the message of a UserError.
    """
    try:
        written = write()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for info in written:
        print(describe_beton(info.path))
    return 0
