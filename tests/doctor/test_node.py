"""Checks of the node, with a false nvidia-smi and false ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mrmae_ds.distributed.launch import Launch
from mrmae_ds.doctor import node
from mrmae_ds.doctor.context import DoctorContext, DoctorRequest
from mrmae_ds.doctor.ranks import RankStore
from mrmae_ds.doctor.reading import HardFailure, NotApplicable


def _context(launch: Launch | None = None) -> DoctorContext:
    launch = launch or Launch(0, 0, 1, 1)
    ranks = RankStore(Launch(0, 0, 1, 1))
    return DoctorContext(DoctorRequest(), launch, torch.device("cpu"), None, ranks, Path("unused"))


def _program(folder: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{output}'\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_gpus_that_torch_does_not_find_are_a_hard_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(tmp_path, monkeypatch, r"NVIDIA H100\nNVIDIA H100\n")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    with pytest.raises(HardFailure, match=r"lists 2 GPUs, but torch .* finds none: .*driver's version"):
        node.check_driver(_context())
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    with pytest.raises(NotApplicable, match="needs CUDA"):
        node.check_driver(_context())


def test_a_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.shutil, "which", lambda name: None)
    values = {reading.name: reading.value for reading in node.check_imports(_context())}
    assert str(values["compile.blocks"]).startswith("not possible, missing a C compiler")
    assert values["torch"] == str(torch.__version__)


@pytest.mark.parametrize(
    ("gathered", "message"),
    [
        ([["a", "0"], ["a", "1"], ["a", "0"]], "ranks 0, 2 share LOCAL_RANK 0 of a"),
        ([["a", "0"], None], "rank 1 did not start"),
    ],
)
def test_a_wrong_binding_is_a_hard_failure(gathered: list[Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context = _context(Launch(0, 0, len(gathered), len(gathered)))
    monkeypatch.setattr(context.ranks, "gather", lambda value: gathered)
    with pytest.raises(HardFailure, match=message):
        node.check_binding(context)


def test_the_same_local_rank_on_two_nodes_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    context = _context(Launch(0, 0, 2, 1))
    monkeypatch.setattr(context.ranks, "gather", lambda value: [["a", "0"], ["b", "0"]])
    assert node.check_binding(context)


def test_shared_memory_is_divided_among_the_ranks_of_a_node() -> None:
    def free(ranks: int) -> Any:
        return node.check_limits(_context(Launch(0, 0, ranks, ranks)))[0].value

    assert free(4) == pytest.approx(free(1) / 4, rel=0.2)
