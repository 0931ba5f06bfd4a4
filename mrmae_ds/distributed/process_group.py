"""Start and end of the process group, and the device of a rank."""

from __future__ import annotations

import datetime
import faulthandler
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from mrmae_ds.distributed.launch import Launch, port_taken
from mrmae_ds.errors import UserError

logger = logging.getLogger(__name__)

GROUP_LIMIT_S = 30 * 60.0
REPORT_START_S = 120.0  # a start that takes longer is reported, with all stacks
GRACE_S = 60.0  # for torch's own error at the limit


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


def start_process_group(
    device: torch.device, report_after_s: float = REPORT_START_S, limit_s: float = GROUP_LIMIT_S
) -> None:
    """Start the process group, without DeepSpeed's banners, and connect the ranks.

    Args:
        device: of this rank.
        report_after_s: time after which a start that waits prints what it waits for, and all stacks.
        limit_s: time after which a start or a collective operation fails.

    Raises:
        UserError: if the port of rank 0 is taken, or the other ranks do not come.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and os.environ.get("LOCAL_RANK", "0") == "0":
        logger.info("waiting for %d ranks at %s, at most %g minutes", world_size, _address(), limit_s / 60)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch has deprecated; users cannot change that.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed")
    if device.type != "cpu":
        get_accelerator().set_device(device.index)
        # DeepSpeed binds this device again; it is not the local rank where each task sees one GPU.
        os.environ["LOCAL_RANK"] = str(device.index)
    # No operation of DeepSpeed's own is used. Asked for them, it probes each, with a warning for each that lacks a CUDA
    # toolkit. On CPUs it would compile an all-reduce whose buffers (66 MiB per rank) stay in /dev/shm afterwards.
    deepspeed.ops.__compatible_ops__ = {}
    with _report_slow_start(report_after_s, limit_s + GRACE_S):
        try:
            deepspeed.init_distributed(verbose=False, timeout=datetime.timedelta(seconds=limit_s))
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise UserError(_explain(error, world_size)) from None
        if dist.get_world_size() > 1:
            dist.barrier()  # NCCL opens its connections at the first operation


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _explain(error: Exception, world_size: int) -> str:
    text = str(error).partition("\n")[0]
    if "EADDRINUSE" in text:
        return port_taken(os.environ.get("MASTER_PORT", ""))
    return f"{world_size} ranks do not come together at {_address()} (MASTER_ADDR:MASTER_PORT): {text}"


@contextmanager
def _report_slow_start(report_after_s: float, limit_s: float) -> Iterator[None]:
    """Print what the ranks wait for once they take long, and end the process at the limit.

    The watchdog cannot do this: it needs the process group.
    """

    def report() -> None:
        rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        print(
            f"warning: rank {rank} has waited {report_after_s:g} s for the start of {world_size} ranks. A rank has not "
            f"come yet, or does not reach MASTER_ADDR:MASTER_PORT ({_address()}), or NCCL does not connect: set "
            "NCCL_SOCKET_IFNAME to the interface between the nodes and NCCL_IB_HCA to its adapters; NCCL_DEBUG=INFO "
            "shows NCCL's choice. Stacks of this rank:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr)

    reporter = threading.Timer(report_after_s, report)
    reporter.daemon = True
    reporter.start()
    # By faulthandler, which needs no interpreter: NCCL has no limit of its own while it connects.
    faulthandler.dump_traceback_later(limit_s, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        reporter.cancel()
        reporter.join()


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
