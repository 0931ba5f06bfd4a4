"""Tiny teachers of every kind with random weights, and counts of their bytes in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import open_clip
import timm
import torch
from torch import Tensor, nn

from mrmae_ds.models.sizes import CViTSpec, ViTSpec
from mrmae_ds.teachers import Teacher
from mrmae_ds.teachers.base import LibraryTeacher
from mrmae_ds.teachers.sources.checkpoint import CheckpointTeacher
from mrmae_ds.teachers.sources.clip import TowerReader
from mrmae_ds.teachers.sources.timm_readers import timm_reader
from tests.support.reference import perturb
from tests.support.sample_teachers import options, save_run

VISION = {"image_size": 64, "layers": 4, "width": 64, "head_width": 16, "patch_size": 16}
TEXT = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
RGB = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def clip_tower(features: str = "raw", dtype: torch.dtype = torch.float32) -> Teacher:
    """Build a CLIP teacher: open_clip's ViT with four blocks of width 64."""
    torch.manual_seed(0)
    chosen = options("clip", "tower", features=features, dtype=dtype)
    visual = open_clip.CLIP(24, VISION, TEXT, quick_gelu=True).visual
    perturb(visual, seed=1, scale=0.1)
    return LibraryTeacher(visual.eval(), TowerReader(visual, chosen), chosen, RGB, "", {})


def timm_network(name: str, side: int = 64, dtype: torch.dtype = torch.float32, **size: int) -> Teacher:
    """Build a teacher of a timm network with perturbed weights."""
    torch.manual_seed(0)
    chosen = options("net", name, image_size=side, dtype=dtype)
    network = timm.create_model(name, num_classes=0, **size).eval()
    perturb(network, seed=2, scale=0.1)
    return LibraryTeacher(network, timm_reader(network, chosen), chosen, RGB, "", {})


def own_encoder(folder: Path, arch: str) -> Teacher:
    """Return the teacher of a run of this project."""
    spec = ViTSpec(16, 4, 4, patch=4) if arch == "vit" else CViTSpec((8, 12, 16), (1, 1, 4), 4, patches=(2, 2, 1))
    torch.manual_seed(0)
    save_run(folder / arch, spec)
    return CheckpointTeacher(options("own", str(folder / arch), image_size=16, features="ln_post"))


SMALL = {"img_size": 64, "embed_dim": 48, "depth": 4, "num_heads": 4}
# Of each: how to build it, given a folder for its weights. The same weights every time.
TEACHERS: dict[str, Callable[[Path], Teacher]] = {
    "clip": lambda folder: clip_tower("proj"),
    "clip-bf16": lambda folder: clip_tower(dtype=torch.bfloat16),
    "dino": lambda folder: timm_network("vit_tiny_patch16_224", **SMALL),
    "eva": lambda folder: timm_network("eva02_tiny_patch14_224", 56, **SMALL | {"img_size": 56}),
    "convnext": lambda folder: timm_network("test_convnext"),
    "resnet": lambda folder: timm_network("test_resnet"),
    "own-vit": lambda folder: own_encoder(folder, "vit"),
    "own-cvit": lambda folder: own_encoder(folder, "cvit"),
}


def weights_of(teacher: nn.Module) -> list[Tensor]:
    """Return all parameters and buffers of a module."""
    return [*teacher.parameters(), *teacher.buffers()]


def bytes_present(teacher: nn.Module) -> int:
    """Return the bytes of all values that a teacher's modules hold now."""
    return sum(tensor.numel() * tensor.element_size() for tensor in weights_of(teacher))


@contextmanager
def watched(teacher: nn.Module) -> Iterator[list[int]]:
    """Yield a list that receives :func:`bytes_present` before and after every call of a module, to find the peak."""
    seen: list[int] = []

    def look(*_: object) -> None:
        seen.append(bytes_present(teacher))

    handles = [module.register_forward_pre_hook(look) for module in teacher.modules()]
    handles += [module.register_forward_hook(look) for module in teacher.modules()]
    yield seen
    for handle in handles:
        handle.remove()
