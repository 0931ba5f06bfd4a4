"""Logging set-up of a process: plain messages, with the rank in front of them on ranks other than 0.

Imports neither torch nor DeepSpeed, so that it can be called before the environment is prepared for them.
"""

from __future__ import annotations

import io
import logging
import sys

from mrmae_ds.distributed.launch import Launch

PACKAGE = "mrmae_ds"


def configure_logging(launch: Launch | None = None) -> None:
    """Print the package's messages, of level INFO and above, to the terminal. A second call replaces the first.

    Warnings and errors go to stderr, prefixed by their level. Libraries' loggers are left alone. Characters that the
    terminal's encoding lacks, and bytes of file names that are not UTF-8, are escaped from now on.

    Args:
        launch: this rank of a training job; its other messages go to stdout. None is a command whose stdout is its
            product (a table, a path), so all messages go to stderr.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logger = logging.getLogger(PACKAGE)
    for handler in [handler for handler in logger.handlers if isinstance(handler, ConsoleHandler)]:
        logger.removeHandler(handler)
    handler = ConsoleHandler(stdout=launch is not None)
    handler.setFormatter(PrefixFormatter(f"[rank {launch.rank}] " if launch and launch.rank else ""))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


class ConsoleHandler(logging.Handler):
    """Writes to the streams that ``sys`` holds when a message comes, flushed, so that two streams keep their order.

    Args:
        stdout: send messages below WARNING to stdout instead of stderr.
    """

    def __init__(self, stdout: bool) -> None:
        super().__init__()
        self.stdout = stdout

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        try:
            to_stdout = self.stdout and record.levelno < logging.WARNING
            print(self.format(record), file=sys.stdout if to_stdout else sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


class PrefixFormatter(logging.Formatter):
    """Puts a prefix, and the level of warnings and errors (``warning: ``), in front of a message."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, followed by the traceback if the record has one."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"{self.prefix}{level}{super().format(record)}"
