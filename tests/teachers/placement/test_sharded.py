"""Sharded teachers: :mod:`tests.support.sharded_worker` on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mrmae_ds.config.stages import PlacementConfig
from mrmae_ds.errors import UserError
from mrmae_ds.teachers.placement import sharded
from tests.support.placed import TEACHERS
from tests.support.ranks import run_in_group
from tests.support.sharded_worker import PLACEMENTS, measure

pytestmark = pytest.mark.multi_process

OFFLOADED = ["clip, offload", "resnet, offload"]


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the result of each rank."""
    folder = tmp_path_factory.mktemp("sharded")
    run_in_group(measure, request.param, folder, False, limit_s=280)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("name", [*TEACHERS, *OFFLOADED])
def test_targets_are_those_of_a_whole_teacher_to_the_last_bit(name: str, ranks: list[dict[str, Any]]) -> None:
    assert [rank["targets"][name]["equal"] for rank in ranks] == [[True] * 4] * len(ranks)


@pytest.mark.parametrize("name", [*TEACHERS, *OFFLOADED])
def test_each_rank_holds_its_shard_and_a_few_gathered_blocks(name: str, ranks: list[dict[str, Any]]) -> None:
    for seen in (rank["targets"][name] for rank in ranks):
        share = 0 if name in OFFLOADED else (seen["all"] - seen["buffers"]) / len(ranks)
        assert seen["present"] == seen["buffers"]  # no parameter is whole between calls
        assert set(seen["between"]) == {seen["between"][0]}
        assert seen["between"][0] == pytest.approx(share + seen["buffers"], rel=0.02)
        gathered = seen["peak"] - seen["between"][0]
        if len(ranks) > 1 or name in OFFLOADED:
            assert seen["unit"] <= gathered <= 2.5 * seen["unit"]
        else:  # its share is the whole, of which no copy is made
            assert gathered == 0


@pytest.mark.parametrize("name", [*TEACHERS, *OFFLOADED])
def test_weights_engine_and_network_are_gone_after_the_last_use(name: str, ranks: list[dict[str, Any]]) -> None:
    for seen in (rank["targets"][name] for rank in ranks):
        assert (seen["left"], seen["gone"], seen["stack"]) == (0, True, 0)


def test_training_does_not_depend_on_the_teacher_placement(ranks: list[dict[str, Any]]) -> None:
    for losses in (rank["losses"] for rank in ranks):
        assert losses.keys() == PLACEMENTS.keys()
        assert len(set(losses["device"])) == len(losses["device"])
        assert all(values == losses["device"] for values in losses.values())


def test_other_linear_layers_are_computed_as_before(ranks: list[dict[str, Any]]) -> None:
    assert not any(rank["patched"] for rank in ranks)


@pytest.mark.slow  # DeepSpeed compiles two of its extensions first
@pytest.mark.timeout(1300)
def test_shards_on_nvme_are_read_back_unchanged_and_removed(tmp_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("libaio is not installed")
    run_in_group(measure, 2, tmp_path, True, limit_s=1200)
    for seen in (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)):
        assert seen["equal"] == [True] * 4
        assert seen["files"] > 0.5 * seen["all"] / 2  # what is smaller than a megabyte stays in memory
        assert set(seen["between"]) == {seen["buffers"]}
        assert (seen["left"], seen["gone"]) == (0, True)
    assert not list(tmp_path.rglob("*.swp"))


def test_unusable_nvme_folder_raises_before_the_weights_move(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    placement = PlacementConfig(kind="sharded", offload="nvme", nvme_path=Path("/nowhere"))
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: True)
    with pytest.raises(UserError, match=r"stages.pretrain.placement.clip.nvme_path: .*/nowhere"):
        sharded._folder("clip", placement)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: False)
    with pytest.raises(UserError, match=r"stages.pretrain.placement.clip.offload: nvme needs .*libaio"):
        sharded._folder("clip", placement)
