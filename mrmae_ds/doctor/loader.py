"""Check of the loader alone, on all ranks at once."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib.util import find_spec

from mrmae_ds.config.sections import DataConfig, LoaderConfig
from mrmae_ds.data.loaders.base import LoaderRequest, TrainTransform
from mrmae_ds.data.loaders.build import build_loader, default_num_workers
from mrmae_ds.data.loaders.crop import CropSettings
from mrmae_ds.doctor import expectations
from mrmae_ds.doctor.context import DoctorContext
from mrmae_ds.doctor.reading import Expected, Reading
from mrmae_ds.doctor.tiny_job import tiny_job

SIZE, BATCH, SECONDS = 224, 16, 10.0


def check_loader(context: DoctorContext) -> list[Reading]:
    """Measure decoding of the generated JPEGs at 224 pixels with every core of a rank."""
    images, readings, workers = tiny_job(context).images, [], default_num_workers()
    backends = ["ffcv"] if find_spec("ffcv") else []
    request = LoaderRequest("train", SIZE, BATCH, transform=TrainTransform(CropSettings(scale=(0.2, 1.0))))
    for backend in [*backends, "pillow"]:
        data = DataConfig.model_validate({"train": images, "val": images, "backend": backend})
        loader = build_loader(data, LoaderConfig(), replace(request, seed=context.launch.rank), context.device)
        for _ in loader.epoch(0):  # imports, compilation, a cold page cache
            pass
        context.ranks.gather(True)
        count, epoch, began = 0, 1, time.perf_counter()
        while time.perf_counter() - began < (SECONDS if context.on_cuda else 1.0):
            count += sum(len(batch.labels) for batch in loader.epoch(epoch))
            epoch += 1
        speed = count / (time.perf_counter() - began)
        loader.close()
        expected = _enough(context) if backend == "ffcv" or not backends else None
        readings.append(Reading(f"{backend}: images per s and rank", speed, "images/s", expected))
        constant = "loader_images_per_s_per_core" if backend == "ffcv" or not backends else None
        readings.append(Reading(f"{backend}: images per s and core", speed / workers, "images/s", None, constant))
    return readings


def _enough(context: DoctorContext) -> Expected | None:
    """Return the range in which the loader keeps up with the fastest measured step."""
    steps = [r.value for r in context.found.get("steps", []) if r.unit == "images/s" and not isinstance(r.value, str)]
    if not steps or context.request.ds_config is None:
        return None
    margin = expectations.LOADER_MARGIN
    return Expected(low=margin * max(steps), source=f"{margin:g} times the fastest step of the check steps")
