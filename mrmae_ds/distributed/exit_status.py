"""Error reports and exit statuses of train.py."""

from __future__ import annotations

import logging
import time

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.distributed.logs import configure_logging
from mrmae_ds.errors import RaisedOnAllRanks, StopRequested, UserError, user_message

FAILED = 1
WAIT_FOR_LEADER_S = 5

logger = logging.getLogger(__name__)


def report_exit(error: Exception, launch: Launch | None, started: bool) -> int:
    """Print the exception that ended the command.

    Rank 0 alone prints what all ranks raised together. An exception that nobody foresaw is printed with its traceback.

    Args:
        error: the exception.
        launch: this rank; None if the environment does not say it.
        started: the ranks had begun to work together.

    Returns:
        The exit status: 1 for a failure, 2 for bad input, 75 after a signal.
    """
    if launch is None:
        configure_logging()
    if isinstance(error, RaisedOnAllRanks):
        if launch is None or launch.rank == 0:
            logger.log(logging.WARNING if isinstance(error, StopRequested) else logging.ERROR, "%s", error)
        return error.exit_status
    message = user_message(error)
    if message is None:
        logger.error("%s", type(error).__name__, exc_info=error)
        return FAILED
    # Before the start every rank of a node finds the same mistake, and its first rank reports it. A launcher ends the
    # others as soon as one has exited, so they wait for that; a rank that is still alive has a mistake of its own.
    if launch is not None and launch.local_rank > 0 and not started:
        time.sleep(WAIT_FOR_LEADER_S)
    logger.error("%s", message)
    return UserError.exit_status
