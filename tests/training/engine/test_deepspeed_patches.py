"""Patched functions of DeepSpeed return what the originals return, and the files for upstream are the patches."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from types import FunctionType, SimpleNamespace

import deepspeed
import pytest
import torch
from deepspeed.runtime.utils import has_inf_or_nan
from torch import Tensor

from mrmae_ds.training.engine import deepspeed_edits, deepspeed_patches
from mrmae_ds.training.engine.deepspeed_edits import Edit, Patch, edited_code
from mrmae_ds.training.engine.deepspeed_patches import PATCHES, apply_patches
from tests.support.write_patches import FOLDER, unified_diff

NORM, DIRECT = PATCHES[0].edits
OFFLOADED, OVERFLOW = PATCHES[1].edits[0], PATCHES[1].edits[-1]


def _both(edit: Edit) -> list[FunctionType]:
    """Return a function as DeepSpeed has it, and edited."""
    functions = []
    target = edit.target()
    for edits in ([], _edits_of(target)):
        code = edited_code(target, edits)
        functions.append(FunctionType(code, target.__globals__, target.__name__, target.__defaults__))
    return functions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [2.5, 0.0, math.nan, math.inf, -math.inf])
def test_equal_mask_of_norms(value: float, dtype: torch.dtype) -> None:
    norms = [torch.tensor(value, dtype=dtype) for _ in range(2)]
    for mask, norm in zip(_both(NORM), norms, strict=True):
        mask(norm, device=norm.device)
    assert _same(*norms)
    assert norms[1] == (value if math.isfinite(value) else -1)


@pytest.mark.parametrize("value", [2.5, math.nan, math.inf])
def test_equal_direct_norm(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = SimpleNamespace(all_reduce=lambda *_, **__: None, ReduceOp=_Op)
    monkeypatch.setitem(DIRECT.target().__globals__, "dist", alone)
    optimizer = SimpleNamespace(
        _assert_same_partition_group=lambda params: None,
        _get_param_partition_group=lambda param: None,
        _grad_norm_counts_every_rank=lambda params, group: True,
        _autoep_expert_parallel_group=lambda params: None,
        model_parallel_rank=0,
        device=torch.device("cpu"),
    )
    gradients = [torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([value, 1.0])]
    norms = [norm(optimizer, gradients, gradients) for norm in _both(DIRECT)]
    assert _same(*norms)
    assert (norms[1] > 0) == math.isfinite(value)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_equal_norm_of_offloaded_gradients(bad: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The squares are summed in the same order, in double precision."""
    alone = SimpleNamespace(all_reduce=lambda *_, **__: None, ReduceOp=_Op)
    monkeypatch.setitem(OFFLOADED.target().__globals__, "dist", alone)
    parameters = list(torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    norms = {id(p): p.clone() if bad is None or i else torch.tensor(bad) for i, p in enumerate(parameters)}
    optimizer = SimpleNamespace(
        norm_for_param_grads=norms,
        get_param_id=id,
        model_parallel_rank=0,
        device=torch.device("cpu"),
        dp_process_group=None,
        _model_parallel_all_reduce=lambda **_: None,
    )
    theirs, ours = (norm(optimizer, parameters) for norm in _both(OFFLOADED))
    assert _same(theirs, ours)
    assert (ours > 0) == (bad is None)


@pytest.mark.parametrize("values", [[1.0, 2.0], [math.nan, 2.0], [1.0, -math.inf]])
def test_equal_overflow_of_offloaded_gradients(values: list[float]) -> None:
    found = []
    for track in _both(OVERFLOW):
        optimizer = SimpleNamespace(local_overflow=False, check_grad_overflow=True, _has_inf_or_nan=has_inf_or_nan)
        for value in values:
            track(optimizer, torch.tensor([0.0, value]))
        found.append(bool(torch.ByteTensor([optimizer.local_overflow])[0]))  # as DeepSpeed reads it
    assert found[0] == found[1] == (not all(map(math.isfinite, values)))


class _Op:
    SUM = MAX = None


def _same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_applied_to_the_installed_version(patch: Patch) -> None:
    """Every name under which another module of DeepSpeed imported the function runs the edited code."""
    apply_patches()
    for edit in patch.edits:
        assert edit.target().__code__ == edited_code(edit.target(), _edits_of(edit.target()))
        assert edit.target().__code__ != edited_code(edit.target(), [])
        assert edit.target().__code__.co_firstlineno == edited_code(edit.target(), []).co_firstlineno


def _edits_of(function: FunctionType) -> list[Edit]:
    return [edit for patch in PATCHES for edit in patch.edits if edit.target() is function]


def test_names_what_a_changed_deepspeed_lacks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = dataclasses.replace(NORM, before="a passage that DeepSpeed dropped")
    renamed = dataclasses.replace(DIRECT, function="DeepSpeedZeroOptimizer_Stage3.renamed")
    before = copy.copy(NORM.target().__code__)
    monkeypatch.setattr(deepspeed_patches, "PATCHES", (dataclasses.replace(PATCHES[0], edits=(other, renamed, NORM)),))
    monkeypatch.setattr(deepspeed, "__version__", "0.20.0")
    with caplog.at_level(logging.WARNING):
        apply_patches.__wrapped__()
    assert len(caplog.records) == 1
    for part in ("0.20.0", "utils.mask_nan_or_inf_with_val_inplace", "Stage3.renamed", "deepspeed 0.19.8", "waits"):
        assert part in caplog.text
    assert NORM.target().__code__ == before


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_committed_patch_is_current_and_applies_to_the_installed_deepspeed(patch: Patch, tmp_path: Path) -> None:
    """The committed file is the patch, and applies to the installed files."""
    file = FOLDER / f"{patch.name}.patch"
    assert file.read_text() == unified_diff(patch), "run python -m tests.support.write_patches"
    _copies([patch], tmp_path)
    subprocess.run(["git", "apply", "--check", str(file)], cwd=tmp_path, check=True)


def test_patched_files_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A DeepSpeed to which the committed files were applied needs no edit and gives no warning."""
    copies = _copies(PATCHES, tmp_path)
    assert not any(all(edit.applied() for edit in patch.edits) for patch in PATCHES)
    for patch in PATCHES:
        subprocess.run(["git", "apply", str(FOLDER / f"{patch.name}.patch")], cwd=tmp_path, check=True)
    targets = [edit.target() for patch in PATCHES for edit in patch.edits]
    before = [target.__code__ for target in targets]
    source = SimpleNamespace(getsource=lambda module: copies[module.__name__].read_text())
    monkeypatch.setattr(deepspeed_edits, "inspect", source)
    with caplog.at_level(logging.WARNING):
        apply_patches.__wrapped__()
    assert not caplog.records
    assert [target.__code__ for target in targets] == before


def _copies(patches: Iterable[Patch], folder: Path) -> dict[str, Path]:
    """Copy the installed files that patches change; return the copies by module."""
    copies = {}
    for module in {edit.module for patch in patches for edit in patch.edits}:
        name = module.replace(".", "/") + ".py"
        copies[module] = folder / name
        copies[module].parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(deepspeed.__file__).parents[1] / name, copies[module])
    return copies
