"""Live bytes of small stacks against formulas, and autocast's dtypes against CUDA's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.sizes import CViTSpec
from mrmae_ds.planning.activation_trace import CudaPolicy, TensorRecorder, Timeline, trace_timeline

WIDTH, HIDDEN, DEPTH = 8, 32, 3


class Block(nn.Module):
    """Two linear layers without bias and a sigmoid, whose backward needs its output only."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sigmoid(self.up(x)))


class Stack(nn.Module):
    """Blocks, optionally checkpointed."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def timeline(checkpointed: bool = False, autocast: bool = False) -> Timeline:
    """Trace ``Stack`` on images of WIDTH numbers."""
    with FakeTensorMode():
        model = Stack(checkpointed)

        def run(images: int) -> TensorRecorder:
            recorder = TensorRecorder([model])
            handles = [p.register_post_accumulate_grad_hook(recorder.take_gradient) for p in model.parameters()]
            with recorder:
                recorder.phase = "forward"
                x = torch.empty(images, WIDTH)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    y = model(x)
                recorder.phase = "backward"
                y.backward(y.detach())
            for handle in handles:
                handle.remove()
            return recorder

        return trace_timeline(run)


ROW, INNER = WIDTH * 4, HIDDEN * 4  # bytes of an image's activation in float32, outside and inside a block
WEIGHTS = 2 * WIDTH * HIDDEN * 4  # of a block


def test_saved_tensors_are_counted_once_and_scale_with_images() -> None:
    trace = timeline()
    # The first input and each block's output, the input of the next; inside, the sigmoid's output, which is saved by
    # both the sigmoid and the layer after it.
    assert trace.saved(10) == 10 * ((1 + DEPTH) * ROW + DEPTH * INNER)
    # In the last block, the sigmoid's input is still live when its output is.
    assert trace.peak(10, "forward") == 10 * (DEPTH * ROW + (DEPTH + 1) * INNER)
    assert trace.peak(1000, "forward") == 100 * trace.peak(10, "forward")


def test_parameters_and_their_gradients_are_not_counted() -> None:
    trace = timeline()
    assert trace.gradients[-1] == DEPTH * 2 * WIDTH * HIDDEN
    assert trace.gradients[trace.in_phases("forward")].max() == 0
    # One image is small compared to the weights: a weight's gradient is live until the hook frees it.
    assert WEIGHTS // 2 <= trace.peak(1, "backward") < WEIGHTS
    assert trace.live_bytes(1)[-1] < WEIGHTS // 2 + 4 * ROW


def test_checkpointing_keeps_inputs_and_recomputes_block_by_block() -> None:
    checkpointed, plain = timeline(checkpointed=True), timeline()
    assert checkpointed.saved(1000) == 1000 * (1 + DEPTH) * ROW
    # A block's activations while it is recomputed: the sigmoid's input and output.
    assert checkpointed.peak(1000, "backward") >= 1000 * ((1 + DEPTH) * ROW + 2 * INNER)
    assert checkpointed.peak(1000, "backward") < plain.peak(1000, "backward")


def test_autocast_halves_activations_and_keeps_casted_weights() -> None:
    trace = timeline(autocast=True)
    # The input in float32 and its cast; outputs in bf16; casts of the weights except the first, because the input needs
    # no gradient.
    activations = 10 * (ROW + ((1 + DEPTH) * ROW + DEPTH * INNER) // 2)
    assert trace.saved(10) == activations + (DEPTH * WEIGHTS - WEIGHTS // 2) // 2
    # Until autocast ends, its cache holds all casts.
    assert trace.peak(10, "forward") == activations + DEPTH * WEIGHTS // 2


def test_operations_that_depend_on_the_batch_size_are_refused() -> None:
    def run(images: int) -> TensorRecorder:
        recorder = TensorRecorder([])
        with recorder:
            for _ in range(images):
                torch.empty(1)
        return recorder

    with pytest.raises(RuntimeError, match="depend on the micro-batch size"), FakeTensorMode():
        trace_timeline(run)


def output_types(device: str) -> list[tuple[str, torch.dtype]]:
    """Return the dtype of every module's output in a forward pass under autocast."""
    types: list[tuple[str, torch.dtype]] = []
    with FakeTensorMode():
        model = CViT(CViTSpec((16, 16, 32), (1, 1, 1), 2, patches=(4, 2, 2)), 32, 10, drop_path_rate=0.1)
        for part in model.modules():
            part._parameters.update(
                {
                    name: nn.Parameter(torch.empty(p.shape, device=device))
                    for name, p in part._parameters.items()
                    if p is not None
                }
            )
        for name, module in model.named_modules():
            module.register_forward_hook(lambda _m, _i, out, name=name: types.append((name, out.dtype)))
        images = torch.empty(2, 3, 32, 32, device=device)
        if device == "cpu":
            with CudaPolicy(), torch.autocast("cpu", torch.bfloat16):
                model(images)
            return types
        # torch.autocast("cuda") disables itself without a GPU; the functions that it calls do not.
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.autocast_increment_nesting()
        try:
            model(images)
        finally:
            torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()
            torch.set_autocast_enabled("cuda", False)
    return types


def test_dtypes_equal_those_of_autocast_on_cuda() -> None:
    assert output_types("cpu") == output_types("cuda")
