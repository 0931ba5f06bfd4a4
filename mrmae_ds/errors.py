"""Errors caused by user input, printed without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: the message names the file, key or shape and the fix.

    Command lines print the message alone and exit with status 2.
    """


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
