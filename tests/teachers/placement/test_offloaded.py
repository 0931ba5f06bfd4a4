"""Offloaded teachers: equal targets, and only the needed weights on the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from mrmae_ds.config.stages import PlacementConfig
from mrmae_ds.errors import UserError
from mrmae_ds.teachers import PlacedTeacher, Teacher, place_teacher
from mrmae_ds.teachers.base import TeacherOutput, TeacherSpec
from mrmae_ds.teachers.placement.offload_units import offload_layout, split_units
from mrmae_ds.teachers.placement.offloaded import ALIGNMENT, OffloadedTeacher
from tests.support.placed import RGB, TEACHERS, bytes_present, timm_network, watched, weights_of
from tests.support.sample_teachers import pixels_of

CPU = torch.device("cpu")
KINDS = ["device", "step", "stream"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Use one thread, because the number of threads changes the last bit of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _placed(teacher: Teacher, kind: str) -> PlacedTeacher:
    return place_teacher("one", teacher, PlacementConfig(kind=kind), CPU)


def _padding(teacher: Teacher) -> int:
    return ALIGNMENT * len(weights_of(teacher))


@pytest.mark.parametrize("name", TEACHERS)
def test_targets_are_the_same_to_the_last_bit(name: str, tmp_path: Path) -> None:
    build = TEACHERS[name]
    plain = build(tmp_path)
    calls = [pixels_of(2, plain.image_size, seed) for seed in range(2)]
    expected = [plain(pixels) for pixels in calls]
    for kind in KINDS:
        placed = _placed(build(tmp_path), kind)
        for pixels, (tokens, importance, _) in zip(calls, expected, strict=True):
            output = placed(pixels)
            assert torch.equal(output.tokens, tokens) and torch.equal(output.importance, importance), kind


@pytest.mark.parametrize("name", TEACHERS)
def test_resident_weights_over_time(name: str, tmp_path: Path) -> None:
    build = TEACHERS[name]
    plain = build(tmp_path)
    everything, pixels = bytes_present(plain), pixels_of(2, plain.image_size)
    resident = {}
    for kind in KINDS:
        teacher = build(tmp_path)
        placed = _placed(teacher, kind)
        placed(pixels)
        with watched(teacher) as seen:
            placed(pixels)
        assert 0 <= placed.peak_resident_bytes - max(seen) <= _padding(plain), kind
        assert placed.resident_bytes == bytes_present(teacher), kind
        resident[kind] = placed.resident_bytes, max(seen)
    assert resident["device"] == (everything, everything)
    idle = sum(tensor.nbytes for tensor in offload_layout(plain).idle)
    assert resident["step"] == (0, everything - idle) and idle < everything / 20
    assert resident["stream"][0] == 0 and resident["stream"][1] < everything * 0.8


@pytest.mark.parametrize(("name", "block"), [("clip", "transformer.resblocks"), ("dino", "blocks"), ("eva", "blocks")])
def test_stream_holds_two_blocks_and_the_weights_outside_blocks(name: str, block: str, tmp_path: Path) -> None:
    teacher = TEACHERS[name](tmp_path)
    blocks = list(teacher.network.get_submodule(block))
    each = {bytes_present(module) for module in blocks}
    assert len(each) == 1
    beside = bytes_present(teacher) - sum(map(bytes_present, blocks))
    placed = _placed(teacher, "stream")
    with watched(teacher) as seen:
        placed(pixels_of(2, teacher.image_size))
    assert 2 * min(each) <= max(seen) <= 2 * min(each) + beside


def test_stream_prefetches_the_next_block_and_releases_the_previous() -> None:
    teacher = TEACHERS["dino"](Path())
    placed = _placed(teacher, "stream")
    blocks, seen = list(teacher.network.blocks), []

    def look(module: nn.Module, inputs: object) -> None:
        seen.append([bytes_present(block) > 0 for block in blocks])

    for block in blocks:
        block.register_forward_pre_hook(look)
    placed(pixels_of(1, 64))
    assert seen == [
        [True, True, False, False],
        [False, True, True, False],
        [False, False, True, True],
        [False, False, False, True],
    ]


def test_step_placement_copies_all_weights_before_the_first_block() -> None:
    teacher = TEACHERS["dino"](Path())
    placed = _placed(teacher, "step")
    with watched(teacher) as seen:
        placed(pixels_of(1, 64))
    assert set(seen) == {bytes_present(TEACHERS["dino"](Path()))}


def test_host_copy_is_separate_from_the_weights_in_use() -> None:
    teacher = TEACHERS["clip"](Path())
    values = [tensor.clone() for tensor in weights_of(teacher)]
    placed = _placed(teacher, "step")
    assert isinstance(placed, OffloadedTeacher)
    masters = {bundle.master.data_ptr() for bundle in (placed.rest, *placed.units)}
    working = []

    def spoil(module: nn.Module, inputs: object) -> None:
        working.extend(bundle.working.data_ptr() for bundle in placed.units if bundle.working is not None)
        module.weight.data.zero_()

    handle = teacher.network.conv1.register_forward_pre_hook(spoil)
    placed(pixels_of(1, 64))
    assert len(set(working)) == len(placed.units) and not masters & set(working)
    handle.remove()
    plain = TEACHERS["clip"](Path())
    assert torch.equal(placed(pixels_of(1, 64)).tokens, plain(pixels_of(1, 64)).tokens)
    assert all(map(torch.equal, values, weights_of(plain)))


def test_weights_keep_their_memory_format() -> None:
    teacher = TEACHERS["resnet"](Path())
    teacher.network.to(memory_format=torch.channels_last)
    strides = [parameter.stride() for parameter in teacher.network.parameters()]
    assert any(not parameter.is_contiguous() for parameter in teacher.network.parameters())
    placed = _placed(teacher, "step")
    seen: list[list[tuple[int, ...]]] = []
    teacher.network.conv1.register_forward_pre_hook(
        lambda *_: seen.append([parameter.stride() for parameter in teacher.network.parameters()])
    )
    placed(pixels_of(1, 64))
    assert seen == [strides]


@pytest.mark.parametrize("kind", ["step", "stream"])
def test_failed_forward_releases_all_device_memory(kind: str) -> None:
    teacher = TEACHERS["dino"](Path())
    placed, pixels = _placed(teacher, kind), pixels_of(1, 64)

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    handle = teacher.network.blocks[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        placed(pixels)
    assert placed.resident_bytes == bytes_present(teacher) == 0
    handle.remove()
    assert torch.equal(placed(pixels).tokens, TEACHERS["dino"](Path())(pixels).tokens)


def test_using_an_offloaded_weight_raises() -> None:
    teacher = TEACHERS["dino"](Path())
    _placed(teacher, "stream")
    with pytest.raises(RuntimeError):
        teacher(pixels_of(1, 64))
    assert {tensor.numel() for tensor in weights_of(teacher)} == {0}


@pytest.mark.parametrize("kind", KINDS)
def test_release_frees_all_memory(kind: str) -> None:
    teacher = TEACHERS["resnet"](Path())
    network = teacher.network
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in weights_of(teacher)]
    placed = _placed(teacher, kind)
    placed(pixels_of(1, 64))
    if isinstance(placed, OffloadedTeacher):
        storages += [StorageWeakRef(bundle.master.untyped_storage()) for bundle in (placed.rest, *placed.units)]
    placed.release()
    assert all(storage.expired() for storage in storages)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    assert placed.resident_bytes == 0
    assert teacher.grid == (4, 4) and teacher.details["placement"] == kind
    placed.release()
    with pytest.raises(RuntimeError, match="released"):
        placed(pixels_of(1, 64))


def test_error_for_a_teacher_that_does_not_run_on_the_cpu_names_the_fix() -> None:
    class GpuOnly(OddTeacher):
        def encode(self, images: torch.Tensor) -> TeacherOutput:
            raise NotImplementedError("no kernel for bfloat16")

    with pytest.raises(UserError, match=r"stages.pretrain.placement.one: .* CPU.*no kernel for bfloat16.*use device"):
        _placed(GpuOnly(), "stream")


# ---- what the units of a network are


@pytest.mark.parametrize("name", ["clip", "dino", "own-vit"])
def test_the_last_block_is_held_because_its_attention_is_read_beside_it(name: str, tmp_path: Path) -> None:
    layout = offload_layout(TEACHERS[name](tmp_path))
    assert [unit.held for unit in layout.units] == [False] * (len(layout.units) - 1) + [True]
    assert layout.order == tuple(range(len(layout.units)))


def test_every_weight_is_in_exactly_one_bundle(tmp_path: Path) -> None:
    for build in TEACHERS.values():
        teacher = build(tmp_path)
        layout = offload_layout(teacher)
        parts = [*(tensor for unit in layout.units for tensor in unit.tensors), *layout.rest, *layout.idle]
        assert sorted(map(id, parts)) == sorted(map(id, weights_of(teacher)))


def test_units_are_blocks_or_otherwise_children(tmp_path: Path) -> None:
    kinds = {name: [type(m).__name__ for m in split_units(build(tmp_path).network)] for name, build in TEACHERS.items()}
    assert kinds["clip"].count("ResidualAttentionBlock") == 4
    assert kinds["eva"].count("EvaBlock") == 4
    assert kinds["own-cvit"].count("ConvBlock") == 2 and kinds["own-cvit"].count("Block") == 4
    assert kinds["resnet"] == ["Sequential", "BatchNorm2d", "BasicBlock", "BasicBlock", "Bottleneck"]
    stages = split_units(timm_network("regnetx_002").network)  # its stages are no lists
    assert [type(m).__name__ for m in stages] == ["ConvNormAct", "RegStage", "RegStage", *["Bottleneck"] * 4]


class Shared(nn.Module):
    """A block that runs twice, and a weight that two blocks share."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(3))
        self.blocks[1][0].weight = self.blocks[0][0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in (0, 1, 0, 2):
            x = self.blocks[number](x)
        return x


class OddTeacher(Teacher):
    """Colors through :class:`Shared`."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(Shared(), TeacherSpec((4, 4), 3, 4, RGB[0], RGB[1], torch.float32, sha256="0"))

    def encode(self, images: torch.Tensor) -> TeacherOutput:
        tokens = self.network(images.flatten(2).transpose(1, 2))
        return TeacherOutput(tokens, tokens.square().sum(-1))


def test_block_that_runs_twice_is_copied_twice_and_shared_weights_stay() -> None:
    teacher, pixels = OddTeacher(), pixels_of(2, 4)
    layout = offload_layout(teacher)
    assert layout.order == (0, 1, 0, 2)
    assert any(tensor is teacher.network.blocks[0][0].weight for tensor in layout.rest)
    assert torch.equal(_placed(teacher, "stream")(pixels).tokens, OddTeacher()(pixels).tokens)
