"""Count what a micro-batch of pre-training issues on the GPU stand-in, without an engine; print it as JSON.

python -m tests.planning.issued NAME [key.path=value ...]     # with the environment of preload.variables(timing=True)
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mrmae_ds.config.engine import load_engine_config
from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.doctor.workload import noise_batches
from mrmae_ds.planning.operator_trace import VIEW, operator_cost
from mrmae_ds.training.tasks.base import MicroBatchKey
from tests.support.fake_gpu.report import Counters
from tests.support.fake_gpu.watch import adapt_torch, build_empty_task
from tests.support.processes import REPOSITORY


class CountOperators(TorchDispatchMode):
    """Count the operators with kernels, and those of them that are a whole attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.fused_layers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.count += operator_cost(func, args, kwargs or {}, outputs).kind != VIEW
        self.fused_layers += func._overloadpacket is torch.ops.aten._native_multi_head_attention
        return outputs


def main() -> None:
    """Run micro-batches, and count those of the last."""
    name, *overrides = sys.argv[1:]
    adapt_torch()
    config, device = load_engine_config(REPOSITORY / f"ds_configs/{name}.json"), torch.device("cuda:0")
    recipe = load_recipe(REPOSITORY / f"ds_configs/{name}.yaml", overrides)
    task = build_empty_task(recipe, config)
    task.model.to(device, config.model_dtype)
    task.to(device)
    batch = next(noise_batches(config.micro_batch, task.image_size, device))
    key = MicroBatchKey(0, 0, 0, 0, 1, config.micro_batch)
    counters = Counters()
    for _ in range(2):  # the first chooses kernels
        task.model.zero_grad()
        counters.reset()
        with CountOperators() as operators:
            with config.autocast(device):
                loss = task.losses(task.model, batch, key)["loss"]
            loss.backward()
    found = {"operators": operators.count, "fused_layers": operators.fused_layers, **counters.read()}
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
