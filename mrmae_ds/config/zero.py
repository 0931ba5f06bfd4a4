"""ZeRO settings of an engine config, parsed once.

Defaults and rules are those of DeepSpeed 0.19.8; comments name its files.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from mrmae_ds.config.files import json_text
from mrmae_ds.errors import UserError

FP32, BF16 = 4, 2
FLOAT32, BFLOAT16 = ("fp32", "float32", "float"), ("bf16", "bfloat16")
# docs/engine_configs.md
PROJECT_LEAVES, PROJECT_REUSE = ("Block", "ConvBlock"), 3_000_000_000
# runtime/torch_autocast.py: exactly these classes, not their subclasses.
LOW_PRECISION: tuple[type, ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Fields of ZeroSettings that are whole numbers of the section zero_optimization.
_COUNTS = {
    "reduce_bucket": "reduce_bucket_size",
    "prefetch_bucket": "stage3_prefetch_bucket_size",
    "max_live": "stage3_max_live_parameters",
    "max_reuse": "stage3_max_reuse_distance",
    "sub_group": "sub_group_size",
    "allgather_bucket": "allgather_bucket_size",
    "hpz": "zero_hpz_partition_size",
    "persistence": "stage3_param_persistence_threshold",
}


@dataclass(frozen=True)
class ZeroSettings:
    """Settings of ZeRO and of precision that affect memory and traffic; defaults are those of runtime/zero/config.py.

    Attributes:
        stage: 0 to 3.
        autocast: parameters are float32, and those of some modules are communicated in bf16.
        bf16: parameters and gradients are bf16, with float32 masters.
        accumulation_bytes: of an element of accumulated gradients.
        reduced_bytes: of an element of communicated gradients; None is the parameters' type.
        reduce_bucket: elements.
        prefetch_bucket: elements.
        max_live: elements.
        max_reuse: elements.
        sub_group: elements.
        allgather_bucket: elements.
        overlap: communication overlaps computation.
        contiguous: gradients are copied into buckets.
        hpz: ranks over which a second copy of the parameters is partitioned; 1 is none.
        persistence: elements up to which ZeRO-3 leaves a parameter gathered.
        offload_optimizer: location of the optimizer states between uses, ``cpu`` or ``nvme``; None is the device.
        offload_param: location of the parameters between uses, ``cpu`` or ``nvme``; None is the device.
        leaves: names of classes that are gathered whole, as classes derived from them are.
        low_precision: classes whose parameters are communicated in bf16 under autocast.
    """

    stage: int
    autocast: bool
    bf16: bool
    accumulation_bytes: int = FP32
    reduced_bytes: int | None = None
    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    allgather_bucket: int = 500_000_000
    overlap: bool = False
    contiguous: bool = True
    hpz: int = 1
    persistence: int = 100_000
    offload_optimizer: str | None = None
    offload_param: str | None = None
    leaves: tuple[str, ...] = ()
    low_precision: tuple[type, ...] = LOW_PRECISION

    def at_stage(self, stage: int) -> ZeroSettings:
        """Return these settings at another stage with nothing offloaded, the rest as in this project's configs."""
        if stage == self.stage and not (self.offload_optimizer or self.offload_param or self.hpz > 1):
            return self
        settings = replace(self, stage=stage, overlap=stage > 0, offload_optimizer=None, offload_param=None, hpz=1)
        if stage == 3:
            return replace(settings, leaves=PROJECT_LEAVES, max_reuse=PROJECT_REUSE, max_live=PROJECT_REUSE)
        # bf16 needs float32 masters, which stage 0 does not have.
        return replace(settings, bf16=False, autocast=True) if stage == 0 and self.bf16 else settings

    @property
    def param_bytes(self) -> int:
        """Bytes of an element of a parameter as modules see it."""
        return BF16 if self.bf16 else FP32

    def gradient_types(self, trainable: int, low: int) -> dict[int, int]:
        """Return the number of trainable elements by the bytes that an element's gradient has when communicated.

        Args:
            trainable: elements of trainable parameters.
            low: those of them in modules of ``low_precision``.
        """
        if not self.autocast:
            return {self.reduced_bytes or self.param_bytes: trainable}
        return {size: elements for size, elements in {BF16: low, FP32: trainable - low}.items() if elements}

    def travel_bytes(self, elements: int, low: int) -> int:
        """Return the bytes of communicated parameters.

        Args:
            elements: of the parameters.
            low: those of them in modules of ``low_precision``.
        """
        if not self.autocast:
            return self.param_bytes * elements
        return BF16 * low + FP32 * (elements - low)

    def travels_low(self, module: nn.Module) -> bool:
        """Return True if a module's own parameters are communicated in bf16 under autocast."""
        return self.autocast and type(module) in self.low_precision

    def is_leaf(self, module: nn.Module) -> bool:
        """Return True if ZeRO-3 gathers a module whole."""
        return any(kind.__name__ in self.leaves for kind in type(module).__mro__)


