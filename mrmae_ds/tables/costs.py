"""What stands beside our numbers: the model's size, and what the training cost, by the runs' records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mrmae_ds.records.record import RunRecord
from mrmae_ds.records.sections import StageCost
from mrmae_ds.tables.write import Cell

NO_PRETRAINING = StageCost(device="", device_hours=0.0, operations=0.0)
T = TypeVar("T")


@dataclass(frozen=True)
class Facts:
    """One run's, or the mean over the runs of a cell; None is unknown.

    Attributes:
        parameters: of the fine-tuned model with its head (of several averaged models, together), in millions.
        forward: operations of the model on one image, in GFLOP.
        pretrain_epochs, tuning_epochs: that really ran.
        pretrain_work: operations of the pre-training, in PFLOP.
        pretrain_hours, tuning_hours: processes times hours.
        pretrain_speed, tuning_speed: images/s of the whole job.
        device: of the fine-tuning.
    """

    parameters: float
    forward: float | None
    pretrain_epochs: float | None
    tuning_epochs: float | None
    pretrain_work: float | None
    pretrain_hours: float | None
    pretrain_speed: float | None
    tuning_hours: float | None
    tuning_speed: float | None
    device: str

    @classmethod
    def of(cls, record: RunRecord) -> Facts:
        """Those of one run; of several averaged models the sum of what each cost."""
        tunings = record.finetunings
        before = _together(_pretraining(record, number) for number in range(len(tunings)))
        tuned = _together(tuning.spent if tuning else None for tuning in tunings)
        forwards = [tuning.forward if tuning else None for tuning in tunings]
        return cls(
            parameters=record.parameters.total / 1e6,
            forward=None if None in forwards else sum(f for f in forwards if f is not None) / 1e9,
            pretrain_epochs=record.pretrain_epochs,
            tuning_epochs=record.finetune_epochs,
            pretrain_work=None if before is None or before.operations is None else before.operations / 1e15,
            pretrain_hours=before.device_hours if before else None,
            pretrain_speed=before.images_per_s if before else None,
            tuning_hours=tuned.device_hours if tuned else None,
            tuning_speed=tuned.images_per_s if tuned else None,
            device=tuned.device if tuned else record.hardware.device,
        )


def cell_facts(cell: Cell) -> Facts:
    """The mean over the runs of a cell that runs fill."""
    facts = [Facts.of(record) for _, record in cell.runs]
    means = {
        name: _mean([getattr(one, name) for one in facts]) for name in Facts.__dataclass_fields__ if name != "device"
    }
    return Facts(**means, device=" and ".join(dict.fromkeys(one.device for one in facts)))  # type: ignore[arg-type]


def _pretraining(record: RunRecord, number: int) -> StageCost | None:
    tuning = record.finetunings[number]
    if tuning is None:
        return None
    if tuning.init is None:
        return NO_PRETRAINING
    return tuning.init.pretrain.spent if tuning.init.pretrain else None


def _together(parts: Iterable[StageCost | None]) -> StageCost | None:
    """The sum, None if a part is unknown."""
    total: StageCost | None = None
    for number, part in enumerate(parts):
        if part is None:
            return None
        total = part if number == 0 or total is None else total + part
    return total


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, without an exponent; "" for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    text = f"{rounded:,.10f}".rstrip("0").rstrip(".")
    return text if text not in ("0", "-0") else f"{rounded:g}"
