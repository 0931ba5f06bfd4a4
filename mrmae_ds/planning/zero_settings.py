"""What an engine config makes of DeepSpeed's ZeRO: the settings that memory and traffic depend on.

Defaults and rules are those of DeepSpeed 0.19.8; its files are named where they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from mrmae_ds.config.engine import EngineConfig
from mrmae_ds.config.engine_rules import FLOAT32, offload_devices
from mrmae_ds.errors import UserError

FP32, BF16 = 4, 2
# ds_configs/README.md
PROJECT_LEAVES, PROJECT_REUSE = ("Block", "ConvBlock"), 3_000_000_000
# runtime/torch_autocast.py: exactly these classes, not what is derived from them.
LOW_PRECISION: tuple[type, ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class ZeroSettings:
    """The settings that memory and traffic depend on; defaults are DeepSpeed's (runtime/zero/config.py).

    Attributes:
        stage: 0 to 3.
        autocast: parameters are float32, and those of some modules travel in bf16.
        bf16: parameters and gradients are bf16, with float32 masters.
        accumulation_bytes: of an element of accumulated gradients.
        reduced_bytes: of an element of gradients on their way, if that is not the parameters' type.
        reduce_bucket, prefetch_bucket, max_live, max_reuse, sub_group, allgather_bucket: elements.
        overlap: communication overlaps computation. contiguous: gradients are copied into buckets.
        hpz: processes over which a second copy of the parameters is divided; 1 is none.
        offload_optimizer, offload_param: where the states and the parameters are when they are not used, ``cpu`` or
            ``nvme``; None is the device.
        leaves: names of classes that are gathered whole.
        low_precision: classes whose parameters travel in bf16 under autocast.
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
    offload_optimizer: str | None = None
    offload_param: str | None = None
    leaves: tuple[str, ...] = ()
    low_precision: tuple[type, ...] = LOW_PRECISION

    @classmethod
    def of(cls, config: EngineConfig) -> ZeroSettings:
        """Those of an engine config that :func:`~mrmae_ds.config.engine.load_engine_config` has checked."""
        zero: dict[str, Any] = config.raw.get("zero_optimization", {})
        stage, autocast = config.zero_stage, config.raw.get("torch_autocast", {})
        names = {
            "reduce_bucket": "reduce_bucket_size",
            "prefetch_bucket": "stage3_prefetch_bucket_size",
            "max_live": "stage3_max_live_parameters",
            "max_reuse": "stage3_max_reuse_distance",
            "sub_group": "sub_group_size",
            "allgather_bucket": "allgather_bucket_size",
            "hpz": "zero_hpz_partition_size",
        }
        given: dict[str, Any] = {name: int(zero[key]) for name, key in names.items() if key in zero}
        given |= offload_devices(config.raw)
        if modules := autocast.get("lower_precision_safe_modules"):
            given["low_precision"] = tuple(_class(config.path, name) for name in modules)
        accumulated = config.raw.get("data_types", {}).get("grad_accum_dtype", "fp32")
        reduced = config.raw.get("communication_data_type")
        bf16 = bool(config.raw.get("bf16", {}).get("enabled"))
        overlap = zero.get("overlap_comm")
        return cls(
            stage=stage,
            autocast=bool(autocast.get("enabled")),
            bf16=bf16,
            accumulation_bytes=_bytes(accumulated),
            reduced_bytes=None if reduced is None else _bytes(reduced),
            overlap=stage == 3 if overlap is None else bool(overlap),
            contiguous=bool(zero.get("contiguous_gradients", True)),
            leaves=tuple(name.rpartition(".")[2] for name in zero.get("leaf_module", {}).get("classes", ())),
            **given,
        )

    def at_stage(self, stage: int) -> ZeroSettings:
        """Another stage with nothing offloaded; the other settings as this project's engine configs have them."""
        if stage == self.stage and not (self.offload_optimizer or self.offload_param or self.hpz > 1):
            return self
        settings = replace(self, stage=stage, overlap=stage == 3, offload_optimizer=None, offload_param=None, hpz=1)
        if stage == 3:
            return replace(settings, leaves=PROJECT_LEAVES, max_reuse=PROJECT_REUSE, max_live=PROJECT_REUSE)
        # bf16 mode needs masters, which stage 0 does not have.
        return replace(settings, bf16=False, autocast=True) if stage == 0 and self.bf16 else settings

    @property
    def param_bytes(self) -> int:
        """Bytes of an element of a parameter as modules see it."""
        return BF16 if self.bf16 else FP32

    def gradient_types(self, trainable: int, low: int) -> dict[int, int]:
        """Trainable elements by the bytes that an element's gradient has on its way; arguments as below."""
        if not self.autocast:
            return {self.reduced_bytes or self.param_bytes: trainable}
        return {size: elements for size, elements in {BF16: low, FP32: trainable - low}.items() if elements}

    def travel_bytes(self, elements: int, low: int) -> int:
        """Bytes of parameters on their way, ``low`` of their ``elements`` in bf16 under autocast."""
        if not self.autocast:
            return self.param_bytes * elements
        return BF16 * low + FP32 * (elements - low)

    def travels_low(self, module: nn.Module) -> bool:
        """Whether a module's own parameters travel in bf16 under autocast."""
        return self.autocast and type(module) in self.low_precision

    def is_leaf(self, module: nn.Module) -> bool:
        """Whether ZeRO-3 gathers a module whole."""
        return type(module).__name__ in self.leaves


def _bytes(kind: str) -> int:
    return FP32 if kind in FLOAT32 else BF16


def _class(path: Path, name: str) -> type:
    module, _, kind = name.rpartition(".")
    try:
        found: type = getattr(import_module(module), kind)
    except (ImportError, AttributeError, ValueError):
        raise UserError(f"{path}: torch_autocast.lower_precision_safe_modules: there is no class {name}") from None
    return found
