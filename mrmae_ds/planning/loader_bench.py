"""The report of ``mrmae data bench``: throughput of the loader on this machine, and the cores that a GPU needs."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mrmae_ds.config.engine import default_recipe, load_engine_config
from mrmae_ds.config.recipe import Recipe, load_recipe
from mrmae_ds.config.sections import Backend, DataConfig, LoaderConfig
from mrmae_ds.data.beton.sidecar import check_beton
from mrmae_ds.data.loaders.base import LoaderRequest, TrainTransform
from mrmae_ds.data.loaders.build import build_loader, num_workers_of
from mrmae_ds.data.loaders.crop import CropSettings
from mrmae_ds.data.loaders.throughput import Throughput, measure_throughput
from mrmae_ds.errors import UserError
from mrmae_ds.files import check_writable, write_text
from mrmae_ds.imagenet import IMAGENET_CLASSES
from mrmae_ds.planning.estimates.host import loader_name
from mrmae_ds.planning.fake_step import build_meta_task
from mrmae_ds.planning.plan import PlanRequest, gpu_throughput
from mrmae_ds.profiling.flops import COUNTED_STAGES
from mrmae_ds.records.environment import collect_versions, cpu_name
from mrmae_ds.units import counted

DEFAULT = "no recipe"  # random crops of 20 % to 100 % of an image at 224 pixels


@dataclass(frozen=True)
class LoaderBenchRequest:
    """Command line of ``mrmae data bench``; ``cli/data_bench.py`` documents the options.

    Attributes:
        beton: the data set.
        ds_config: engine config; None measures plain random crops.
        recipe: default: the one beside ``ds_config``.
        stage: the only stage; None is pre-training and fine-tuning.
        gpu: key of a GPU, for the plan's estimate of its images/s.
        gpus: number of GPUs.
        measured: JSON file of ``mrmae doctor``.
        images_per_s: of a GPU, as it was measured.
        backend: of the loader; None is the recipe's.
        workers: of the loader; None is the recipe's, or all cores.
        seconds: duration of a measurement.
        out: JSON file, which ``mrmae plan --loader-bench`` reads.
        overrides: ``key.path=value`` for the recipe.
    """

    beton: Path
    ds_config: Path | None = None
    recipe: Path | None = None
    stage: str | None = None
    gpu: str | None = None
    gpus: int = 8
    measured: Path | None = None
    images_per_s: float | None = None
    backend: Backend | None = None
    workers: int | None = None
    seconds: float = 10
    out: Path | None = None
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class _Case:
    """Images of a stage.

    Attributes:
        name: of the stage.
        size: pixels.
        micro_batch: images.
        transform: crops, and the augmentation that the loader's workers apply.
        described: augmentation, for the report.
    """

    name: str
    size: int
    micro_batch: int
    transform: TrainTransform
    described: str = ""


def bench_loader(request: LoaderBenchRequest) -> str:
    """Measure, write the JSON file, and return the report.

    Raises:
        UserError: for a data set, recipe or engine config that is invalid, an impossible number, or a GPU without a
            recipe.
    """
    _check(request)
    recipe = _load_recipe(request)
    backend = request.backend or (recipe.data.backend if recipe else "ffcv")
    data = DataConfig(train=request.beton, val=request.beton, backend=backend)
    config = (recipe.loader if recipe else LoaderConfig()).model_copy(update={"cache_dir": None})
    if request.workers is not None:
        config = config.model_copy(update={"num_workers": request.workers})
    workers, cores = num_workers_of(config), len(os.sched_getaffinity(0))
    info = check_beton(request.beton)
    lines = [
        f"{info.path}: {counted(info.num_samples, 'image')}, {backend} backend, {counted(workers, 'worker')} on "
        f"{counted(cores, 'core')} ({cpu_name()})"
    ]
    found: dict[str, list[dict[str, str | float]]] = defaultdict(list)
    cases = _cases(request, recipe)
    needs = [_needed(request, case.name) for case in cases]  # before the measurements: they find invalid options
    for case, needed in zip(cases, needs, strict=True):
        batch = min(case.micro_batch, info.num_samples)
        loader = build_loader(data, config, LoaderRequest("train", case.size, batch, transform=case.transform))
        speed = measure_throughput(loader, request.seconds)
        lines.append(
            f"  {case.name}, {case.size} pixels{case.described}: {speed.images_per_s:,.0f} "
            f"images/s, {speed.per_core:,.0f} a core ({speed.cpu_s_per_1000:.2f} CPU ms an image)"
        )
        lines += _cores(needed, speed, cores)
        name = loader_name(backend, case.transform.augment)
        found[name].append({"stage": case.name, "size": case.size, **vars(speed)})
    if request.out is not None:
        machine = {"cpu": cpu_name(), "cores": cores, "versions": collect_versions()}
        settings = {"beton": info.path.name, "workers": workers, "seconds": request.seconds}
        content = {"settings": settings, "machine": machine, "rounds": found}
        write_text(request.out, json.dumps(content, indent=1) + "\n")
    return "\n".join(lines)


def _check(request: LoaderBenchRequest) -> None:
    for option, number in {"--seconds": request.seconds, "--images-per-s": request.images_per_s}.items():
        if number is not None and not 0 < number < math.inf:
            raise UserError(f"{option} must be above 0, got {number:g}")
    if request.workers is not None and request.workers < 1:
        raise UserError(f"--workers must be at least 1, got {request.workers}")
    needs = [name for name in ("recipe", "stage", "gpu", "measured") if getattr(request, name) is not None]
    if request.ds_config is None and (needs or request.overrides):
        raise UserError(
            f"{'--' + needs[0] if needs else request.overrides[0]}: needs --ds_config, which names the recipe"
        )
    if request.measured is not None and request.gpu is None:
        raise UserError("--measured needs --gpu, the type of GPU that it was measured on")
    if request.out is not None:
        check_writable(request.out)


def _load_recipe(request: LoaderBenchRequest) -> Recipe | None:
    if request.ds_config is None:
        return None
    return load_recipe(request.recipe or default_recipe(request.ds_config), list(request.overrides))


def _cases(request: LoaderBenchRequest, recipe: Recipe | None) -> list[_Case]:
    """Return the images of each stage, as its task trains on them."""
    if recipe is None or request.ds_config is None:
        return [_Case(DEFAULT, 224, 64, TrainTransform(CropSettings(scale=(0.2, 1.0))))]
    config = load_engine_config(request.ds_config)
    names = [name for name in COUNTED_STAGES if getattr(recipe.stages, name) and request.stage in (None, name)]
    if not names:
        raise UserError(f"recipe {recipe.name} has no stage {request.stage or 'that trains on random crops'}")
    tasks = [(name, build_meta_task(recipe, name, config, IMAGENET_CLASSES)) for name in names]
    return [
        _case(name, task.image_size, config.micro_batch, task.transform, recipe.loader)
        for name, task in tasks
        if task.transform is not None
    ]


def _case(name: str, size: int, micro_batch: int, transform: TrainTransform, loader: LoaderConfig) -> _Case:
    if transform.augment is None:
        return _Case(name, size, micro_batch, transform)
    described, measured = f", {transform.augment.policy or 'color jitter'}", transform.of_workers(loader)
    if measured.augment is None:
        described += " on the device and not measured"
    return _Case(name, size, micro_batch, measured, described)


def _needed(request: LoaderBenchRequest, name: str) -> tuple[float, str] | None:
    """Return the images/s that a GPU trains and where they are from; None if they are not asked for."""
    if request.images_per_s is not None:
        return request.images_per_s, "as given"
    if request.gpu is None or request.ds_config is None:
        return None
    plan = PlanRequest(
        request.ds_config, request.gpus, request.gpu, name, recipe=request.recipe, measured=request.measured,
        overrides=request.overrides,
    )  # fmt: skip
    return gpu_throughput(plan)


def _cores(needed: tuple[float, str] | None, speed: Throughput, cores: int) -> list[str]:
    """Return the line of the cores that a GPU needs; none if its throughput is not asked for."""
    if needed is None:
        return []
    rate, source = needed
    each = rate / speed.per_core
    return [
        f"    a GPU trains {rate:,.0f} images/s ({source}): {each:,.1f} cores a GPU; "
        f"{counted(cores, 'core')} of this machine feed {cores / each:,.1f} GPUs"
    ]
