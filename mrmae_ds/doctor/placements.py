"""Check of the placements of a frozen teacher's weights: equal targets, memory and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from mrmae_ds.config.stages import PlacementConfig
from mrmae_ds.doctor.context import DoctorContext
from mrmae_ds.doctor.reading import Expected, Reading
from mrmae_ds.teachers import Teacher, TeacherOptions, place_teacher
from mrmae_ds.teachers.base import LibraryTeacher

PLACEMENTS: dict[str, dict[str, str]] = {
    "device": {"kind": "device"},
    "step": {"kind": "step"},
    "stream": {"kind": "stream"},
    "sharded": {"kind": "sharded"},
    "sharded, offload: cpu": {"kind": "sharded", "offload": "cpu"},
}
SETTLED = 4  # calls after which DeepSpeed knows what to gather ahead


def check_placements(context: DoctorContext) -> list[Reading]:
    """Compare targets, resident bytes and time of every placement of a CLIP ViT-B/16 with random weights."""
    readings: list[Reading] = []
    model, images = ("ViT-B-16-quickgelu", 32) if context.on_cuda else ("ViT-B-32-quickgelu", 1)
    pixels = torch.rand(images, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(context.device)
    reference: float | None = None
    for name, placement in PLACEMENTS.items():
        found = measure_placement(lambda: random_clip(model), placement, pixels, calls=5)
        reference = found["sum"] if reference is None else reference
        equal = Expected(low=reference, high=reference, source="placement device")
        readings += [
            Reading(f"{name}: sum of targets", found["sum"], "", equal),
            Reading(f"{name}: resident between calls", found["between"] / 1e6, "MB"),
            Reading(f"{name}: resident at most", found["peak"] / 1e6, "MB"),
            Reading(f"{name}: call", found["seconds"] * 1e3, "ms"),
        ]
    return readings


def random_clip(name: str, precision: str = "bf16") -> Teacher:
    """Build an open_clip tower with random weights on the CPU, the same at each call."""
    import open_clip

    from mrmae_ds.teachers.sources.clip import TowerReader
    from mrmae_ds.teachers.sources.clip_loading import NO_TEXT

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    torch.manual_seed(0)
    model = open_clip.get_model_config(name)
    with torch.device("meta"):
        visual = open_clip.CLIP(model["embed_dim"], model["vision_cfg"], NO_TEXT).visual.to(dtype)
    visual = visual.to_empty(device="cpu").eval()
    for tensor in (*visual.parameters(), *visual.buffers()):
        tensor.data.normal_(std=0.02)
    options = TeacherOptions("teachers.clip", name, 224, visual.grid_size, dtype=dtype)
    half = ((0.5,) * 3, (0.5,) * 3)
    return LibraryTeacher(visual, TowerReader(visual, options), options, half, "", {})


def measure_placement(
    build: Callable[[], Teacher], placement: dict[str, str], pixels: Tensor, calls: int
) -> dict[str, float]:
    """Measure one placement on this rank; all ranks must call it.

    Args:
        build: builds the teacher on the CPU.
        placement: the recipe's section.
        pixels: images in [0, 1] on the device, float32 [B, 3, H, W].
        calls: timed calls; the median is returned.

    Returns:
        Bytes of ``weights``, ``between`` calls and at the ``peak``; ``seconds`` and ``cpu_seconds`` of a call; ``sum``
        of the targets; on a GPU ``allocated``, torch's peak during a call.
    """
    gpu = pixels.device.type == "cuda"
    teacher = build()
    total = sum(tensor.nbytes for tensor in (*teacher.parameters(), *teacher.buffers()))
    placed = place_teacher("teacher", teacher, PlacementConfig.model_validate(placement), pixels.device)
    for _ in range(SETTLED):
        output = placed(pixels)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    times, cpu_times = [], []
    for _ in range(calls):
        dist.barrier()
        began, cpu_began = time.perf_counter(), time.process_time()
        output = placed(pixels)
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        cpu_times.append(time.process_time() - cpu_began)
    result = {
        "weights": total,
        "between": placed.resident_bytes,
        "peak": placed.peak_resident_bytes,
        "seconds": statistics.median(times),
        "cpu_seconds": statistics.median(cpu_times),
        "sum": output.tokens.double().sum().item() + output.importance.double().sum().item(),
    }
    if gpu:
        result["allocated"] = torch.cuda.max_memory_allocated()
    placed.release()
    return result
