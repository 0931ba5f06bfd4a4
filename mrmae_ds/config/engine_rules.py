"""Rules of engine configs: known keys, and combinations that would be ignored, fail late or change results silently.

DeepSpeed ignores unknown keys at the top level, and at every level keys of features that this project does not use.
Here each is an error that names the key and the fix. Nothing here imports DeepSpeed;
:func:`mrmae_ds.config.engine.validate_sections` validates with DeepSpeed's own models.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from mrmae_ds.config.files import json_text, nearest_key
from mrmae_ds.config.kernels import KERNEL_KEYS
from mrmae_ds.config.zero import BFLOAT16, FLOAT32, offload_devices
from mrmae_ds.errors import UserError

# Top-level keys of DeepSpeed 0.19.8 that have an effect here. Optimizer, schedule and global batch are the recipe's.
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
        "dump_state",
        "flops_profiler",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "memory_breakdown",
        "steps_per_print",
        "timers",
        "torch_autocast",
        "train_micro_batch_size_per_gpu",
        "wall_clock_breakdown",
        "zero_optimization",
        *KERNEL_KEYS,
    }
)
REFUSED_KEYS = {
    "train_batch_size": "does not belong here; it is the recipe's stages.STAGE.batch_size",
    "optimizer": "does not belong here; it is the recipe's stages.STAGE.optimizer",
    "scheduler": "does not belong here; it is the recipe's stages.STAGE.optimizer",
    "fp16": "does not belong here; it is torch_autocast with bfloat16 (fp16 is not supported)",
    "zero_force_ds_cpu_optimizer": "leave it out; it is set where the optimizer is offloaded",
    "zero_allow_untested_optimizer": "leave it out; AdamW needs no permission",
    "prescale_gradients": "leave it out; bfloat16 has float32's range, so gradients need no scaling",
    "gradient_predivide_factor": "leave it out; bfloat16 has float32's range, so gradients need no scaling",
    "disable_allgather": "leave it out; it has no effect in this version of DeepSpeed",
}
CHECKPOINTING_KEYS = ("conv_stages", "transformer", "decoder")
COMPILE_KEYS = ("blocks", "teachers")
AUTOCAST_KEYS = ("enabled", "dtype", "lower_precision_safe_modules")
BF16_KEYS = ("enabled", "immediate_grad_update", "check_grad_overflow")
DATA_TYPE_KEYS = ("grad_accum_dtype",)
# Keys of offload_optimizer that work with DeepSpeed's own Adam only.
DEEPSPEED_ADAM_KEYS = ("ratio", "super_offload", "cpuadam_cores_perc")

# Keys of DeepSpeed's own activation checkpointing. They have no effect, because torch checkpoints the blocks.
DEEPSPEED_CHECKPOINTING = (
    "partition_activations",
    "cpu_checkpointing",
    "contiguous_memory_optimization",
    "number_checkpoints",
    "synchronize_checkpoint_boundary",
    "profile",
)
_STAGE_3_KEYS = (
    "offload_param",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "leaf_module",
    "sub_group_size",
    "memory_efficient_linear",
    "log_trace_cache_warnings",
)
_STAGE_1_2_KEYS = ("allgather_bucket_size", "round_robin_gradients", "parameter_alignment", "compute_grad_norm")
_NOT_SUPPORTED = {
    "zenflow": "replaces AdamW's arithmetic; leave it out",
    "zero_quantized_weights": "gathers parameters in 8 bits, which changes results; leave it out",
    "zero_quantized_nontrainable_weights": "keeps frozen parameters in 8 bits, which changes results; leave it out",
    "zero_quantized_gradients": "reduces gradients in 4 bits, which changes results; leave it out",
    "legacy_stage1": "was removed from DeepSpeed; leave it out",
    "cpu_offload": "is an old name; write offload_optimizer",
    "cpu_offload_param": "is an old name; write offload_param",
    "cpu_offload_use_pin_memory": "is an old name; write pin_memory into the offload sections",
    "stage3_gather_fp16_weights_on_model_save": "has no effect: what is exported is float32; leave it out",
    "stage3_gather_16bit_weights_on_model_save": "has no effect: what is exported is float32; leave it out",
}


def check_keys(path: Path, raw: dict[str, Any]) -> None:
    """Check that every key of the top level and of this project's sections is known and has an effect.

    Raises:
        UserError: naming the file, the key and the nearest known one or the reason.
    """
    for key in raw:
        if key in REFUSED_KEYS:
            raise UserError(f"{path}: {key} {REFUSED_KEYS[key]}")
        _known(path, key, KNOWN_KEYS)
    sections = {
        "activation_checkpointing": CHECKPOINTING_KEYS,
        "compile": COMPILE_KEYS,
        "torch_autocast": AUTOCAST_KEYS,
        "bf16": BF16_KEYS,
        "data_types": DATA_TYPE_KEYS,
        "zero_optimization": None,
    }
    for name, known in sections.items():
        section = raw.get(name, {})
        if not isinstance(section, dict):
            raise UserError(f"{path}: {name} must be a section of keys and values, got {json_text(section)}")
        for key in section:
            if name == "activation_checkpointing" and key in DEEPSPEED_CHECKPOINTING:
                raise UserError(
                    f"{path}: {name}.{key} would have no effect: blocks are checkpointed by torch, not by DeepSpeed; "
                    f"leave it out, {', '.join(CHECKPOINTING_KEYS)} select the blocks"
                )
            if name == "compile" and key == "deepcompile":
                raise UserError(f"{path}: {name}.{key} is not supported; blocks: true compiles each block by torch")
            if known is not None:
                _known(path, key, known, f"{name}.")


def check_precision(path: Path, raw: dict[str, Any]) -> None:
    """Check that at most one kind of mixed precision is enabled, with a stated type of accumulated gradients.

    Raises:
        UserError: naming the key and the fix.
    """
    bf16, autocast = (raw.get(name, {}) for name in ("bf16", "torch_autocast"))
    for name, section in {"bf16": bf16, "torch_autocast": autocast}.items():
        if not isinstance(section.get("enabled", False), bool):
            raise UserError(f"{path}: {name}.enabled must be true or false, got {json_text(section['enabled'])}")
    accumulated = raw.get("data_types", {}).get("grad_accum_dtype")
    if autocast.get("enabled"):
        if bf16.get("enabled"):
            raise UserError(
                f"{path}: bf16 and torch_autocast are both enabled, and DeepSpeed would switch autocast off; keep "
                "torch_autocast (parameters stay float32) or bf16 (they are bfloat16, with float32 masters)"
            )
        if autocast.get("dtype") not in BFLOAT16:
            raise UserError(
                f'{path}: torch_autocast.dtype must be "bfloat16", got {json_text(autocast.get("dtype"))} (float16 '
                "is not supported)"
            )
        if "communication_data_type" in raw:
            raise UserError(
                f"{path}: communication_data_type would have no effect: with torch_autocast each gradient is "
                "communicated in the type that its layer computes in; leave it out"
            )
    if bf16.get("enabled"):
        if accumulated is None:
            raise UserError(
                f"{path}: data_types.grad_accum_dtype is required with bf16: left out, DeepSpeed accumulates gradients "
                'in bfloat16; write "data_types": {"grad_accum_dtype": "fp32"}'
            )
        if raw.get("zero_optimization", {}).get("stage", 0) == 0:
            raise UserError(
                f"{path}: bf16 needs zero_optimization.stage 1, 2 or 3, which keep the float32 masters; at stage 0 use "
                "torch_autocast"
            )
    elif accumulated is not None and accumulated not in FLOAT32:
        raise UserError(
            f"{path}: data_types.grad_accum_dtype {accumulated!r} needs bf16; without it gradients are float32"
        )


def check_zero(path: Path, raw: dict[str, Any]) -> None:
    """Check the ZeRO section: the stage, keys that have an effect at this stage, and supported offloading.

    Raises:
        UserError: naming the key and the fix.
    """
    zero = raw.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise UserError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, got {json_text(stage)}")
    for key in zero:
        if problem := zero_key_problem(key, stage):
            raise UserError(f"{path}: zero_optimization.{key} {problem}")
    if stage == 3 and zero.get("memory_efficient_linear") is not False:
        raise UserError(
            f"{path}: zero_optimization.memory_efficient_linear must be false: left out, DeepSpeed replaces "
            "torch.nn.functional.linear in the whole process, teachers included"
        )
    leaf_module = zero.get("leaf_module", {})
    if not isinstance(leaf_module, dict) or not isinstance(leaf_module.get("classes", []), list):
        raise UserError(
            f'{path}: zero_optimization.leaf_module must be a section {{"classes": [NAME, ...]}}, got '
            f"{json_text(leaf_module)}"
        )
    _check_offload(path, zero, stage)
    if "aio" in raw and "nvme" not in offload_devices(raw).values():
        raise UserError(f"{path}: aio has an effect only where something is offloaded to nvme; leave it out")


def zero_key_problem(key: str, stage: int) -> str:
    """Return the fault of a key of ``zero_optimization`` that is not supported or has no effect; "" if it has none."""
    if key in _NOT_SUPPORTED:
        return _NOT_SUPPORTED[key]
    if stage < 3 and (key in _STAGE_3_KEYS or key.startswith("stage3_")):
        return f"has an effect at stage 3 only, and the stage is {stage}; leave it out"
    if stage not in (1, 2) and key in _STAGE_1_2_KEYS:
        return f"has an effect at stages 1 and 2 only, and the stage is {stage}; leave it out"
    return ""


def check_compile(path: Path, raw: dict[str, Any]) -> dict[str, bool]:
    """Return the section ``compile``: whether the student's blocks are compiled, and the teachers'.

    Raises:
        UserError: for a value that is not boolean, and if hooks of ZeRO-3 inside the blocks would break every graph.
    """
    compiled = {key: raw.get("compile", {}).get(key, False) for key in COMPILE_KEYS}
    for key, value in compiled.items():
        if not isinstance(value, bool):
            raise UserError(f"{path}: compile.{key} must be true or false, got {json_text(value)}")
    zero = raw.get("zero_optimization", {})
    leaves = zero.get("leaf_module", {}).get("classes", [])
    if compiled["blocks"] and zero.get("stage", 0) == 3 and not {"Block", "ConvBlock"} <= set(leaves):
        raise UserError(
            f"{path}: compile.blocks at stage 3 needs whole blocks to be gathered at once; write "
            '"leaf_module": {"classes": ["Block", "ConvBlock"]} into zero_optimization'
        )
    return compiled


def _check_offload(path: Path, zero: dict[str, Any], stage: int) -> None:
    for key in ("offload_optimizer", "offload_param"):
        section = zero.get(key)
        where = f"{path}: zero_optimization.{key}"
        if section is None:
            continue
        if not isinstance(section, dict):
            raise UserError(f"{where} must be a section of keys and values, got {json_text(section)}")
        if stage == 0:
            raise UserError(f"{where} needs stage 1, 2 or 3, and the stage is 0")
        if section.get("device") == "nvme":
            if stage != 3:
                raise UserError(f"{where}.device nvme needs stage 3, and the stage is {stage}; use cpu")
            if not section.get("nvme_path"):
                raise UserError(f"{where}.nvme_path is required with nvme: a folder on the node's own disk")
        for name in DEEPSPEED_ADAM_KEYS:
            if name in section:
                raise UserError(f"{where}.{name} works with DeepSpeed's own Adam only, not with torch's; leave it out")


def _known(path: Path, key: str, known: Collection[str], prefix: str = "") -> None:
    if key not in known:
        raise UserError(f"{path}: {prefix}{key}: unknown key{nearest_key(key, known)}")
