"""The engine config: DeepSpeed's JSON, parsed and checked before DeepSpeed reads it.

The global batch size belongs to the recipe, so ``gradient_accumulation_steps`` is derived. This project's own keys are
the section ``activation_checkpointing`` (``conv_stages``, ``transformer``, ``decoder``), ``compile``, and
torch's kernels (:mod:`mrmae_ds.config.kernels`). The rules on keys and their combinations are in
:mod:`mrmae_ds.config.engine_rules`, the ZeRO settings in :mod:`mrmae_ds.config.zero`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mrmae_ds.config.engine_rules import (
    CHECKPOINTING_KEYS,
    DEEPSPEED_ADAM_KEYS,
    check_compile,
    check_keys,
    check_precision,
    check_zero,
    zero_key_problem,
)
from mrmae_ds.config.files import json_text, nearest_key, read_json
from mrmae_ds.config.kernels import KERNEL_KEYS, KernelSettings, parse_kernels
from mrmae_ds.config.stages import PlacementConfig
from mrmae_ds.config.zero import ZeroSettings, offload_devices, parse_zero
from mrmae_ds.errors import UserError
from mrmae_ds.models.activation_checkpointing import CheckpointPlan

# NAME-zero1.json and NAME-offload.json are variants of NAME.json for the same recipe, NAME.yaml.
VARIANTS = ("-zero1", "-offload")
# Keys that hold for the engine of a linear classifier too.
_PROBE_KEYS = (
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "steps_per_print",
    *KERNEL_KEYS,
)


def default_recipe(ds_config: Path) -> Path:
    """Return the recipe beside an engine config: the one of the same name, without the suffix of a variant.

    Raises:
        UserError: if there is none, with a list of the recipes in the folder, or no such engine config.
    """
    variant = next((suffix for suffix in VARIANTS if ds_config.stem.endswith(suffix)), "")
    candidates = [ds_config.with_suffix(".yaml"), ds_config.with_name(f"{ds_config.stem.removesuffix(variant)}.yaml")]
    for path in candidates:
        if path.is_file():
            return path
    if not ds_config.is_file():
        read_json(ds_config)  # raises: the engine config itself is missing
    tried = " nor ".join(dict.fromkeys(path.name for path in candidates))
    present = sorted(path.name for path in ds_config.parent.glob("*.yaml"))
    choice = f"; there are {', '.join(present)}" if present else ""
    raise UserError(f"{ds_config}: no recipe {tried} beside it; name one with --recipe{choice}")


@dataclass(frozen=True)
class EngineConfig:
    """A checked engine config.

    Attributes:
        path: of the file.
        micro_batch: images per rank and micro-batch.
        declared_accumulation: ``gradient_accumulation_steps`` if the file states it.
        zero: ZeRO settings.
        model_dtype: of the parameters as modules see them: bfloat16 with ``bf16``, else float32.
        checkpointing: the blocks that recompute their activations.
        compile_blocks: ``torch.compile`` compiles each block of the model.
        compile_teachers: it compiles each block of the teachers.
        leaf_module_classes: ``zero_optimization.leaf_module.classes`` as written, with or without their modules.
        kernels: torch's kernels.
    """

    path: Path
    _raw: dict[str, Any]
    micro_batch: int
    declared_accumulation: int | None
    zero: ZeroSettings
    model_dtype: torch.dtype
    checkpointing: CheckpointPlan
    compile_blocks: bool = False
    compile_teachers: bool = False
    leaf_module_classes: tuple[str, ...] = ()
    kernels: KernelSettings = field(default_factory=KernelSettings)

    @property
    def offloads_optimizer(self) -> bool:
        """True if the optimizer's states and arithmetic are on the host."""
        return self.zero.offload_optimizer is not None

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context of ``torch_autocast`` for modules outside the engine."""
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.zero.autocast)

    def as_written(self) -> dict[str, Any]:
        """Return the file's content."""
        return copy.deepcopy(self._raw)

    def as_used(self, accumulation: int) -> dict[str, Any]:
        """Return the file's content with the accumulation filled in, for the run's record; an engine config again."""
        return {**self.as_written(), "gradient_accumulation_steps": accumulation}

    def defaults(self) -> dict[str, Any]:
        """Return the keys that the file leaves out, with the values that are used; both together are the same config.

        Left out are keys that have no effect at this ZeRO stage. The accumulation follows from the ranks of the job.
        """
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        zero = DeepSpeedZeroConfig(**self.as_written().get("zero_optimization", {}))
        # DeepSpeed's leaf modules are classes of language models.
        own = {"leaf_module": True, "offload_optimizer": set(DEEPSPEED_ADAM_KEYS)}
        resolved = {
            "gradient_accumulation_steps": "auto",
            **asdict(self.kernels),
            "bf16": {"enabled": self.zero.bf16},
            "torch_autocast": {"enabled": self.zero.autocast},
            "activation_checkpointing": asdict(self.checkpointing),
            "compile": {"blocks": self.compile_blocks, "teachers": self.compile_teachers},
            "zero_optimization": {
                key: value
                for key, value in zero.model_dump(mode="json", by_alias=True, exclude=own).items()
                if (key == "stage" or self.zero.stage > 0) and not zero_key_problem(key, self.zero.stage)
            },
        }
        return _without(resolved, self._raw)

    def for_deepspeed(self, accumulation: int) -> dict[str, Any]:
        """Return the dictionary for DeepSpeed: this project's own keys removed, the accumulation filled in."""
        own = ("activation_checkpointing", "compile", *KERNEL_KEYS)
        config = {key: value for key, value in self.as_used(accumulation).items() if key not in own}
        if self.offloads_optimizer:
            # DeepSpeed's default is its own CPU Adam, which needs a compiler; torch's fused AdamW does the same.
            config["zero_force_ds_cpu_optimizer"] = False
        # DeepSpeed's own step prints would break the progress bar; the loop logs instead.
        config.setdefault("steps_per_print", 2**31 - 1)
        return config

    def with_clipping(self, clip_grad: float | None) -> EngineConfig:
        """Return the engine config with the recipe's clipping of gradients; None leaves it as it is.

        Raises:
            UserError: if the file states another norm.
        """
        stated = self._raw["gradient_clipping"]
        if clip_grad is None or stated == clip_grad:
            return self
        if stated:
            raise UserError(
                f"{self.path}: gradient_clipping {stated:g} contradicts the recipe's optimizer.clip_grad "
                f"{clip_grad:g}; write 0.0, which takes the recipe's"
            )
        return replace(self, _raw=self._raw | {"gradient_clipping": clip_grad})

    def for_probe(self) -> EngineConfig:
        """Return the engine config of a linear classifier: the same micro-batch, ZeRO stage 0, float32."""
        raw = {key: self._raw[key] for key in _PROBE_KEYS if key in self._raw} | {"zero_optimization": {"stage": 0}}
        return replace(
            self,
            _raw=raw,
            zero=parse_zero(self.path, raw),
            model_dtype=torch.float32,
            checkpointing=CheckpointPlan(),
            leaf_module_classes=(),
        )


