"""All checks, in the order in which they run."""

from __future__ import annotations

from mrmae_ds.doctor.attention import check_attention
from mrmae_ds.doctor.context import Check
from mrmae_ds.doctor.host import check_host
from mrmae_ds.doctor.kernels import check_bandwidth, check_convolution, check_launch, check_products
from mrmae_ds.doctor.links import check_network, check_node_links, check_start
from mrmae_ds.doctor.loader import check_loader
from mrmae_ds.doctor.node import check_binding, check_driver, check_imports, check_limits
from mrmae_ds.doctor.numerics import check_engines, check_parity
from mrmae_ds.doctor.operators import check_operators
from mrmae_ds.doctor.placements import check_placements
from mrmae_ds.doctor.resume import check_resume
from mrmae_ds.doctor.steps import check_memory, check_steps, check_waits

# All checks after it need the process group.
START = Check("start", check_start, "MASTER_ADDR, NCCL_SOCKET_IFNAME, NCCL_IB_HCA", 120, True)
CHECKS: tuple[Check, ...] = (
    Check("driver", check_driver, "whether the node can be used; MFU is logged for known GPUs only", 60, True),
    Check("imports", check_imports, "compile.blocks, NVMe offload", 60),
    Check("binding", check_binding, "the launcher's GPU binding", 150, True),
    Check("limits", check_limits, "cores per task, container's /dev/shm, loader.num_workers", 60),
    START,
    Check("launch", check_launch, "train_micro_batch_size_per_gpu, mrmae plan --measured", 60, True),
    Check("bandwidth", check_bandwidth, "stages.pretrain.placement, mrmae plan --measured", 60),
    Check("products", check_products, "mrmae plan --measured", 60),
    Check("operators", check_operators, "mrmae plan --measured", 120),
    Check("attention", check_attention, "the attention backend, deterministic runs", 120),
    Check("convolution", check_convolution, "torch.backends.cudnn.benchmark", 120),
    Check("parity", check_parity, "whether the CUDA path is correct", 120, True),
    Check("engines", check_engines, "zero_optimization.stage, bf16, torch_autocast, compile.blocks", 600),
    Check("placements", check_placements, "stages.pretrain.placement", 180),
    Check("waits", check_waits, "regressions of the training loop", 120),
    Check("host", check_host, "zero_optimization.stage, train_micro_batch_size_per_gpu", 300),
    Check("steps", check_steps, "the engine config: ZeRO stage, micro-batch, compile.blocks", 900, True),
    Check("memory", check_memory, "train_micro_batch_size_per_gpu by mrmae plan", 300),
    Check("loader", check_loader, "loader.num_workers, loader.cache_dir, data.backend", 240),
    Check("links", check_node_links, "mrmae plan --measured", 120, True),
    Check("network", check_network, "NCCL_SOCKET_IFNAME, NCCL_IB_HCA, mrmae plan --measured", 120),
    Check("resume", check_resume, "restarts by Slurm; deterministic runs", 240),
)
