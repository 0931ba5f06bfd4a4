"""train.py, disturbed: slowed down as a file says, or with an exception on one rank. Its arguments are train.py's.

PACE    a file with the seconds that a step lasts longer
RAISE   "RANK STEP": where an exception comes from
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

undisturbed = deepspeed.DeepSpeedEngine.step


def step(engine: deepspeed.DeepSpeedEngine, *arguments: Any, **options: Any) -> Any:
    """An optimizer step, and what disturbs it."""
    if pace := os.environ.get("PACE"):
        time.sleep(float(Path(pace).read_text()))
    if os.environ.get("RAISE") == f"{launch.rank} {engine.global_steps}":
        raise ArithmeticError("a disturbance")
    return undisturbed(engine, *arguments, **options)


deepspeed.DeepSpeedEngine.step = step
sys.argv[0] = str(REPOSITORY / "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