def load_engine_config(path: Path) -> EngineConfig:
    """Read and check an engine config.

    Raises:
        UserError: naming the file and the key.
    """
    if path.suffix in (".yaml", ".yml"):
        raise UserError(
            f"{path}: a YAML file, and an engine config is JSON: give ds_configs/NAME.json to --ds_config, a recipe to "
            "--recipe"
        )
    raw = read_json(path)
    check_keys(path, raw)
    if "gradient_clipping" not in raw:
        raise UserError(
            f"{path}: gradient_clipping is required: left out, DeepSpeed clips at 1.0; write 0.0 for no clipping"
        )
    clipping = raw["gradient_clipping"]
    if isinstance(clipping, bool) or not isinstance(clipping, int | float) or clipping < 0:
        raise UserError(f"{path}: gradient_clipping must be a number of at least 0, got {json_text(clipping)}")
    check_precision(path, raw)
    check_zero(path, raw)
    micro_batch = _positive_int(path, raw, "train_micro_batch_size_per_gpu")
    if micro_batch is None:
        raise UserError(f"{path}: train_micro_batch_size_per_gpu is required: images per rank and micro-batch")
    compiled = check_compile(path, raw)
    zero = parse_zero(path, raw)
    return EngineConfig(
        path=path,
        _raw=raw,
        micro_batch=micro_batch,
        declared_accumulation=_positive_int(path, raw, "gradient_accumulation_steps"),
        zero=zero,
        model_dtype=torch.bfloat16 if zero.bf16 else torch.float32,
        checkpointing=_checkpoint_plan(path, raw.get("activation_checkpointing", {})),
        compile_blocks=compiled["blocks"],
        compile_teachers=compiled["teachers"],
        leaf_module_classes=tuple(raw.get("zero_optimization", {}).get("leaf_module", {}).get("classes", ())),
        kernels=parse_kernels(path, raw),
    )


def validate_sections(config: EngineConfig) -> None:
    """Validate the nested sections with DeepSpeed's own models and check offload targets, before any process group.

    Raises:
        UserError: with the file, the key and DeepSpeed's message; for an offload folder that is not writable, or if
            DeepSpeed's asynchronous I/O cannot be built.
    """
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    for name, model in {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config}.items():
        try:
            model(**config.as_written().get(name, {}))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            written = [field.alias or known for known, field in model.model_fields.items()]
            near = nearest_key(key, written) if first["type"] == "extra_forbidden" else ""
            raise UserError(f"{config.path}: {name}.{key}: {first['msg']}{near}") from None
    raw = config.as_written()
    for key, device in offload_devices(raw).items():
        if device == "nvme":
            _check_nvme(f"{config.path}: zero_optimization.{key}", raw["zero_optimization"][key]["nvme_path"])


