"""The one exception that means "the user can mend this"."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: the message names the file, key or shape and says how to mend it.

    Command lines print the message alone, without a traceback, and exit with status 2.
    """
