"""Worker of the sharded teachers' tests: one rank's view of the placement."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import parameter_offload
from torch.multiprocessing.reductions import StorageWeakRef

from mrmae_ds.config.engine import load_engine_config
from mrmae_ds.config.sections import DataConfig
from mrmae_ds.config.stages import MaskingConfig, PlacementConfig, PretrainConfig
from mrmae_ds.models.decoder import DecoderSpec
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.pretrain import FusionSpec, PretrainModel
from mrmae_ds.models.sizes import encoder_spec
from mrmae_ds.teachers import Teacher, place_teacher
from mrmae_ds.teachers.placement.offload_units import split_units
from mrmae_ds.training.engine.build import build_engine, gather_state, set_lr
from mrmae_ds.training.param_groups import adamw
from mrmae_ds.training.tasks.base import MicroBatchKey
from mrmae_ds.training.tasks.pretrain import PretrainTask
from tests.support.jobs import make_batch, pretrain_config
from tests.support.placed import TEACHERS, bytes_present, timm_network, weights_of
from tests.support.sample_teachers import pixels_of

CPU = torch.device("cpu")
PLACEMENTS: dict[str, Any] = {
    "device": "device",
    "step": "step",
    "stream": "stream",
    "sharded": "sharded",
    "mixed": {"clip": {"kind": "sharded", "offload": "cpu"}, "dino": "stream"},
}
ENGINE = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "memory_efficient_linear": False},
}


def targets(build: Callable[[Path], Teacher], placement: PlacementConfig, folder: Path) -> dict[str, Any]:
    """Call a sharded teacher and a plain one on images that differ between the ranks, then release it.

    Returns:
        ``equal``: outputs equal the plain one's, by call; bytes between calls, at the peak and in swap files; ``left``
        and ``gone``: memory and objects that remain after the release."""
    plain, teacher = build(folder), build(folder)
    network, storages = weakref.ref(teacher.network), [StorageWeakRef(t.untyped_storage()) for t in weights_of(teacher)]
    stack = len(parameter_offload.FWD_MODULE_STACK)
    placed = place_teacher("one", teacher, placement, CPU)
    equal, between = [], []
    for seed in range(4):
        pixels = pixels_of(2, plain.image_size, 10 * seed + dist.get_rank())
        expected, output = plain(pixels), placed(pixels)
        equal.append(all(map(torch.equal, expected[:2], output[:2])))
        between.append(placed.resident_bytes)
    present, files = bytes_present(teacher), sum(file.stat().st_size for file in folder.rglob("*.swp"))
    storages += [StorageWeakRef(p.ds_tensor.untyped_storage()) for p in teacher.parameters()]
    engine, parameters = weakref.ref(placed.engine), list(teacher.parameters())
    placed.release()
    left = sum(not storage.expired() for storage in storages)  # though somebody holds the parameters
    del parameters
    gc.collect()
    return {
        "equal": equal,
        "between": between,
        "present": present,
        "files": files,
        "peak": placed.peak_resident_bytes,
        "all": bytes_present(plain),
        "buffers": sum(buffer.nbytes for buffer in plain.buffers()),
        "unit": max(bytes_present(unit) for unit in split_units(plain.network)),
        "left": left,
        "gone": engine() is None and network() is None,
        "stack": len(parameter_offload.FWD_MODULE_STACK) - stack,
    }


def training(placement: Any, folder: Path) -> list[float]:
    """Train a student of two teachers for three steps (ZeRO-3, bf16 autocast); return losses and the weights' sum."""
    mimic = {"tap": "encoder", "tokens": "visible", "normalize": "layer_norm", "weight": 0.5}
    config: PretrainConfig = pretrain_config(
        teachers=("clip", "dino"),
        masking=MaskingConfig(mode="topk", teacher="dino"),
        objectives={name: {"target": name, **mimic} for name in ("clip", "dino")},
        placement=placement,
    )
    teachers = {name: TEACHERS[name](folder) for name in config.teachers}
    torch.manual_seed(0)
    encoder = build_encoder(encoder_spec("cvit_tiny", {"dims": [8, 12, 16], "depths": [1, 1, 1], "num_heads": 2}), 16)
    widths = {name: teacher.width for name, teacher in teachers.items()}
    model = PretrainModel(
        encoder, FusionSpec(stages=(1, 2)), DecoderSpec(dim=8, depth=1, num_heads=2), config.objectives, widths
    )
    task = PretrainTask(model, teachers, config, DataConfig(train="train.beton", val="val.beton"))
    (folder / "engine.json").write_text(json.dumps(ENGINE))
    engine = build_engine(
        model, task.param_groups(), adamw((0.9, 0.95)), load_engine_config(folder / "engine.json"), 1, CPU
    )
    task.to(CPU)
    engine.train()
    losses = []
    for step in range(3):
        set_lr(engine, 0.01)
        key = MicroBatchKey(1, step, 0, dist.get_rank(), dist.get_world_size(), 2)
        result = task.losses(engine, make_batch(2, side=16, seed=10 * step + dist.get_rank()), key)
        engine.backward(result["loss"])
        engine.step()
        losses += [value.item() for value in result.values()]
    task.release()
    # The student continues without them.
    losses.append(float(sum(tensor.double().sum() for tensor in gather_state(engine).values())))
    engine.destroy()
    return losses


def measure(rank: int, world_size: int, folder: Path, nvme: bool) -> None:
    """Run all cases on one rank and write FOLDER/rankN.json; if ``nvme``, of one teacher whose shares are files."""
    linear = torch.nn.functional.linear
    own = folder / f"rank{rank}"
    own.mkdir()
    result: dict[str, Any]
    if nvme:
        placement = PlacementConfig(kind="sharded", offload="nvme", nvme_path=own)
        result = targets(lambda _: timm_network("vit_small_patch16_224", img_size=64, depth=3), placement, own)
    else:
        plain, offload = PlacementConfig(kind="sharded"), PlacementConfig(kind="sharded", offload="cpu")
        facts = {name: targets(build, plain, own) for name, build in TEACHERS.items()}
        facts |= {f"{name}, offload": targets(TEACHERS[name], offload, own) for name in ("clip", "resnet")}
        losses = {name: training(placement, own) for name, placement in PLACEMENTS.items()}
        patched = torch.nn.functional.linear is not linear
        result = {"targets": facts, "losses": losses, "patched": patched}
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