def parse_zero(path: Path, raw: dict[str, Any]) -> ZeroSettings:
    """Parse the settings of an engine config whose keys and combinations are checked already.

    Args:
        path: of the file, for messages.
        raw: its content.

    Raises:
        UserError: for a size that is not a whole number, or a class that does not exist.
    """
    zero: dict[str, Any] = raw.get("zero_optimization", {})
    autocast: dict[str, Any] = raw.get("torch_autocast", {})
    stage, overlap = zero.get("stage", 0), zero.get("overlap_comm")
    given: dict[str, Any] = {name: _whole(path, key, zero[key]) for name, key in _COUNTS.items() if key in zero}
    given |= offload_devices(raw)
    if modules := autocast.get("lower_precision_safe_modules"):
        given["low_precision"] = tuple(_class(path, name) for name in modules)
    reduced = raw.get("communication_data_type")
    return ZeroSettings(
        stage=stage,
        autocast=bool(autocast.get("enabled")),
        bf16=bool(raw.get("bf16", {}).get("enabled")),
        accumulation_bytes=_bytes(raw.get("data_types", {}).get("grad_accum_dtype", "fp32")),
        reduced_bytes=None if reduced is None else _bytes(reduced),
        overlap=stage == 3 if overlap is None else bool(overlap),
        contiguous=bool(zero.get("contiguous_gradients", True)),
        leaves=tuple(name.rpartition(".")[2] for name in zero.get("leaf_module", {}).get("classes", ())),
        **given,
    )


def check_averages(path: Path, zero: ZeroSettings, names: Collection[str]) -> None:
    """Check that moving averages of parameters are updated wherever the engine keeps a copy of them.

    Args:
        path: of the engine config, for messages.
        zero: its settings.
        names: of the teachers that are moving averages.

    Raises:
        UserError: naming the key with which an average would silently stay behind.
    """
    problems = {
        "bf16": zero.bf16 and "rounds most of its updates away; use torch_autocast",
        "zero_optimization.stage3_param_persistence_threshold": zero.stage == 3
        and zero.persistence > 0
        and f"{zero.persistence} leaves small parameters gathered, which its updates do not reach; write 0",
        "zero_optimization.zero_hpz_partition_size": zero.hpz > 1
        and "keeps second copies of parameters, which its updates do not reach; leave it out",
        "zero_optimization.offload_param": zero.offload_param == "nvme"
        and "keeps parameters in files, which its updates do not reach; use cpu",
    }
    for key, problem in problems.items():
        if names and problem:
            raise UserError(f"{path}: teachers.{min(names)} is a moving average: {key} {problem}")


def offload_devices(raw: dict[str, Any]) -> dict[str, str]:
    """Return the device of ``offload_optimizer`` and ``offload_param``, ``cpu`` or ``nvme``, where they are enabled."""
    zero = raw.get("zero_optimization", {})
    devices = {key: (zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    return {key: device for key, device in devices.items() if device != "none"}


def _whole(path: Path, key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise UserError(f"{path}: zero_optimization.{key} must be a whole number, got {json_text(value)}")
    return int(value)


def _bytes(kind: str) -> int:
    return FP32 if kind in FLOAT32 else BF16


def _class(path: Path, name: str) -> type:
    module, _, kind = name.rpartition(".")
    try:
        module_class: type = getattr(import_module(module), kind)
    except (ImportError, AttributeError, ValueError):
        raise UserError(f"{path}: torch_autocast.lower_precision_safe_modules: there is no class {name}") from None
    return module_class
