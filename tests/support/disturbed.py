"""Run train.py with delayed steps, or with an exception on one rank. The arguments are train.py's.

Environment variables:
    PACE    file that holds the delay of each step in seconds
    RAISE   "RANK STEP": rank and step of the exception
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from mrmae_ds.distributed.launch import prepare_environment  # noqa: E402

launch = prepare_environment()
import deepspeed  # noqa: E402

original_step = deepspeed.DeepSpeedEngine.step


def step(engine: deepspeed.DeepSpeedEngine, *arguments: Any, **options: Any) -> Any:
    """Delay or fail, then run the optimizer step."""
    if pace := os.environ.get("PACE"):
        time.sleep(float(Path(pace).read_text()))
    if os.environ.get("RAISE") == f"{launch.rank} {engine.global_steps}":
        raise ArithmeticError("a disturbance")
    return original_step(engine, *arguments, **options)


deepspeed.DeepSpeedEngine.step = step
sys.argv[0] = str(REPOSITORY / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
