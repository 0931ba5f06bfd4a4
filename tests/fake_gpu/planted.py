"""Train with a planted mistake on the GPU stand-in: ``planted.py NAME ... -- ARGUMENTS OF train.py``.

Each is a mistake that the CPU forgives and a GPU does not.
"""

from __future__ import annotations

import inspect
import os
import sys
import textwrap
from typing import Any

from mrmae_ds.cli import train


def overwritten() -> None:
    """Let the loader reuse its buffers without waiting for their copies: the copies may read the next images."""
    from mrmae_ds.data.loaders import ffcv

    source = textwrap.dedent(inspect.getsource(ffcv.FFCVLoader._deliver))
    guard = "finished.synchronize()"
    if source.count(guard) != 1:
        raise RuntimeError(f"the loader has not one {guard}: plant this mistake elsewhere")
    exec(compile(source.replace(guard, "pass"), ffcv.__file__, "exec"), vars(ffcv))
    ffcv.FFCVLoader._deliver = vars(ffcv).pop("_deliver")  # type: ignore[method-assign]


def item() -> None:
    """Read a value after each step: the host waits for the device."""
    from mrmae_ds.training.tasks.pretrain import PretrainTask

    PretrainTask.after_step = lambda task, epoch: next(task.model.parameters()).sum().item()  # type: ignore[method-assign]


def cpu_tensor() -> None:
    """Add a tensor on the CPU to the loss."""
    import torch

    from mrmae_ds.models.pretrain import PretrainModel

    forward = PretrainModel.forward

    def changed(model: PretrainModel, *inputs: Any) -> dict[str, Any]:
        losses = forward(model, *inputs)
        return {**losses, "loss": (losses["loss"] + torch.zeros(2)).sum()}

    PretrainModel.forward = changed  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    train.prepare_environment()
    names = sys.argv[1 : sys.argv.index("--")]
    for name in names:
        globals()[name]()
    status = train.main(sys.argv[len(names) + 2 :])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
