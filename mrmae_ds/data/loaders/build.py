"""Construction of loaders from the recipe's sections."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import get_args

import torch

from mrmae_ds.config.sections import Backend, DataConfig, LoaderConfig
from mrmae_ds.data.beton.sidecar import check_beton
from mrmae_ds.data.loaders.augment import Augment
from mrmae_ds.data.loaders.base import Batch, Loader, LoaderRequest, LoaderSettings
from mrmae_ds.data.loaders.worker import ranks_of_launcher
from mrmae_ds.data.node_cache import cached_path
from mrmae_ds.errors import UserError

_CPU = torch.device("cpu")


def build_loader(
    data: DataConfig, config: LoaderConfig, request: LoaderRequest, device: torch.device = _CPU
) -> Loader[Batch]:
    """Open a data set for one rank.

    Args:
        data: paths and backends.
        config: workers and node cache.
        request: the batches of this rank.
        device: device on which the batches are delivered.

    Returns:
        The loader.

    Raises:
        UserError: if the file is missing, truncated or smaller than a global batch, a setting is invalid, or /dev/shm
            is too small.
    """
    backend = _backend_of(data, request)
    check_backend(backend)
    check_loader_memory(data, config, request)
    settings = LoaderSettings(
        info=check_beton(cached_path(data.train if request.split == "train" else data.val, config.cache_dir)),
        request=request,
        num_workers=num_workers_of(config),
        device=torch.device(device),
    )
    transform = request.transform
    if transform is None or transform.augment is None:
        return _open(backend, settings)
    Augment(transform.augment, request.image_size)  # an invalid policy raises here, not in a worker
    of_workers = transform.of_workers(config)
    loader = _open(backend, replace(settings, request=replace(request, transform=of_workers)))
    if of_workers.augment is not None:
        return loader
    from mrmae_ds.data.loaders.augment_device import DeviceAugmentLoader

    return DeviceAugmentLoader(loader, transform.augment, request.image_size, settings.device)


def _open(backend: Backend, settings: LoaderSettings) -> Loader[Batch]:
    # Backends are imported late: ffcv is optional, and each takes time to import.
    if backend == "pillow":
        from mrmae_ds.data.loaders.pillow import PillowLoader

        return PillowLoader(settings)
    from mrmae_ds.data.loaders.ffcv import FFCVLoader

    return FFCVLoader(settings)


def check_loader_memory(data: DataConfig, config: LoaderConfig, request: LoaderRequest) -> None:
    """Check that /dev/shm holds what a loader shares with its processes.

    Args:
        data: paths and backends.
        config: workers.
        request: the batches of this rank.

    Raises:
        UserError: naming the bytes that are needed and present, and the fix.
    """
    if _backend_of(data, request) == "pillow":
        from mrmae_ds.data.loaders.pillow import check_pillow_memory

        check_pillow_memory(request, num_workers_of(config))


def _backend_of(data: DataConfig, request: LoaderRequest) -> Backend:
    return data.backend if request.transform is not None else data.val_backend


def check_backend(backend: Backend = "ffcv") -> None:
    """Check that a backend is installed.

    Raises:
        UserError: if it is unknown or not installed.
    """
    if backend not in get_args(Backend):
        raise UserError(f"unknown data backend {backend!r}; choose from: {', '.join(get_args(Backend))}")
    if backend == "ffcv":
        # Imported late: a machine that only plans or reports needs no ffcv.
        from mrmae_ds.data.loaders._ffcv import import_ffcv

        import_ffcv()


def num_workers_of(config: LoaderConfig) -> int:
    """Return the number of decoding threads or processes of a rank: the recipe's, or by default its cores."""
    return config.num_workers or default_num_workers()


def default_num_workers() -> int:
    """Return the number of decoding threads for one rank: its share of the cores.

    The cores are the process's affinity, at most ``SLURM_CPUS_PER_TASK``, divided by the ranks that a launcher
    started inside this task (``LOCAL_WORLD_SIZE``, or DeepSpeed's ``LOCAL_SIZE``). Where Slurm started every rank as
    a task of its own, its CPUs are not divided.
    """
    cores, environment = len(os.sched_getaffinity(0)), os.environ
    if environment.get("SLURM_CPUS_PER_TASK"):
        cores = min(cores, int(environment["SLURM_CPUS_PER_TASK"]))
        if environment.get("SLURM_NTASKS", "") == environment.get("WORLD_SIZE"):
            return max(1, cores)
    return max(1, cores // ranks_of_launcher())
