"""Edits of DeepSpeed's source: a passage of a function is found, replaced, and compiled into the function's code."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import CodeType, FunctionType
from typing import Any


@dataclass(frozen=True)
class Edit:
    """A passage of DeepSpeed that is replaced.

    Attributes:
        module: path of its module.
        function: name of the function there, or ``Class.method``.
        before: passage of its source, which must occur once in the function.
        after: the passage in its place, of as many lines or more. At a method's end, new methods may follow.
    """

    module: str
    function: str
    before: str
    after: str

    def target(self) -> FunctionType:
        """Return the function, without decorators.

        Raises:
            LookupError: if DeepSpeed has no such function.
        """
        found: Any = import_module(self.module)
        for name in self.function.split("."):
            found = getattr(found, _mangled(found, name), None)
        # Decorators keep what they wrap in a closure, some of them nowhere else.
        found = next((function for function in _wrapped(found) if function.__code__.co_name == name), None)
        if found is None:
            raise LookupError(f"{self.module} has no function {self.function}")
        return found

    def fits(self) -> bool:
        """Return True if the passage is where it is expected."""
        try:
            return inspect.getsource(self.target()).count(self.before) == 1
        except (ImportError, LookupError, OSError):
            return False

    def applied(self) -> bool:
        """Return True if the file has the new passage already: its package was patched, or a newer version has it."""
        try:
            return inspect.getsource(import_module(self.module)).count(self.after) > 0
        except (ImportError, OSError):
            return False


@dataclass(frozen=True)
class Patch:
    """Edits that belong together.

    Attributes:
        name: of its file in docs/patches, without suffix.
        without: consequence of leaving it out, in words.
        edits: all of them, or none, are applied.
    """

    name: str
    without: str
    edits: tuple[Edit, ...]


def edited_code(function: FunctionType, edits: Sequence[Edit]) -> CodeType:
    """Compile a function of DeepSpeed with edits.

    Args:
        function: a function of a module, or a method, not yet edited.
        edits: of this function; each fits.

    Returns:
        The code, whose line numbers are those of the file up to an edit that adds lines.
    """
    return _compiled(function, edits)[function.__name__]


def added_methods(function: FunctionType, edits: Sequence[Edit]) -> list[tuple[type, FunctionType]]:
    """Return the methods that follow an edited method of DeepSpeed, each with its class; same arguments."""
    code = _compiled(function, edits)
    del code[function.__name__]
    if not code:
        return []
    owner = function.__globals__[function.__qualname__.split(".")[0]]
    return [(owner, FunctionType(new, function.__globals__, _mangled(owner, name))) for name, new in code.items()]


def edited_source(function: FunctionType, edits: Sequence[Edit]) -> str:
    """Return the source of a function of DeepSpeed with edits."""
    source = inspect.getsource(function)
    for edit in edits:
        source = source.replace(edit.before, edit.after)
    return source


def _compiled(function: FunctionType, edits: Sequence[Edit]) -> dict[str, CodeType]:
    """Return the code of an edited function, and of the methods after it, by name."""
    source = edited_source(function, edits)
    line = function.__code__.co_firstlineno
    owners = function.__qualname__.split(".")[:-1]
    # Inside a class of the same name, so that the indentation and private names are right.
    header = "".join(f"class {owner}:\n" for owner in owners)
    padding = "\n" * (line - 1 - len(owners))
    flags = function.__code__.co_flags & annotations.compiler_flag  # the file's own __future__
    filename = function.__code__.co_filename
    code = compile(padding + header + source, filename, "exec", flags, dont_inherit=True)
    for owner in owners:
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == owner)
    return {c.co_name: c for c in code.co_consts if isinstance(c, CodeType)}


def _mangled(owner: Any, name: str) -> str:
    private = isinstance(owner, type) and name.startswith("__") and not name.endswith("__")
    return f"_{owner.__name__.lstrip('_')}{name}" if private else name


def _wrapped(function: Any) -> Iterator[FunctionType]:
    """Yield a function and those in its closure, and so on."""
    if isinstance(function, FunctionType):
        yield function
        for cell in function.__closure__ or ():
            yield from _wrapped(cell.cell_contents)
