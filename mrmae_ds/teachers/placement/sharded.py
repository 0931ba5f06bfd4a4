"""Sharded teachers: weights partitioned over ranks, each module's gathered while it runs.

Each teacher has its own DeepSpeed ZeRO-3 engine with its own configuration and no optimizer: two engines in a process
are independent as long as they share no dictionary. DeepSpeed's process-wide state stays as the student's engine set it
(``memory_efficient_linear``), or is restored at the end.
"""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from torch import Tensor, nn

from mrmae_ds.config.stages import PlacementConfig
from mrmae_ds.errors import UserError
from mrmae_ds.models.masking import VisibleSet
from mrmae_ds.teachers.base import Teacher, TeacherOutput
from mrmae_ds.teachers.placement.base import PlacedTeacher
from mrmae_ds.teachers.placement.offload_units import count_bytes, split_units

# Number of calls in which the peak of gathered bytes is measured: DeepSpeed prefetches from the second or third call
# on, and all later calls are alike.
MEASURED_CALLS = 4


class _ZeroParameter(nn.Parameter):
    """Type of a parameter that DeepSpeed partitioned; never instantiated.

    Attributes:
        ds_tensor: this rank's shard.
        ds_status: whether the whole parameter is gathered.
        ds_numel: number of values of the whole parameter.
    """

    ds_tensor: Tensor
    ds_status: ZeroParamStatus
    ds_numel: int


class _TeacherModule(nn.Module):
    """Module around a whole teacher, so that everything in a call happens inside a module that DeepSpeed hooks.

    Readers use weights outside the modules that own them (the class token, the last block's attention). DeepSpeed
    gathers such weights for the module that is running, and without this wrapper no module would be.
    """

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.network = teacher.network
        self.teacher = [teacher]  # in a list, so that it is not a submodule: its statistics are not partitioned

    def forward(self, pixels: Tensor, visible: VisibleSet | None) -> TeacherOutput:
        return self.teacher[0](pixels, visible)


class ShardedTeacher(PlacedTeacher):
    """A teacher with 1/N of its weights on each of N ranks.

    Args:
        name: key under ``teachers`` in the recipe.
        teacher: the teacher on the CPU, with equal weights on all ranks (rank 0's are used).
        placement: the recipe's placement.
        device: device of this rank.

    Raises:
        UserError: if weights cannot be offloaded to files on this machine.
    """

    def __init__(self, name: str, teacher: Teacher, placement: PlacementConfig, device: torch.device) -> None:
        super().__init__(teacher)
        self.offloads = placement.offload is not None
        config = zero_config(teacher, placement, device)
        self.folder: Path | None = None
        if placement.offload == "nvme":
            self.folder = _folder(name, placement)
            config["zero_optimization"]["offload_param"]["nvme_path"] = str(self.folder)
        for buffer in teacher.buffers():
            buffer.data = buffer.data.to(device)
        self.buffer_bytes = count_bytes(list(teacher.buffers()))
        self.parameters = list(teacher.parameters())
        module = _TeacherModule(teacher).eval()
        # Partitioned one parameter at a time, so that the device never holds all of them.
        deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=teacher.dtype, mem_efficient_linear=False)
        self.calls_to_measure = MEASURED_CALLS
        # Registered before DeepSpeed's own hooks, which release the gathered parameters.
        self.handles = [part.register_forward_hook(self._measure) for part in module.modules()]
        self.engine, *_ = deepspeed.initialize(model=module, config=config)
        self.engine.eval()
        # No backward follows. These hooks would pass new tensor objects to each module, and attention whose query, key
        # and value are not the same object uses another kernel, so that targets would differ in the last bits.
        for handle in self.engine.optimizer.backward_hooks:
            handle.remove()
        self._measure()

    @torch.no_grad()  # also around DeepSpeed's hooks, which infer from it that no backward follows
    def _targets(self, pixels: Tensor, visible: VisibleSet | None) -> TeacherOutput:
        output = self.engine(pixels, visible)
        if self.handles:
            self.calls_to_measure -= 1
            if not self.calls_to_measure:
                self._stop_measuring()
            self._measure()
        return output

    def _measure(self, *_: Any) -> None:
        now = self.buffer_bytes
        gathers = self.offloads or dist.get_world_size() > 1  # otherwise the only shard is the whole parameter
        for parameter in cast("list[_ZeroParameter]", self.parameters):  # zero.Init added the attributes
            if not self.offloads:
                now += parameter.ds_tensor.nbytes
            if gathers and parameter.ds_status != ZeroParamStatus.NOT_AVAILABLE:
                now += parameter.ds_numel * parameter.element_size()
        self._count(now - self.resident_bytes)

    def _stop_measuring(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def release(self) -> None:
        """Free the memory of the weights, the engine and its files; the teacher's attributes stay."""
        if self.released:
            return
        self._stop_measuring()
        module = self.engine.module
        self.engine.destroy()
        _remove_references(module)
        for parameter in self.parameters:
            vars(parameter).clear()  # DeepSpeed's attributes: the shard, and the reader of its file
        super().release()
        self.parameters = []
        del self.engine, module
        gc.collect()  # the engine, its hooks and the modules refer to each other
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _remove_references(module: nn.Module) -> None:
    """Remove DeepSpeed's global references to a module: a list that never shrinks and the cache of a method."""
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [entry for entry in stack if entry is not module]
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()


def zero_config(teacher: Teacher, placement: PlacementConfig, device: torch.device) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a teacher's engine; for nvme the caller adds the folder of the files.

    Args:
        teacher: the teacher, not yet partitioned.
        placement: the recipe's placement.
        device: device of this rank.
    """
    units = [list(unit.parameters()) for unit in split_units(teacher.network)]
    largest = max(sum(p.numel() for p in unit) for unit in units)
    zero: dict[str, Any] = {
        "stage": 3,
        # Partition everything: by default parameters below 100,000 values stay whole.
        "stage3_param_persistence_threshold": 0,
        # One unit computes, one is prefetched.
        "stage3_prefetch_bucket_size": largest,
        "stage3_max_live_parameters": 2 * largest,
        "memory_efficient_linear": False,
    }
    if placement.offload:
        zero["offload_param"] = {"device": placement.offload, "pin_memory": device.type == "cuda"}
    if placement.offload == "nvme":
        # Host buffers for the tensors of three units: one computes, one is gathered, one is read.
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
    """Create a folder for this rank and teacher; DeepSpeed empties the folder that it is given.

    Raises:
        UserError: if the folder cannot be created, or DeepSpeed cannot use it.
    """
    # Imported late: importing the op builders probes the machine's compilers and CUDA.
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
