"""Resuming on another number of ranks: DeepSpeed's universal checkpoints, and the repairs that they need.

A ZeRO checkpoint has as many shards as ranks wrote it. DeepSpeed's ``ds_to_universal`` converts them to one file per
parameter, which any number of ranks can load. The conversion is made once, into ``checkpoints/.universal-TAG``, and
reused by later starts. When it loads a conversion, DeepSpeed 0.19.8

* gives every parameter group the first one's learning rate, weight decay and scale,
* lets all groups share one step counter, so that Adam counts as many steps as there are groups,
* leaves frozen parameters and buffers as the model was built.

:func:`load_universal` corrects all three.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from mrmae_ds.distributed.collectives import raise_on_all_ranks
from mrmae_ds.files import flush_folder, write_text
from mrmae_ds.training.checkpoint import folder as store
from mrmae_ds.training.checkpoint.manifest import Manifest

logger = logging.getLogger(__name__)
FIXED = "fixed.pt"  # frozen parameters and buffers
SOURCE = "source.json"  # the checkpoint that was converted, and the sizes of the files made of it


def universal_folder(checkpoint: Path) -> Path:
    """Return the folder of a checkpoint's conversion."""
    return checkpoint.with_name(store.UNIVERSAL + checkpoint.name)


def is_converted(checkpoint: Path, manifest: Manifest) -> bool:
    """Return True if the conversion of this very checkpoint exists, with every file."""
    folder = universal_folder(checkpoint)
    try:
        source = json.loads((folder / SOURCE).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in source["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return source["id"] == manifest.id and sizes == source["files"]


def convert(checkpoint: Path, manifest: Manifest) -> Path:
    """Convert a verified checkpoint, unless it is converted already. All ranks must call it; rank 0 works.

    Returns:
        The conversion's folder.

    Raises:
        CollectiveError: on every rank, if it fails (a full disk, a state without optimizer steps).
    """
    error = None
    if dist.get_rank() == 0 and not is_converted(checkpoint, manifest):
        try:
            logger.info("%s: converting for %d ranks, once", checkpoint, dist.get_world_size())
            _convert(checkpoint, manifest)
        except Exception as raised:
            error = f"{checkpoint}: cannot be converted ({type(raised).__name__}: {raised})"
    raise_on_all_ranks(error)
    return universal_folder(checkpoint)


def _convert(checkpoint: Path, manifest: Manifest) -> None:
    from deepspeed.checkpoint import ds_to_universal

    folder = universal_folder(checkpoint)
    # DeepSpeed writes a pointer beside its output, so the output is one level down.
    work = checkpoint.with_name(store.SAVING + folder.name)
    store.remove(work)
    store.remove(folder)
    made = work / "made"
    made.mkdir(parents=True)
    options = argparse.Namespace(
        input_folder=str(checkpoint),
        output_folder=str(made),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)
    torch.save(_fixed_tensors(checkpoint, manifest.layout.zero_stage, made), made / FIXED)
    files = {path.relative_to(made).as_posix(): path.stat().st_size for path in made.rglob("*") if path.is_file()}
    write_text(made / SOURCE, json.dumps({"id": manifest.id, "files": files}))
    for path in (p for p in made.rglob("*") if p.is_dir()):
        flush_folder(path)
    made.rename(folder)
    flush_folder(folder.parent)
    store.remove(work)


def _fixed_tensors(checkpoint: Path, zero_stage: int, made: Path) -> dict[str, Tensor]:
    """Return all tensors not managed by the optimizer (buffers, frozen parameters), unsharded, on the CPU."""
    if zero_stage == 3:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(io.StringIO()):
            state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    else:  # every rank has the full model
        path = checkpoint / "mp_rank_00_model_states.pt"
        state = torch.load(path, map_location="cpu", weights_only=False)["module"]
    owned = {path.name for path in (made / "zero").iterdir() if (path / "exp_avg.pt").is_file()}
    return {name: tensor.clone() for name, tensor in state.items() if name not in owned}


def load_universal(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Load a conversion into a new engine, on any number of ranks. All ranks must call it.

    Raises:
        RuntimeError: if DeepSpeed loads nothing, or the frozen parameters and buffers differ.
    """
    groups = [{key: value for key, value in g.items() if key != "params"} for g in engine.optimizer.param_groups]
    with _universal(engine):
        loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded is None:
        raise RuntimeError(f"{folder}: DeepSpeed loaded nothing from it")
    _restore_groups(engine, groups)
    _separate_steps(engine)
    _load_fixed(engine, torch.load(folder / FIXED, map_location="cpu", weights_only=True))


@contextlib.contextmanager
def _universal(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Set the engine config's ``checkpoint.load_universal`` for one load."""
    config = engine._config
    before, config.load_universal_checkpoint = config.load_universal_checkpoint, True
    try:
        yield
    finally:
        config.load_universal_checkpoint = before


def _restore_groups(engine: deepspeed.DeepSpeedEngine, groups: list[dict[str, Any]]) -> None:
    """Restore the settings of each parameter group."""
    for group, before in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(before)


def _separate_steps(engine: deepspeed.DeepSpeedEngine) -> None:
    """Give each parameter's state a step counter of its own."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for state in inner.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def _load_fixed(engine: deepspeed.DeepSpeedEngine, fixed: dict[str, Tensor]) -> None:
    """Write frozen parameters and buffers; under ZeRO-3 every rank receives its shard of rank 0's copy."""
    module = engine.module
    targets = dict(module.named_parameters()) | dict(module.named_buffers())
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    if differing := (frozen - fixed.keys()) | (fixed.keys() - targets.keys()):
        raise RuntimeError(f"frozen parameters and buffers differ: {sorted(differing)}")
    for name, tensor in fixed.items():
        target = targets[name]
        partitioned = hasattr(target, "ds_id")
        with torch.no_grad(), deepspeed.zero.GatheredParameters([target], modifier_rank=0, enabled=partitioned):
            if not partitioned or dist.get_rank() == 0:
                target.data.copy_(tensor)
