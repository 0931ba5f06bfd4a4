"""The engine config: DeepSpeed's JSON, checked before DeepSpeed sees it.

DeepSpeed ignores unknown top-level keys, and its default for ``gradient_clipping`` silently became 1.0 in 0.19.3;
both are errors here. The global batch belongs to the recipe, so ``gradient_accumulation_steps`` is derived. The
section ``activation_checkpointing`` also takes our keys ``conv_stages``, ``transformer`` and ``decoder``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mrmae_ds.config_files import nearest_key, read_json
from mrmae_ds.errors import UserError
from mrmae_ds.models.checkpointing import CheckpointPlan

# What DeepSpeed 0.19.8 reads at the top level and makes sense for this project. The optimiser and the schedule are
# the recipe's, the global batch too.
KNOWN_KEYS = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "bf16",
        "checkpoint",
        "comms_logger",
        "communication_data_type",
        "compile",
        "data_types",
        "disable_allgather",
        "dump_state",
        "flops_profiler",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "gradient_predivide_factor",
        "memory_breakdown",
        "prescale_gradients",
        "steps_per_print",
        "timers",
        "torch_autocast",
        "train_micro_batch_size_per_gpu",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
RECIPE_KEYS = {
    "train_batch_size": "the recipe's stages.STAGE.batch_size",
    "optimizer": "the recipe's stages.STAGE.optimizer",
    "scheduler": "the recipe's stages.STAGE.optimizer",
    "fp16": "torch_autocast with bfloat16 (fp16 is not supported)",
}
CHECKPOINTING_KEYS = ("conv_stages", "transformer", "decoder")
SECTION_KEYS = {
    "activation_checkpointing": (
        *CHECKPOINTING_KEYS,
        "partition_activations",
        "cpu_checkpointing",
        "contiguous_memory_optimization",
        "number_checkpoints",
        "synchronize_checkpoint_boundary",
        "profile",
    ),
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
}


@dataclass(frozen=True)
class EngineConfig:
    """A checked engine config.

    Attributes:
        path: where it was read.
        raw: the JSON as written.
        micro_batch: pictures a process takes at a time.
        declared_accumulation: ``gradient_accumulation_steps`` if the file states it.
        zero_stage: 0 to 3.
        model_dtype: of the parameters that the modules see: bfloat16 with ``bf16``, else float32.
        checkpointing: which blocks recompute their activations.
    """

    path: Path
    raw: dict[str, Any]
    micro_batch: int
    declared_accumulation: int | None
    zero_stage: int
    model_dtype: torch.dtype
    checkpointing: CheckpointPlan

    def for_deepspeed(self, accumulation: int) -> dict[str, Any]:
        """The dictionary that DeepSpeed gets: our own keys removed, the accumulation filled in."""
        config = {**self.raw, "gradient_accumulation_steps": accumulation}
        section = config.get("activation_checkpointing", {})
        rest = {key: value for key, value in section.items() if key not in CHECKPOINTING_KEYS}
        config.pop("activation_checkpointing", None)
        if rest:
            config["activation_checkpointing"] = rest
        # DeepSpeed's own step prints would break the progress bar; the loop logs instead.
        config.setdefault("steps_per_print", 2**31 - 1)
        return config


def load_engine_config(path: Path) -> EngineConfig:
    """Read and check an engine config.

    Raises:
        UserError: naming the file and the key.
    """
    raw = read_json(path)
    for key in raw:
        if key in RECIPE_KEYS:
            raise UserError(f"{path}: {key} does not belong here; it is {RECIPE_KEYS[key]}")
        if key not in KNOWN_KEYS:
            raise UserError(f"{path}: {key}: unknown key{nearest_key(key, KNOWN_KEYS)}")
    if "gradient_clipping" not in raw:
        raise UserError(
            f"{path}: gradient_clipping is required: left out, DeepSpeed clips at 1.0; write 0.0 for no clipping"
        )
    clipping = raw["gradient_clipping"]
    if isinstance(clipping, bool) or not isinstance(clipping, int | float) or clipping < 0:
        raise UserError(f"{path}: gradient_clipping must be a number of at least 0, got {clipping!r}")
    _check_sections(path, raw)
    micro = _positive_int(path, raw, "train_micro_batch_size_per_gpu")
    if micro is None:
        raise UserError(f"{path}: train_micro_batch_size_per_gpu is required: pictures a process takes at a time")
    zero = raw.get("zero_optimization", {})
    if type(zero.get("stage", 0)) is not int or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3")
    return EngineConfig(
        path=path,
        raw=raw,
        micro_batch=micro,
        declared_accumulation=_positive_int(path, raw, "gradient_accumulation_steps"),
        zero_stage=zero.get("stage", 0),
        model_dtype=torch.bfloat16 if raw.get("bf16", {}).get("enabled") else torch.float32,
        checkpointing=_checkpoint_plan(path, raw.get("activation_checkpointing", {})),
    )


def validate_sections(config: EngineConfig) -> None:
    """Let DeepSpeed's own models judge the nested sections, before any process group exists.

    Raises:
        UserError: with the file, the key and DeepSpeed's message.
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


def accumulation_steps(config: EngineConfig, batch_size: int, world_size: int, recipe: str) -> int:
    """Micro-batches a process runs for one optimiser step: batch_size / (micro-batch * processes).

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


def _check_sections(path: Path, raw: dict[str, Any]) -> None:
    """Sections are objects, and those that DeepSpeed reads without a look have no unknown key."""
    for name in ("zero_optimization", "bf16", "data_types", *SECTION_KEYS):
        section = raw.get(name, {})
        if not isinstance(section, dict):
            raise UserError(f"{path}: {name} must be a section of keys and values, got {section!r}")
        for key in section:
            if name in SECTION_KEYS and key not in SECTION_KEYS[name]:
                raise UserError(f"{path}: {name}.{key}: unknown key{nearest_key(key, SECTION_KEYS[name])}")


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
