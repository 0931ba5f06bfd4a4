"""Constants of the estimates, read from constants.yaml, which states the unit and source of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from mrmae_ds.imagenet import IMAGENET_TRAIN_SAMPLES
from mrmae_ds.schema import Section

FILE = Path(__file__).with_name("constants.yaml")


class Constant(Section):
    """A number with its unit and source."""

    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Constants:
    """Values of the constants; constants.yaml documents them under the same names."""

    matmul_share: float
    attention_share: float
    fp32_share: float
    memory_share: float
    convolution_share: float
    gbs_per_tflops: float
    kernel_s: float
    op_s: float
    zero1_param_s: float
    zero3_first_param_s: float
    zero3_param_s: float
    update_param_s: float
    network_gbs: float
    unknown_gpu_gbs: float
    link_share: float
    call_s: float
    node_s: float
    context_gib: float
    fragmentation: float
    update_bytes: float
    reduce_accesses: float
    node_memory_gbs: float
    process_gib: float
    dataset_bytes: float
    image_side: float
    ffcv_batches: float
    threshold: float

    @property
    def image_bytes(self) -> float:
        """Bytes per image of the .beton file."""
        return self.dataset_bytes / IMAGENET_TRAIN_SAMPLES


def load_constants(path: Path = FILE) -> Constants:
    """Read the constants; raise TypeError for a missing or unknown one."""
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Constants(**{name: Constant.model_validate(entry).value for name, entry in entries.items()})


CONSTANTS = load_constants()
