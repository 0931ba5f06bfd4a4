"""Start and end of the process group, and the device of a rank."""

from __future__ import annotations

import datetime
import logging
import warnings

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.errors import UserError


def choose_device(launch: Launch) -> torch.device:
    """Return this rank's device: one GPU per rank if there are any, else the CPU.

    Raises:
        UserError: if a node has more ranks than GPUs.
    """
    name = get_accelerator().device_name()
    if name == "cpu":
        return torch.device("cpu")
    count = get_accelerator().device_count()
    # With one GPU bound to each task, every task sees a single device, whatever its local rank.
    if count > 1 and max(launch.local_size, launch.local_rank + 1) > count:
        raise UserError(f"{launch.local_size} ranks on this node but only {count} GPUs; start {count} ranks per node")
    return torch.device(name, launch.local_rank % count)


def start_process_group(device: torch.device) -> None:
    """Start the process group, without DeepSpeed's banners."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch has deprecated; users cannot change that.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed")
    if device.type != "cpu":
        get_accelerator().set_device(device.index)
    # On CPUs DeepSpeed would compile an all-reduce that only inference uses, whose buffers (66 MiB per rank) stay in
    # /dev/shm when the process has ended.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False, timeout=datetime.timedelta(minutes=30))


def end_process_group() -> None:
    """Wait for all ranks, then destroy the group: a rank that exits early can abort the others inside gloo."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Return the element-wise sum of a tensor over all ranks, on every rank."""
    values = values.clone()
    dist.all_reduce(values)
    return values
