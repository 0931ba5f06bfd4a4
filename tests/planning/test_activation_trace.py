"""Living bytes of stacks small enough to count by hand, and autocast's types against CUDA's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from mrmae_ds.models.cvit import CViT
from mrmae_ds.models.sizes import CViTSpec
from mrmae_ds.planning.activation_trace import CudaPolicy, TensorRecorder, Timeline, trace

WIDTH, HIDDEN, DEPTH = 8, 32, 3


class Block(nn.Module):
    """Two linear layers without bias and a sigmoid, whose output is all that its backward needs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sigmoid(self.up(x)))


class Stack(nn.Module):
    """Blocks, checkpointed or not."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.again = again
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
        return x


def timeline(again: bool = False, autocast: bool = False) -> Timeline:
    """Of ``Stack`` on images of WIDTH numbers."""
    with FakeTensorMode():
        model = Stack(again)

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

        return trace(run)


ROW, INNER = WIDTH * 4, HIDDEN * 4  # bytes of an image's activation in float32, outside and inside a block
WEIGHTS = 2 * WIDTH * HIDDEN * 4  # of a block


def test_what_is_saved_is_counted_once_and_is_linear_in_images() -> None:
    told = timeline()
    # The first input and each block's output, the next one's input; inside, the sigmoid's output, which the sigmoid
    # and the layer after it both save.
    assert told.saved(10) == 10 * ((1 + DEPTH) * ROW + DEPTH * INNER)
    # In the last block the sigmoid's input is still there when its output is.
    assert told.peak(10, "forward") == 10 * (DEPTH * ROW + (DEPTH + 1) * INNER)
    assert told.peak(1000, "forward") == 100 * told.peak(10, "forward")


def test_parameters_and_their_gradients_are_not_among_it() -> None:
    told = timeline()
    assert told.gradients[-1] == DEPTH * 2 * WIDTH * HIDDEN
    assert told.gradients[told.where("forward")].max() == 0
    # One image is next to nothing beside the weights: a weight's gradient is there until it is handed over, no more.
    assert WEIGHTS // 2 <= told.peak(1, "backward") < WEIGHTS
    assert told.living(1)[-1] < WEIGHTS // 2 + 4 * ROW


def test_checkpointing_keeps_inputs_and_computes_one_block_at_a_time_again() -> None:
    again, plain = timeline(again=True), timeline()
    assert again.saved(1000) == 1000 * (1 + DEPTH) * ROW
    # A block's inside while it is computed again: the sigmoid's input and output.
    assert again.peak(1000, "backward") >= 1000 * ((1 + DEPTH) * ROW + 2 * INNER)
    assert again.peak(1000, "backward") < plain.peak(1000, "backward")


def test_autocast_halves_activations_and_keeps_casts_of_the_weights() -> None:
    told = timeline(autocast=True)
    # The caller's input in float32 and its cast; outputs in bf16; casts of the weights, but for the first: no gradient
    # goes to the input.
    activations = 10 * (ROW + ((1 + DEPTH) * ROW + DEPTH * INNER) // 2)
    assert told.saved(10) == activations + (DEPTH * WEIGHTS - WEIGHTS // 2) // 2
    # Until autocast ends, its cache has all of them.
    assert told.peak(10, "forward") == activations + DEPTH * WEIGHTS // 2


def test_a_run_that_depends_on_the_number_of_images_is_refused() -> None:
    def run(images: int) -> TensorRecorder:
        recorder = TensorRecorder([])
        with recorder:
            for _ in range(images):
                torch.empty(1)
        return recorder

    with pytest.raises(RuntimeError, match="other operations"), FakeTensorMode():
        trace(run)


def output_types(device: str) -> list[tuple[str, torch.dtype]]:
    """The type of every module's output in a forward pass under autocast."""
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
        # torch.autocast("cuda") switches itself off where there is no GPU; its parts do not.
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


def test_types_are_those_of_autocast_on_cuda() -> None:
    assert output_types("cpu") == output_types("cuda")
