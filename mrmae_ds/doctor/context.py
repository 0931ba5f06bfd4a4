"""Settings of the doctor, the state that its checks share, and a check."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.doctor.ranks import RankStore
from mrmae_ds.doctor.reading import NotApplicable, Reading
from mrmae_ds.profiling.gpus import Gpu


@dataclass(frozen=True)
class DoctorRequest:
    """Command line of ``mrmae doctor``.

    Attributes:
        ds_config: engine config whose recipe the checks of steps, loader and memory train; None is a tiny model.
        recipe: another recipe for it.
        only: names of the checks to run; empty for all.
        skip: names of checks to leave out.
        quick: run the 15-minute order only.
        out: report; a new folder beside it, visible to all nodes, holds files of the checks.
        images: generated images.
        judge: compare numbers with expectations. False for tests on devices whose values mean nothing.
    """

    ds_config: Path | None = None
    recipe: Path | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    quick: bool = False
    out: Path = Path("doctor.json")
    images: int = 512
    judge: bool = True


@dataclass
class DoctorContext:
    """State of the doctor on this rank.

    Attributes:
        request: the command line.
        launch: this rank.
        device: of this rank.
        gpu: its entry in the table of GPUs; None if it is unknown or not a GPU.
        ranks: exchange between ranks without collectives.
        folder: of the checks' files, shared by all ranks; this run made it.
        found: this rank's readings by the check's name.
        deadline: end of the current check's limit, on the monotonic clock.
        limit_s: the current check's limit.
    """

    request: DoctorRequest
    launch: Launch
    device: torch.device
    gpu: Gpu | None
    ranks: RankStore
    folder: Path
    found: dict[str, list[Reading]] = field(default_factory=dict)
    deadline: float = float("inf")
    limit_s: float = float("inf")

    @property
    def on_cuda(self) -> bool:
        """True if the device is a GPU."""
        return self.device.type == "cuda"

    def require_cuda(self) -> None:
        """Raise NotApplicable without a GPU."""
        if not self.on_cuda:
            raise NotApplicable("needs CUDA")

    def begin(self, limit_s: float) -> None:
        """Start the clock of a check."""
        self.limit_s, self.deadline = limit_s, time.monotonic() + limit_s

    def value(self, check: str, name: str) -> float | None:
        """Return a number that an earlier check found on this rank; None if it did not."""
        found = [reading.value for reading in self.found.get(check, []) if reading.name == name]
        return found[0] if found and isinstance(found[0], float | int) else None

    def time_is_left(self, share: float = 0.5) -> bool:
        """Return on every rank whether rank 0 has more than this share of the check's time left. All must call it."""
        return bool(self.ranks.gather(self.deadline - time.monotonic() > share * self.limit_s)[0])

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        name: for ``--only`` and ``--skip``.
        run: measures on this rank; all ranks call it. It raises :class:`NotApplicable`, or :class:`HardFailure`.
        decides: configuration key or setting that the result decides.
        seconds: limit, after which the check counts as hung.
        quick: belongs to the 15-minute order.
    """

    name: str
    run: Callable[[DoctorContext], list[Reading]]
    decides: str
    seconds: float
    quick: bool = False
