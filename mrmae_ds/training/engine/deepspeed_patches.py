"""Small edits of DeepSpeed's source, applied in memory before an engine is built.

An edit replaces a passage of one function. The passage itself is looked for, so another DeepSpeed that changed it is
noticed: the patch is left out with one warning. ``docs/patches`` holds every patch as a file for upstream, which
``python -m tests.support.write_patches`` writes from the edits here; docs/deepspeed_patches.md explains them.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from functools import cache
from types import FunctionType

import deepspeed
from deepspeed.utils import nvtx

from mrmae_ds.training.engine.deepspeed_edits import Edit, Patch, added_methods, edited_code
from mrmae_ds.training.engine.zero3_patch import ZERO3_HOST_TIME

logger = logging.getLogger(__name__)


_STAGE_1_AND_2 = "deepspeed.runtime.zero.stage_1_and_2"
_MINUS_ONE = "torch.tensor(-1.0, device={}, dtype=torch.float)"

PATCHES = (
    Patch(
        "norm-without-wait",
        "the host waits for the GPU once or twice per parameter group and step",
        (
            Edit(
                "deepspeed.runtime.utils",
                "mask_nan_or_inf_with_val_inplace",
                f"    err = {_MINUS_ONE.format('device')}\n    input.masked_fill_(inf_or_nan, err)\n",
                "    # A number is an argument of the kernel; a tensor would be uploaded and read back.\n"
                "    input.masked_fill_(inf_or_nan, val)\n",
            ),
            Edit(
                "deepspeed.runtime.zero.stage3",
                "DeepSpeedZeroOptimizer_Stage3.get_grad_norm_direct",
                _MINUS_ONE.format("self.device"),
                "torch.full((), -1.0, device=self.device, dtype=torch.float)",
            ),
        ),
    ),
    Patch(
        "offload-norms-at-once",
        "with an offloaded optimizer under ZeRO-1 and 2 the host waits for the GPU twice per parameter and step",
        (
            Edit(
                _STAGE_1_AND_2,
                "DeepSpeedZeroOptimizer.complete_grad_norm_calculation_for_cpu_offload",
                "        total_norm = 0.0\n",
                "        norms = []\n",
            ),
            Edit(
                _STAGE_1_AND_2,
                "DeepSpeedZeroOptimizer.complete_grad_norm_calculation_for_cpu_offload",
                "total_norm += param_norm.item()**2\n",
                "norms.append(param_norm)\n",
            ),
            Edit(
                _STAGE_1_AND_2,
                "DeepSpeedZeroOptimizer.complete_grad_norm_calculation_for_cpu_offload",
                "        # Sum across all model parallel GPUs.\n",
                "        total_norm = 0.0\n"
                "        for norm in torch.stack(norms).tolist() if norms else []:\n"
                "            total_norm += norm**2\n"
                "\n"
                "        # Sum across all model parallel GPUs.\n",
            ),
            Edit(
                _STAGE_1_AND_2,
                "DeepSpeedZeroOptimizer.update_offload_overflow_tracker",
                "        if grad is not None and self._has_inf_or_nan(grad.data):\n"
                "            self.local_overflow = True\n",
                "        # A tensor stays on the device until the step reads it, if the step checks for overflow.\n"
                "        if grad is not None and self.check_grad_overflow:\n"
                "            self.local_overflow = self._has_inf_or_nan(grad.data) | self.local_overflow\n",
            ),
        ),
    ),
    ZERO3_HOST_TIME,
)


@cache
def apply_patches() -> None:
    """Edit DeepSpeed in this process, once; leave out patches that its files have, and, with a warning, misfits."""
    nvtx.enable_nvtx = False  # ranges around its functions, hundreds of them in a micro-batch
    edits: defaultdict[FunctionType, list[Edit]] = defaultdict(list)
    for patch in PATCHES:
        if all(edit.applied() for edit in patch.edits):
            continue
        misfits = [f"{edit.module}.{edit.function}" for edit in patch.edits if not edit.fits()]
        if misfits:
            logger.warning(
                "DeepSpeed %s differs from 0.19.8 in %s, so mrmae_ds cannot apply its patch %s: %s. Results are the "
                "same; to train faster, install deepspeed 0.19.8",
                deepspeed.__version__,
                ", ".join(misfits),
                patch.name,
                patch.without,
            )
            continue
        for edit in patch.edits:
            edits[edit.target()].append(edit)
    for function, own in edits.items():
        for owner, method in added_methods(function, own):
            setattr(owner, method.__name__, method)
        # The code and not the function: other modules have imported the function by name.
        function.__code__ = edited_code(function, own)
