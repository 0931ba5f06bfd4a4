"""``mrmae doctor`` with few images, for tests: on a device whose values mean nothing, or with a planted fault.

python -m tests.support.fake_gpu tests/support/doctor_program.py --no-judge --out FOLDER/doctor.json --only launch
"""

from __future__ import annotations

import functools
import signal
import time
from argparse import SUPPRESS
from dataclasses import replace
from typing import Any

from mrmae_ds.cli import doctor
from mrmae_ds.cli.parser import CommandParser
from mrmae_ds.cli.train import end_process


def wrong_gradients() -> None:
    """Let the device compute other gradients than the CPU."""
    from mrmae_ds.doctor import numerics
    from mrmae_ds.doctor.context import DoctorContext

    DoctorContext.require_cuda = lambda self: None  # type: ignore[method-assign]
    compute, calls = numerics._loss_and_gradients, []

    def wrong(*arguments: Any) -> Any:
        loss, gradients = compute(*arguments)
        calls.append(1)
        factor = 1.001 if len(calls) == 2 else 1.0
        return loss, {name: gradient * factor for name, gradient in gradients.items()}

    numerics._loss_and_gradients = wrong  # type: ignore[assignment]


def hang() -> None:
    """Let the check of launches never end, as inside a collective or a kernel that no signal interrupts."""
    from mrmae_ds.doctor import run

    def check(context: Any) -> Any:
        (context.folder / "kept").touch()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(3600)

    run.CHECKS = tuple(
        replace(entry, run=check, seconds=2.0) if entry.name == "launch" else entry for entry in run.CHECKS
    )


FAULTS = {"wrong gradients": wrong_gradients, "hang": hang}


def main() -> None:
    """Run the command with the faults."""
    parser = CommandParser()
    doctor.add_arguments(parser)
    parser.add_argument("--no-judge", action="store_true", help=SUPPRESS)
    parser.add_argument("--fault", choices=FAULTS, help=SUPPRESS)
    arguments = parser.parse_args()
    doctor.prepare_environment()
    from mrmae_ds.doctor import context, kernels

    kernels.COPIED = 1 << 20
    if arguments.fault:
        FAULTS[arguments.fault]()
    values = {"images": 32, "judge": not arguments.no_judge}
    context.DoctorRequest = functools.partial(context.DoctorRequest, **values)  # type: ignore
    end_process(doctor.doctor(arguments))


if __name__ == "__main__":
    main()
