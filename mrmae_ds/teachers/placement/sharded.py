"""``sharded``: a teacher's weights divided among the processes, each module's gathered while it runs.

By a DeepSpeed ZeRO-3 engine of its own, without an optimizer and with a configuration of its own: two engines in a
process are independent as long as they share no dictionary. What DeepSpeed keeps for the whole process is left as the
student's engine set it (``memory_efficient_linear``), or undone at the end.
"""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor, nn

from mrmae_ds.config.stages import PlacementConfig
from mrmae_ds.errors import UserError
from mrmae_ds.teachers.base import Teacher, TeacherOutput
from mrmae_ds.teachers.placement.build import PlacedTeacher
from mrmae_ds.teachers.placement.units import count_bytes, split

# Calls in which the most that is gathered is looked for: DeepSpeed gathers ahead from the second or third on, and all
# later ones are alike.
WATCHED_CALLS = 4


class _Whole(nn.Module):
    """A teacher's network, so that all that happens in a call happens inside a module that DeepSpeed knows.

    Readers use weights beside the modules that own them (the class token, the last block's attention); DeepSpeed
    gathers those for the module that is running, which without this would be none.
    """

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.network = teacher.network
        self.ask = [teacher]  # not a submodule: its statistics stay as they are

    def forward(self, pixels: Tensor) -> TeacherOutput:
        return self.ask[0](pixels)


class ShardedTeacher(PlacedTeacher):
    """One n-th of the weights on each of n processes.

    Args:
        name: the teacher's in the recipe.
        teacher: on the CPU, with the same weights everywhere (rank 0's are taken).
        placement: the recipe's.
        device: of this process.

    Raises:
        UserError: if the weights cannot be offloaded to files here.
    """

    def __init__(self, name: str, teacher: Teacher, placement: PlacementConfig, device: torch.device) -> None:
        super().__init__(teacher)
        self.offloads = placement.offload is not None
        config = zero_config(teacher, placement, device)
        self.folder = None
        if placement.offload == "nvme":
            self.folder = _folder(name, placement)
            config["zero_optimization"]["offload_param"]["nvme_path"] = str(self.folder)
        for buffer in teacher.buffers():
            buffer.data = buffer.data.to(device)
        self.buffer_bytes = count_bytes(list(teacher.buffers()))
        self.parameters = list(teacher.parameters())
        whole = _Whole(teacher).eval()
        # One after another, so that the device never holds all of them.
        deepspeed.zero.Init(module=whole, config_dict_or_path=config, dtype=teacher.dtype, mem_efficient_linear=False)
        self.calls_to_watch = WATCHED_CALLS
        # Before DeepSpeed's own hooks, which release what was gathered.
        self.handles = [module.register_forward_hook(self._look) for module in whole.modules()]
        self.engine, *_ = deepspeed.initialize(model=whole, config=config)
        self.engine.eval()
        # No backward follows. Left in place these hooks hand each module new tensor objects, and attention whose query,
        # key and value are not the same object computes by another kernel: targets that differ in the last bits.
        for handle in self.engine.optimizer.backward_hooks:
            handle.remove()
        self._look()

    @torch.no_grad()  # also around DeepSpeed's hooks, which by this know that no backward follows
    def _targets(self, pixels: Tensor) -> TeacherOutput:
        output = self.engine(pixels)
        if self.handles:
            self.calls_to_watch -= 1
            if not self.calls_to_watch:
                self._stop_watching()
            self._look()
        return output

    def _look(self, *_: Any) -> None:
        now = self.buffer_bytes
        gathers = self.offloads or dist.get_world_size() > 1  # else the only share is the whole
        for parameter in self.parameters:
            if not self.offloads:
                now += parameter.ds_tensor.nbytes
            if gathers and parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE:
                now += parameter.ds_numel * parameter.element_size()
        self._count(now - self.resident_bytes)

    def _stop_watching(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def release(self) -> None:
        """See :class:`PlacedTeacher`."""
        if self.released:
            return
        self._stop_watching()
        whole = self.engine.module
        self.engine.destroy()
        _forget_module(whole)
        for parameter in self.parameters:
            vars(parameter).clear()  # what DeepSpeed hung on it: its share, and what reads it from a file
        super().release()
        self.parameters = []
        del self.engine, whole
        gc.collect()  # the engine, its hooks and the modules refer to each other
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _forget_module(module: nn.Module) -> None:
    """DeepSpeed keeps what it has seen: in a list that never shrinks, and in the cache of a decorated method."""
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [entry for entry in stack if entry is not module]
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def zero_config(teacher: Teacher, placement: PlacementConfig, device: torch.device) -> dict[str, Any]:
    """The configuration of a teacher's engine; for nvme its files' folder is still missing."""
    units = [list(unit.parameters()) for unit in split(teacher.network)]
    largest = max(sum(p.numel() for p in unit) for unit in units)
    zero: dict[str, Any] = {
        "stage": 3,
        # Everything is divided: what is below the default's 100,000 values would stay whole.
        "stage3_param_persistence_threshold": 0,
        # One unit computes, one is gathered ahead.
        "stage3_prefetch_bucket_size": largest,
        "stage3_max_live_parameters": 2 * largest,
        "memory_efficient_linear": False,
    }
    if placement.offload:
        zero["offload_param"] = {"device": placement.offload, "pin_memory": device.type == "cuda"}
    if placement.offload == "nvme":
        # Host memory for the tensors of three units: one computes, one is gathered, one is read.
        shares = [-(-p.numel() // dist.get_world_size()) for p in teacher.parameters()]
        zero["offload_param"] |= {"buffer_size": max(shares), "buffer_count": 3 * max(map(len, units))}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31 - 1,
        "bf16": {"enabled": teacher.dtype == torch.bfloat16},
        "zero_optimization": zero,
    }


def _folder(name: str, placement: PlacementConfig) -> Path:
    """A folder of this process alone for the files of one teacher: DeepSpeed empties the one that it is given.

    Raises:
        UserError: if there cannot be one, or DeepSpeed could not use it.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    key = f"stages.pretrain.placement.{name}"
    if not AsyncIOBuilder().is_compatible():
        raise UserError(
            f"{key}.offload: nvme needs DeepSpeed's async_io, which needs libaio (Debian: libaio-dev); install it, or "
            "offload to cpu"
        )
    try:
        return Path(mkdtemp(prefix=f"teacher-{name}-", dir=placement.nvme_path))
    except OSError as error:
        raise UserError(f"{key}.nvme_path: {error}") from None
