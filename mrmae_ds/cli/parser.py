"""Argument parser of all commands: recipe overrides may be anywhere on the command line."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mrmae_ds.distributed.logs import configure_logging
from mrmae_ds.errors import UserError, user_message
from mrmae_ds.files import expand_home, split_choice
from mrmae_ds.units import counted

if TYPE_CHECKING:
    import torch

OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")
_DEVICE = re.compile(r"cpu|cuda(:(?P<number>[0-9]+))?")
INTERRUPTED = 130  # 128 + SIGINT, as in shells
# How the completion scripts that shtab writes complete a path.
_COMPLETE_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}


class Command(Protocol):
    """Interface of the modules in this package that hold a command.

    Attributes:
        SUMMARY: what the command does, for ``--help``.
    """

    SUMMARY: str

    def add_arguments(self, parser: CommandParser, /) -> None:
        """Add the command's arguments to its parser. It must not import torch, so that ``--help`` is fast."""

    def run(self, args: argparse.Namespace, /) -> None:
        """Run the command.

        Raises:
            UserError: for bad input; the command line prints the message and exits with status 2.
            SystemExit: with another exit status.
        """


class CommandParser(argparse.ArgumentParser):
    """Parser that accepts ``key.path=value`` overrides before, between and after other arguments.

    ``parse_intermixed_args`` does not support subcommands, and an option with several values, as in
    ``--images a.jpg seed=1``, would take the override for a value. So overrides are removed before the other arguments
    are parsed: arguments of that form, unless an option takes exactly this one as its value or a file of this name
    exists.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._takes_overrides = False
        self._single_valued: set[str] = set()
        super().__init__(*args, **kwargs)

    def add_overrides(self, help: str = "recipe values to replace") -> None:
        """Add the positional argument ``overrides``, a list of strings. Call it after all other arguments."""
        self._takes_overrides = True
        self.add_argument("overrides", nargs="*", metavar="key.path=value", help=help)

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        """Add an argument; see :meth:`argparse.ArgumentParser.add_argument`. :func:`path_argument` reads paths."""
        is_path = kwargs.get("type") is Path
        if is_path:
            kwargs["type"] = path_argument
        action = super().add_argument(*names, **kwargs)
        if action.nargs is None:
            self._single_valued.update(action.option_strings)
        if is_path:
            setattr(action, "complete", _COMPLETE_FILES)  # noqa: B010  (an attribute that shtab reads)
        return action

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse arguments; see :meth:`argparse.ArgumentParser.parse_known_args`."""
        words = list(sys.argv[1:] if args is None else args)
        if not self._takes_overrides:
            return super().parse_known_args(words, namespace)
        overrides: list[str] = []
        others: list[str] = []
        for previous, word in zip(["", *words], words, strict=False):
            is_override = OVERRIDE.match(word) and previous not in self._single_valued and not Path(word).exists()
            (overrides if is_override else others).append(word)
        namespace, unknown = super().parse_known_args(others, namespace)
        namespace.overrides = [*overrides, *namespace.overrides]
        return namespace, unknown


def path_argument(text: str) -> Path:
    """Return the path of an argument, with a leading tilde expanded.

    Raises:
        argparse.ArgumentTypeError: if it is empty, as an unset variable is, or names an unknown user.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    try:
        return Path(expand_home(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_recipe_options(parser: CommandParser) -> None:
    """Add ``--ds_config`` and ``--recipe``."""
    parser.add_argument("--ds_config", type=Path, required=True, help="engine config, ds_configs/NAME.json")
    parser.add_argument(
        "--recipe", type=Path, help="recipe; default: the YAML of the same name beside the engine config"
    )


def add_device_option(parser: CommandParser) -> None:
    """Add ``--device``, which :func:`requested_device` reads."""
    parser.add_argument("--device", metavar="{cpu,cuda,cuda:N}", help="where to compute; default: cuda if available")


def requested_device(name: str | None) -> torch.device:
    """Return the device of ``--device``; None is the first GPU if there is one, else the CPU.

    Raises:
        UserError: for another name, or a GPU that torch does not find.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    match = _DEVICE.fullmatch(name)
    if match is None:
        raise UserError(f"--device {name}: expected cpu, cuda or cuda:N")
    if name != "cpu" and int(match["number"] or 0) >= gpus:
        fix = (
            f"use cuda:0 to cuda:{gpus - 1}" if gpus else "use --device cpu, or see nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
        raise UserError(f"--device {name}: torch {torch.__version__} finds {counted(gpus, 'GPU')} here; {fix}")
    return torch.device(name)


def require_path(path: Path) -> None:
    """Check that a path exists, before slow imports; ``FILE#KEY`` is the path of FILE, ``hf:ORG/NAME`` none.

    Raises:
        UserError: if it does not.
    """
    path, _ = split_choice(path)
    if not path.exists() and not str(path).startswith("hf:"):
        raise UserError(f"{path}: no such file or folder")


@contextlib.contextmanager
def quiet_without_reader() -> Iterator[None]:
    """End the process quietly, with a shell's status of SIGPIPE, if nobody reads its output any longer, as `head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        output = select.poll()
        output.register(sys.stdout, 0)
        if not output.poll(0):  # another pipe is broken, as a worker's
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the interpreter's end
        raise SystemExit(128 + signal.SIGPIPE) from None


def run_command(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run a command.

    Args:
        run: the command.
        args: its arguments.

    Returns:
        The exit status: 0, 2 after the message of an error that the user can fix, or 130 after Ctrl-C.
    """
    configure_logging()
    try:
        run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return UserError.exit_status
    return 0
