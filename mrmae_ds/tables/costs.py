"""Table columns derived from run records: model size and training cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from mrmae_ds.records.record import RunRecord
from mrmae_ds.records.sections import StageCost
from mrmae_ds.tables.base import Cell

_NO_PRETRAINING = StageCost(device="", device_hours=0.0, operations=0.0)


@dataclass(frozen=True)
class Costs:
    """Costs of one run, or the mean over the runs of a cell; None is unknown.

    Attributes:
        parameters_m: of the fine-tuned model with its head (of averaged models, together), in millions.
        gflop_per_image: operations of the model's forward pass on one image, in GFLOP.
        pretrain_pflop: operations of the pre-training, in PFLOP.
        pretrain_gpu_hours: ranks times hours.
        pretrain_images_per_s: throughput of the whole job.
        finetune_gpu_hours: ranks times hours.
        finetune_images_per_s: throughput of the whole job.
        device: of the fine-tuning.
    """

    parameters_m: float
    gflop_per_image: float | None
    pretrain_pflop: float | None
    pretrain_gpu_hours: float | None
    pretrain_images_per_s: float | None
    finetune_gpu_hours: float | None
    finetune_images_per_s: float | None
    device: str

    def numbers(self) -> dict[str, float | None]:
        """All but the device, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "device"}


def run_costs(record: RunRecord) -> Costs:
    """Return the costs of one run; for averaged models, the sum over them."""
    finetunings = record.finetunings
    before = _total(_pretraining_cost(record, number) for number in range(len(finetunings)))
    tuned = _total(tuning.spent if tuning else None for tuning in finetunings)
    forwards = [tuning.forward if tuning else None for tuning in finetunings]
    return Costs(
        parameters_m=record.parameters.total / 1e6,
        gflop_per_image=None if None in forwards else sum(f for f in forwards if f is not None) / 1e9,
        pretrain_pflop=None if before is None or before.operations is None else before.operations / 1e15,
        pretrain_gpu_hours=before.device_hours if before else None,
        pretrain_images_per_s=before.images_per_s if before else None,
        finetune_gpu_hours=tuned.device_hours if tuned else None,
        finetune_images_per_s=tuned.images_per_s if tuned else None,
        device=tuned.device if tuned else record.hardware.device,
    )


def cell_costs(cell: Cell) -> Costs:
    """Return the mean over the runs of a measured cell; unknown where one run's is."""
    costs = [run_costs(record) for _, record in cell.runs]
    means = {name: _mean([one.numbers()[name] for one in costs]) for name in costs[0].numbers()}
    return Costs(**means, device=" and ".join(dict.fromkeys(one.device for one in costs)))  # type: ignore[arg-type]


def _pretraining_cost(record: RunRecord, number: int) -> StageCost | None:
    tuning = record.finetunings[number]
    if tuning is None:
        return None
    if tuning.init is None:
        return _NO_PRETRAINING
    return tuning.init.pretrain.spent if tuning.init.pretrain else None


def _total(costs: Iterable[StageCost | None]) -> StageCost | None:
    """Return the sum, None if one is unknown."""
    total: StageCost | None = None
    for cost in costs:
        if cost is None:
            return None
        total = cost if total is None else total + cost
    return total


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None
