"""The engine config: DeepSpeed's JSON, checked before DeepSpeed sees it (config/engine_rules.py says what for).

The global batch belongs to the recipe, so ``gradient_accumulation_steps`` is derived. Our own keys are the section
``activation_checkpointing`` (``conv_stages``, ``transformer``, ``decoder``) and ``compile.blocks``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mrmae_ds.config.engine_rules import (
    CHECKPOINTING_KEYS,
    check_compile,
    check_keys,
    check_precision,
    check_zero,
    offload_devices,
)
from mrmae_ds.config.files import nearest_key, read_json
from mrmae_ds.errors import UserError
from mrmae_ds.models.activation_checkpointing import CheckpointPlan

# NAME-zero1.json and NAME-offload.json run the recipe NAME.yaml in another way than NAME.json.
VARIANTS = ("-zero1", "-offload")


def default_recipe(ds_config: Path) -> Path:
    """The recipe beside an engine config: that of the same name, without the name of a variant.

    Raises:
        UserError: if there is none; it names the recipes that are there.
    """
    variant = next((suffix for suffix in VARIANTS if ds_config.stem.endswith(suffix)), "")
    candidates = [ds_config.with_suffix(".yaml"), ds_config.with_name(f"{ds_config.stem.removesuffix(variant)}.yaml")]
    for path in candidates:
        if path.is_file():
            return path
    tried = " nor ".join(dict.fromkeys(path.name for path in candidates))
    there = sorted(path.name for path in ds_config.parent.glob("*.yaml"))
    choice = f"; there are {', '.join(there)}" if there else ""
    raise UserError(f"{ds_config}: no recipe {tried} beside it; name one with --recipe{choice}")


@dataclass(frozen=True)
class EngineConfig:
    """A checked engine config.

    Attributes:
        path: where it was read.
        raw: the JSON as written.
        micro_batch: images a process takes at a time.
        declared_accumulation: ``gradient_accumulation_steps`` if the file states it.
        zero_stage: 0 to 3.
        model_dtype: of the parameters that the modules see: bfloat16 with ``bf16``, else float32.
        checkpointing: which blocks recompute their activations.
        compile_blocks: whether ``torch.compile`` compiles each block.
    """

    path: Path
    raw: dict[str, Any]
    micro_batch: int
    declared_accumulation: int | None
    zero_stage: int
    model_dtype: torch.dtype
    checkpointing: CheckpointPlan
    compile_blocks: bool = False

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's states and arithmetic are on the host."""
        return "offload_optimizer" in offload_devices(self.raw)

    def as_used(self, accumulation: int) -> dict[str, Any]:
        """What the run's record keeps: the file with the accumulation filled in, an engine config again."""
        return {**self.raw, "gradient_accumulation_steps": accumulation}

    def for_deepspeed(self, accumulation: int) -> dict[str, Any]:
        """The dictionary that DeepSpeed gets: our own sections removed, the accumulation filled in."""
        own = ("activation_checkpointing", "compile")
        config = {key: value for key, value in self.as_used(accumulation).items() if key not in own}
        if self.offloads_optimizer:
            # DeepSpeed would have its own CPU Adam, which a compiler must build; torch's fused one does the same.
            config["zero_force_ds_cpu_optimizer"] = False
        # DeepSpeed's own step prints would break the progress bar; the loop logs instead.
        config.setdefault("steps_per_print", 2**31 - 1)
        return config


def load_engine_config(path: Path) -> EngineConfig:
    """Read and check an engine config.

    Raises:
        UserError: naming the file and the key.
    """
    raw = read_json(path)
    check_keys(path, raw)
    if "gradient_clipping" not in raw:
        raise UserError(
            f"{path}: gradient_clipping is required: left out, DeepSpeed clips at 1.0; write 0.0 for no clipping"
        )
    clipping = raw["gradient_clipping"]
    if isinstance(clipping, bool) or not isinstance(clipping, int | float) or clipping < 0:
        raise UserError(f"{path}: gradient_clipping must be a number of at least 0, got {clipping!r}")
    check_precision(path, raw)
    check_zero(path, raw)
    micro = _positive_int(path, raw, "train_micro_batch_size_per_gpu")
    if micro is None:
        raise UserError(f"{path}: train_micro_batch_size_per_gpu is required: images a process takes at a time")
    return EngineConfig(
        path=path,
        raw=raw,
        micro_batch=micro,
        declared_accumulation=_positive_int(path, raw, "gradient_accumulation_steps"),
        zero_stage=raw.get("zero_optimization", {}).get("stage", 0),
        model_dtype=torch.bfloat16 if raw.get("bf16", {}).get("enabled") else torch.float32,
        checkpointing=_checkpoint_plan(path, raw.get("activation_checkpointing", {})),
        compile_blocks=check_compile(path, raw),
    )


