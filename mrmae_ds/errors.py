"""Exceptions with a meaning for the command line and for other ranks.

UserError               bad input
    ConfigError         a wrong value in a configuration
RaisedOnAllRanks        no rank waits for another
    CollectiveError     bad input or a failed disk, found on some rank (also a UserError)
    TrainingError       training cannot continue
    StopRequested       a signal, after a checkpoint
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

# What a user can fix: the disk is full or read-only, a path is not permitted, too long, a file or a folder by mistake.
_FILE_SYSTEM = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
}


class UserError(ValueError):
    """Bad input: the message names the file, key or shape and the fix.

    Command lines print the message alone and exit with status 2.
    """

    exit_status: ClassVar[int] = 2


class ConfigError(UserError):
    """A wrong value in a configuration.

    Pydantic returns the exception that a validator raised as ``error["ctx"]["error"]``, so a validator of a section can
    name a key below the section.

    Attributes:
        key: dotted path of the value, relative to the section that raises.
        reason: the message without the key.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason


@contextmanager
def errors_below(section: str) -> Iterator[None]:
    """Name a section of the configuration before the key of a :class:`ConfigError` that is raised inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{section}.{error.key}", error.reason) from None


@contextmanager
def errors_of(file: Path) -> Iterator[None]:
    """Name a file before the message of a :class:`UserError` that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


class RaisedOnAllRanks(Exception):
    """Base of what every rank raises at the same place: the process group is intact, and no rank needs a report.

    Any other exception leaves the other ranks waiting in their next collective operation, until the watchdog
    (:mod:`mrmae_ds.distributed.watchdog`) ends them.
    """

    exit_status: ClassVar[int] = 1


class CollectiveError(RaisedOnAllRanks, UserError):
    """A failure of at least one rank that all ranks raise together; rank 0 prints it."""

    exit_status: ClassVar[int] = UserError.exit_status


class TrainingError(RaisedOnAllRanks, RuntimeError):
    """Training cannot continue."""


class StopRequested(RaisedOnAllRanks):
    """A signal ended the stage after a checkpoint.

    Args:
        number: of the signal.
        step: optimizer steps completed.
    """

    exit_status: ClassVar[int] = 75  # EX_TEMPFAIL of sysexits.h: try again; the same command resumes

    def __init__(self, number: int, step: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}; the same command resumes from there")


def user_message(error: BaseException) -> str | None:
    """Return the message for an error that the user can fix: bad input, a full disk or a refused path; else None."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _FILE_SYSTEM:
        return f"{error.filename or 'a file that this command writes'}: {error.strerror}"
    return None
