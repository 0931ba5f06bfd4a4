"""Constants of a node as measured on it: written by ``mrmae doctor``, read by ``mrmae plan --measured``."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError

from mrmae_ds.errors import UserError
from mrmae_ds.schema import Section

logger = logging.getLogger(__name__)

FORMAT = 1  # of the doctor's JSON file
# Section of the doctor's JSON file; its other sections are the doctor's own.
MEASURED_KEY = "measured"
# In ``operator_gb_s``: the optimizer's update, and what a rank does to reduce gradients.
ADAMW, GRADIENTS = "adamw", "gradients"


class MeasuredNode(Section):
    """Constants measured on a node; None is not measured, and the plan keeps its estimate.

    Attributes:
        device: name of the GPU as torch reports it, or of the CPU.
        launch_us: host time to launch a kernel, without PyTorch, in us.
        op_us: host time to issue an eager operator, forward or backward, in us: host time of a micro-batch without
            DeepSpeed over its operators.
        kernel_us: shortest kernel, from its start to the start of the next in a full queue, in us.
        matmul_tflops: bf16 matrix products at the models' shapes, in TFLOP/s.
        fp32_tflops: float32 matrix products at the models' shapes, in TFLOP/s.
        attention_tflops: bf16 attention, forward and backward, in TFLOP/s.
        memory_gb_s: device memory, reads and writes added, in GB/s.
        depthwise_gb_s: bytes of input, weight and output of a depthwise convolution over its time, in GB/s.
        operator_gb_s: bytes of the inputs and outputs of an operator over its time, in GB/s, by the operator's name;
            ``adamw`` is the optimizer's update, ``gradients`` the copies, scaling and norm of
            gradients.
        h2d_gb_s: from pinned host memory to the device, in GB/s.
        d2h_gb_s: from the device to pinned host memory, in GB/s.
        node_gb_s: bus bandwidth of a large all-reduce within a node, in GB/s per GPU.
        network_gb_s: bus bandwidth of a large all-reduce between nodes, in GB/s per GPU.
        collective_us: a small all-reduce within a node, in us.
        zero1_param_us: host time that ZeRO-1 adds per parameter and micro-batch, in us.
        zero3_first_param_us: host time that ZeRO-3 adds per parameter to a step's first micro-batch, which fetches it,
            and for its release, in us.
        zero3_param_us: host time that ZeRO-3 adds per parameter to a micro-batch that finds it gathered, in us.
        update_param_us: host time per parameter and optimizer step outside the micro-batches, in us.
        loader_images_per_s_per_core: images that the loader decodes on one core, in images/s.
        loader_cores: cores of a rank that decode; a median over ranks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    device: str | None = None
    launch_us: float | None = Field(None, gt=0)
    op_us: float | None = Field(None, gt=0)
    kernel_us: float | None = Field(None, gt=0)
    matmul_tflops: float | None = Field(None, gt=0)
    fp32_tflops: float | None = Field(None, gt=0)
    attention_tflops: float | None = Field(None, gt=0)
    memory_gb_s: float | None = Field(None, gt=0)
    depthwise_gb_s: float | None = Field(None, gt=0)
    operator_gb_s: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    h2d_gb_s: float | None = Field(None, gt=0)
    d2h_gb_s: float | None = Field(None, gt=0)
    node_gb_s: float | None = Field(None, gt=0)
    network_gb_s: float | None = Field(None, gt=0)
    collective_us: float | None = Field(None, gt=0)
    zero1_param_us: float | None = Field(None, ge=0)
    zero3_first_param_us: float | None = Field(None, ge=0)
    zero3_param_us: float | None = Field(None, ge=0)
    update_param_us: float | None = Field(None, ge=0)
    loader_images_per_s_per_core: float | None = Field(None, gt=0)
    loader_cores: float | None = Field(None, gt=0)

    def known(self) -> dict[str, Any]:
        """Return the measured constants by name, as they are written to the file."""
        return self.model_dump(exclude_none=True, exclude_defaults=True)

    def constants(self) -> dict[str, Any]:
        """Return :meth:`known` without the device."""
        return {name: value for name, value in self.known().items() if name != "device"}


def read_measured(path: Path) -> MeasuredNode:
    """Read the section ``measured`` of a doctor's JSON file; warn of checks that failed or were not run.

    Raises:
        UserError: if the file is missing, is not the doctor's, or of another format; if a check stopped the doctor; if
            the section is invalid, or names no device or no constant.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; `mrmae doctor` writes it") from None
    except ValueError:
        content = None
    again = "write it again with `mrmae doctor`"
    if not isinstance(content, dict) or MEASURED_KEY not in content:
        raise UserError(f"{path}: not a doctor's JSON file; {again}")
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: format {json.dumps(content.get('format'))}, expected {FORMAT}; {again}")
    _check_results(path, content)
    section = content[MEASURED_KEY]
    if not isinstance(section, dict):
        raise UserError(f"{path}: section {MEASURED_KEY!r} must be an object, got {json.dumps(section)}; {again}")
    try:
        measured = MeasuredNode.model_validate(section)
    except ValidationError as error:
        raise UserError(f"{path}: section {MEASURED_KEY!r}: {_first_error(error)}; {again}") from None
    if measured.device is None:
        raise UserError(f"{path}: section {MEASURED_KEY!r} names no device, so it fits no GPU; {again}")
    if not measured.constants():
        raise UserError(f"{path}: section {MEASURED_KEY!r} has no constant; run the doctor's checks that measure them")
    return measured


def read_step_rates(path: Path) -> dict[str, float]:
    """Return the highest images/s of a rank in the steps that a doctor timed, by the recipe's name; {} without one.

    Args:
        path: the doctor's JSON file, as :func:`read_measured` takes it.
    """
    checks = json.loads(path.read_text(encoding="utf-8")).get("checks") or ()
    rows = [row for check in checks if check["name"] == "steps" for row in check["rows"]]
    recipes = [row["value"] for row in rows if row["name"] == "recipe"]
    rates = [row["value"] for row in rows if row["unit"] == "images/s"]
    return {str(recipes[0]): float(max(rates))} if recipes and rates else {}


def _check_results(path: Path, content: dict[str, Any]) -> None:
    """Refuse the report of a doctor that a check stopped; warn of what failed or was not run."""
    for check in content.get("checks") or ():
        found = f"the check {check['name']}: {check['message']}"
        if check["status"] == "stop":
            raise UserError(
                f"{path}: the doctor was stopped by {found}. Fix that, or --skip the check, and run it again"
            )
        if check["status"] == "failed":
            logger.warning("%s: failed there, %s", path, found)
    if content.get("not_run"):
        logger.warning("%s: the doctor ended before these checks: %s", path, ", ".join(content["not_run"]))


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