def _check_nvme(where: str, folder: str) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not Path(folder).is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{where}.nvme_path: {folder} is not a folder that can be written to on this node")
    if not AsyncIOBuilder().is_compatible():
        raise UserError(
            f"{where}.device: nvme needs the library libaio and its headers (Debian: apt install libaio-dev); without "
            "them use cpu"
        )


def check_ranks(config: EngineConfig, world_size: int, local_size: int) -> None:
    """Check the file's groups of ranks against the ranks of the job.

    Args:
        config: the engine config.
        world_size: number of ranks.
        local_size: number of ranks of a node.

    Raises:
        UserError: if ``zero_hpz_partition_size`` does not divide them.
    """
    size = config.zero.hpz
    if size > 1 and (world_size % size or local_size % size):
        raise UserError(
            f"{config.path}: zero_optimization.zero_hpz_partition_size {size} must divide the {world_size} ranks "
            f"and the {local_size} of a node, which it is usually set to; set it to {local_size}, or leave it out"
        )


def check_paired(config: EngineConfig, pairs: bool) -> None:
    """Check that the micro-batch is even if mixup or cutmix pairs its images.

    Args:
        config: the engine config.
        pairs: ``FinetuneConfig.pairs``.

    Raises:
        UserError: for an odd micro-batch.
    """
    if pairs and config.micro_batch % 2:
        raise UserError(
            f"{config.path}: mixup pairs the images of a micro-batch, and so does cutmix, so "
            f"train_micro_batch_size_per_gpu must be even, not {config.micro_batch}"
        )


def check_compiled_teachers(config: EngineConfig, placements: Mapping[str, PlacementConfig]) -> None:
    """Check that the weights of compiled teachers stay where they are.

    Args:
        config: the engine config.
        placements: of the teachers' weights, by the teachers' names.

    Raises:
        UserError: for ``compile.teachers`` with a placement that moves or gathers weights, which a graph does not see.
    """
    for name, placement in placements.items():
        if config.compile_teachers and placement.kind != "device":
            raise UserError(
                f"{config.path}: compile.teachers needs stages.pretrain.placement: device, and that of {name} is "
                f"{placement}; change the placement, or leave compile.teachers out"
            )


def accumulation_steps(config: EngineConfig, batch_size: int, world_size: int, recipe: str) -> int:
    """Return the micro-batches per rank and optimizer step: batch_size / (micro-batch * ranks).

    Args:
        config: the engine config.
        batch_size: images per optimizer step, of the recipe.
        world_size: number of ranks.
        recipe: the recipe's path, for messages.

    Raises:
        UserError: if it does not divide (naming the nearest values that do), or if the engine config states an
            accumulation for another number of ranks.
    """
    micro_batch = config.micro_batch
    images_per_pass = micro_batch * world_size
    if batch_size % images_per_pass:
        below = batch_size // images_per_pass * images_per_pass
        batches = [str(size) for size in (below, below + images_per_pass) if size > 0]
        per_rank, uneven = divmod(batch_size, world_size)
        divisors = [] if uneven else [d for d in range(1, per_rank + 1) if per_rank % d == 0]
        nearest = sorted(sorted(divisors, key=lambda d: abs(d - micro_batch))[:2])
        fix = f"batch_size {' or '.join(batches)} in {recipe}"
        if nearest:
            fix += f", or train_micro_batch_size_per_gpu {' or '.join(map(str, nearest))} in {config.path}"
        raise UserError(
            f"batch_size {batch_size} is not a multiple of {images_per_pass} = micro-batch {micro_batch} x "
            f"{world_size} ranks; the nearest that fit: {fix}"
        )
    accumulation = batch_size // images_per_pass
    declared = config.declared_accumulation
    if declared is not None and declared != accumulation:
        intended_ranks = batch_size / (micro_batch * declared)
        shown = f"{intended_ranks:.0f} ranks" if intended_ranks == int(intended_ranks) else "no whole number of ranks"
        raise UserError(
            f"{config.path}: micro-batch {micro_batch} x gradient_accumulation_steps {declared} for batch_size "
            f"{batch_size} is meant for {shown}, but {world_size} are running; start that many, or leave "
            f"gradient_accumulation_steps out and it becomes {accumulation}"
        )
    return accumulation


def _without(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the values whose keys are not given, in nested sections too."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(given.get(key), dict):
            if below := _without(value, given[key]):
                kept[key] = below
        elif key not in given:
            kept[key] = value
    return kept


def _positive_int(path: Path, raw: dict[str, Any], key: str) -> int | None:
    value = raw.get(key, "auto")
    if value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{path}: {key} must be a whole number above 0, got {json_text(value)}")
    return value


def _checkpoint_plan(path: Path, section: dict[str, Any]) -> CheckpointPlan:
    plan = CheckpointPlan()
    for key in CHECKPOINTING_KEYS:
        value = section.get(key, "none")
        every = {"none": 0, "all": 1}.get(value, value) if isinstance(value, str) else value
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise UserError(
                f'{path}: activation_checkpointing.{key} must be "all", "none" or n for every n-th block, got '
                f"{json_text(value)}"
            )
        setattr(plan, key, every)
    return plan