def validate_sections(config: EngineConfig) -> None:
    """Let DeepSpeed's own models judge the nested sections, and see that it can offload, before any process group.

    Raises:
        UserError: with the file, the key and DeepSpeed's message; for a folder that cannot be offloaded to, or
            where DeepSpeed's asynchronous reads and writes cannot be built.
    """
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    for name, model in {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config}.items():
        try:
            model(**config.raw.get(name, {}))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            written = [field.alias or known for known, field in model.model_fields.items()]
            near = nearest_key(key, written) if first["type"] == "extra_forbidden" else ""
            raise UserError(f"{config.path}: {name}.{key}: {first['msg']}{near}") from None
    for key, device in offload_devices(config.raw).items():
        if device == "nvme":
            _check_nvme(f"{config.path}: zero_optimization.{key}", config.raw["zero_optimization"][key]["nvme_path"])


def _check_nvme(where: str, folder: str) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not Path(folder).is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{where}.nvme_path: {folder} is not a folder that can be written to on this node")
    if not AsyncIOBuilder().is_compatible():
        raise UserError(
            f"{where}.device: nvme needs the library libaio and its headers (Debian: apt install libaio-dev); without "
            "them use cpu"
        )


def check_processes(config: EngineConfig, world_size: int, local_size: int) -> None:
    """What the file says about groups of processes fits those that run.

    Args:
        config: the engine config.
        world_size: processes in all. local_size: processes of a node.

    Raises:
        UserError: if ``zero_hpz_partition_size`` does not divide them.
    """
    size = config.raw.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if size > 1 and (world_size % size or local_size % size):
        raise UserError(
            f"{config.path}: zero_optimization.zero_hpz_partition_size {size} must divide the {world_size} processes "
            f"and the {local_size} of a node, which it is usually set to; set it to {local_size}, or leave it out"
        )


def check_paired(config: EngineConfig, pairs: bool) -> None:
    """Raises UserError if the micro-batch is odd and mixup or cutmix pairs its images (``FinetuneConfig.pairs``)."""
    if pairs and config.micro_batch % 2:
        raise UserError(
            f"{config.path}: mixup pairs the images of a micro-batch, and so does cutmix, so "
            f"train_micro_batch_size_per_gpu must be even, not {config.micro_batch}"
        )


def accumulation_steps(config: EngineConfig, batch_size: int, world_size: int, recipe: str) -> int:
    """Micro-batches a process runs for one optimizer step: batch_size / (micro-batch * processes).

    Raises:
        UserError: if it does not divide (naming the nearest values that do), or if the engine config states an
            accumulation that is meant for another number of processes.
    """
    micro = config.micro_batch
    together = micro * world_size
    if batch_size % together:
        below = batch_size // together * together
        batches = [str(size) for size in (below, below + together) if size > 0]
        per_process, uneven = divmod(batch_size, world_size)
        divisors = [] if uneven else [d for d in range(1, per_process + 1) if per_process % d == 0]
        nearest = sorted(sorted(divisors, key=lambda d: abs(d - micro))[:2])
        mend = f"batch_size {' or '.join(batches)} in {recipe}"
        if nearest:
            mend += f", or train_micro_batch_size_per_gpu {' or '.join(map(str, nearest))} in {config.path}"
        raise UserError(
            f"batch_size {batch_size} is not a multiple of {together} = micro-batch {micro} x {world_size} "
            f"processes; the nearest that fit: {mend}"
        )
    accumulation = batch_size // together
    declared = config.declared_accumulation
    if declared is not None and declared != accumulation:
        meant = batch_size / (micro * declared)
        shown = f"{meant:.0f} processes" if meant == int(meant) else "no whole number of processes"
        raise UserError(
            f"{config.path}: micro-batch {micro} x gradient_accumulation_steps {declared} for batch_size {batch_size} "
            f"is meant for {shown}, but {world_size} are running; start that many, or leave "
            f"gradient_accumulation_steps out and it becomes {accumulation}"
        )
    return accumulation


def _positive_int(path: Path, raw: dict[str, Any], key: str) -> int | None:
    value = raw.get(key, "auto")
    if value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{path}: {key} must be a whole number above 0, got {value!r}")
    return value


def _checkpoint_plan(path: Path, section: dict[str, Any]) -> CheckpointPlan:
    plan = CheckpointPlan()
    for key in CHECKPOINTING_KEYS:
        value = section.get(key, "none")
        every = {"none": 0, "all": 1}.get(value, value) if isinstance(value, str) else value
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise UserError(
                f'{path}: activation_checkpointing.{key} must be "all", "none" or n for every n-th block, got {value!r}'
            )
        setattr(plan, key, every)
    return plan
