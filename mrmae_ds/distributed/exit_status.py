"""How a command of train.py ends when it does not end well: what is printed, by which rank, and the exit status."""

from __future__ import annotations

import sys
import time
import traceback

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.errors import UserError

FAILED, BAD_INPUT = 1, 2
WAIT_FOR_LEADER_S = 5


def report_exit(error: Exception, launch: Launch | None, started: bool) -> int:
    """Print what ended the command; the exit status.

    What all ranks raise together is told by rank 0 alone: bad input by its message, a training that cannot go on too,
    everything else with a traceback.

    Args:
        error: see above.
        launch: this process; None if that was not found out.
        started: the processes had begun to work together.
    """
    # Imported here: where bad input ends a command, torch and DeepSpeed have often not been imported yet.
    if started:
        from mrmae_ds.distributed.collectives import CollectiveError, TrainingError
        from mrmae_ds.distributed.signals import STOPPED_STATUS, Stopped

        first = launch is None or launch.rank == 0
        statuses = {Stopped: STOPPED_STATUS, CollectiveError: BAD_INPUT, TrainingError: FAILED}
        for kind, status in statuses.items():
            if isinstance(error, kind):
                if first:
                    print(error if kind is Stopped else f"error: {error}", file=sys.stderr, flush=True)
                return status
    if not isinstance(error, UserError):
        traceback.print_exception(error)
        return FAILED
    # Before the start every rank of a node sees the same mistake, and one tells it. A launcher ends the others as soon
    # as one has left, so they let it speak; whoever is still there has a mistake of its own.
    if launch is not None and launch.local_rank > 0 and not started:
        time.sleep(WAIT_FOR_LEADER_S)
    print(f"error: {error}", file=sys.stderr, flush=True)
    return BAD_INPUT
