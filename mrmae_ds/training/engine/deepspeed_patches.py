"""Small edits of DeepSpeed's source, applied in memory before an engine is built.

An edit replaces a passage of one function. The passage itself is looked for, so another DeepSpeed that changed it is
noticed: the patch is left out with one warning. ``docs/patches`` holds every patch as a file for upstream, which
``python -m tests.support.write_patches`` writes from the edits here; docs/deepspeed_patches.md explains them.
"""

from __future__ import annotations

import inspect
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import CodeType, FunctionType
from typing import Any

import deepspeed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Edit:
    """A passage of DeepSpeed that is replaced.

    Attributes:
        module: path of its module.
        function: name of the function there, or ``Class.method``.
        before: passage of its source, which must occur once in the function.
        after: the passage in its place, of as many lines or more.
    """

    module: str
    function: str
    before: str
    after: str

    def target(self) -> FunctionType:
        """Return the function, without decorators.

        Raises:
            LookupError: if DeepSpeed has no such function.
        """
        found: Any = import_module(self.module)
        for name in self.function.split("."):
            found = getattr(found, name, None)
        # DeepSpeed's own decorators keep what they wrap only in a closure.
        while isinstance(found, FunctionType) and found.__code__.co_name != name:
            cells = [cell.cell_contents for cell in found.__closure__ or ()]
            found = next((cell for cell in cells if isinstance(cell, FunctionType)), None)
        if not isinstance(found, FunctionType):
            raise LookupError(f"{self.module} has no function {self.function}")
        return found

    def fits(self) -> bool:
        """Return True if the passage is where it is expected."""
        try:
            return inspect.getsource(self.target()).count(self.before) == 1
        except (ImportError, LookupError, OSError):
            return False


@dataclass(frozen=True)
class Patch:
    """Edits that belong together.

    Attributes:
        name: of its file in docs/patches, without suffix.
        without: consequence of leaving it out, in words.
        edits: all of them, or none, are applied.
    """

    name: str
    without: str
    edits: tuple[Edit, ...]


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
)


@cache
def apply_patches() -> None:
    """Edit DeepSpeed in this process, once; leave out, with a warning, a patch that does not fit this DeepSpeed."""
    edits: defaultdict[FunctionType, list[Edit]] = defaultdict(list)
    for patch in PATCHES:
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
        # The code and not the function: other modules have imported the function by name.
        function.__code__ = edited_code(function, own)


def edited_code(function: FunctionType, edits: Sequence[Edit]) -> CodeType:
    """Compile a function of DeepSpeed with edits.

    Args:
        function: a function of a module, or a method, not yet edited.
        edits: of this function; each fits.

    Returns:
        The code, whose line numbers are those of the file up to an edit that adds lines.
    """
    source = edited_source(function, edits)
    line = function.__code__.co_firstlineno
    *owners, name = function.__qualname__.split(".")
    # Inside a class of the same name, so that the indentation and private names are right.
    header = "".join(f"class {owner}:\n" for owner in owners)
    padding = "\n" * (line - 1 - len(owners))
    flags = function.__code__.co_flags & annotations.compiler_flag  # the file's own __future__
    filename = function.__code__.co_filename
    code = compile(padding + header + source, filename, "exec", flags, dont_inherit=True)
    for inner in (*owners, name):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == inner)
    return code


def edited_source(function: FunctionType, edits: Sequence[Edit]) -> str:
    """Return the source of a function of DeepSpeed with edits."""
    source = inspect.getsource(function)
    for edit in edits:
        source = source.replace(edit.before, edit.after)
    return source
