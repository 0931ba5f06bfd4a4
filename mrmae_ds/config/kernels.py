"""Torch's kernels in an engine config: keys of this project at the top level, which DeepSpeed never sees."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from mrmae_ds.config.files import json_text
from mrmae_ds.errors import UserError

AttentionBackend = Literal["flash", "efficient", "cudnn", "math", "auto"]
MatmulPrecision = Literal["highest", "high", "medium"]


@dataclass(frozen=True)
class KernelSettings:
    """Choice of kernels; all but `deterministic` have an effect on CUDA devices alone.

    Attributes:
        attention_backend: preferred kernel of scaled dot-product attention; ``auto`` leaves the choice to torch.
        deterministic: the same inputs give the same bits in every run; an operation that cannot is an error.
        float32_matmul_precision: of products and convolutions of float32 tensors; below ``highest`` they use TF32.
    """

    attention_backend: AttentionBackend = "flash"
    deterministic: bool = False
    float32_matmul_precision: MatmulPrecision = "highest"


KERNEL_KEYS = tuple(field.name for field in fields(KernelSettings))
_CHOICES = {"attention_backend": get_args(AttentionBackend), "float32_matmul_precision": get_args(MatmulPrecision)}


def parse_kernels(path: Path, raw: dict[str, Any]) -> KernelSettings:
    """Parse the settings.

    Args:
        path: of the file, for messages.
        raw: its content.

    Raises:
        UserError: for a value that is not one of the choices.
    """
    given = {key: raw[key] for key in KERNEL_KEYS if key in raw}
    for key, value in given.items():
        if key == "deterministic" and not isinstance(value, bool):
            raise UserError(f"{path}: {key} must be true or false, got {json_text(value)}")
        if key in _CHOICES and value not in _CHOICES[key]:
            raise UserError(f"{path}: {key} must be one of {', '.join(_CHOICES[key])}, got {json_text(value)}")
    return KernelSettings(**given)
