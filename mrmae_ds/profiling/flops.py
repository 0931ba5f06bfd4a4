"""Count the FLOPs of a recipe for one image, by running its modules on the meta device.

The modules of a stage are built on the meta device (shapes without memory) and run, forward and backward, under
torch's FLOP counter. It counts matrix products and convolutions, two FLOPs per multiply-add, and nothing else. For
attention it counts the textbook's products; a fused kernel's backward computes the scores once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.stages import FinetuneConfig, PretrainConfig, TrainStageName
from mrmae_ds.errors import UserError
from mrmae_ds.factory import TeacherBuilder, build_pretraining
from mrmae_ds.imagenet import IMAGENET_CLASSES
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.masking import TokenMask, VisibleSet, choose_visible
from mrmae_ds.models.pretrain import set_checkpointing
from mrmae_ds.models.sizes import EncoderSpec
from mrmae_ds.teachers import build_meta_teacher

# Stages that :func:`recipe_cost` counts.
COUNTED_STAGES: tuple[TrainStageName, ...] = ("pretrain", "finetune")


@dataclass(frozen=True)
class Flops:
    """FLOPs for one image.

    Attributes:
        forward: forward pass.
        backward: backward pass without recomputation.
        recomputed: forward operations that activation checkpointing repeats in backward.
    """

    forward: int
    backward: int = 0
    recomputed: int = 0

    @property
    def total(self) -> int:
        """Sum of the three."""
        return self.forward + self.backward + self.recomputed


@dataclass(frozen=True)
class StageFlops:
    """FLOPs of a stage for one image.

    Attributes:
        stage: name of the stage.
        epochs: number of epochs.
        parts: FLOPs by part: encoder, decoder, teachers, ...
    """

    stage: TrainStageName
    epochs: int
    parts: dict[str, Flops]

    @property
    def per_image(self) -> int:
        """FLOPs of all parts for one training image."""
        return sum(part.total for part in self.parts.values())

    def total(self, images: int) -> int:
        """Return the FLOPs of the whole stage on a training set of this many images, without evaluation."""
        return self.per_image * images * self.epochs


def recipe_cost(
    recipe: Recipe,
    checkpointing: CheckpointPlan,
    num_classes: int = IMAGENET_CLASSES,
    teacher_builder: TeacherBuilder = build_meta_teacher,
    only: TrainStageName | None = None,
) -> list[StageFlops]:
    """Count the FLOPs of the recipe's training stages, in order.

    Args:
        recipe: the files that it names are not read, except a teacher that is a run of this project.
        checkpointing: the engine config's activation checkpointing.
        num_classes: number of classes of the data set.
        teacher_builder: builds teachers on the meta device.
        only: the only stage to count; None counts all of :data:`COUNTED_STAGES`.

    Raises:
        UserError: if the recipe has no such stage, or as :func:`~mrmae_ds.factory.build_pretraining`.
    """
    costs = []
    if (stage := recipe.stages.pretrain) and only in (None, "pretrain"):
        costs.append(StageFlops("pretrain", stage.epochs, _pretrain(recipe, stage, checkpointing, teacher_builder)))
    if (tuning := recipe.stages.finetune) and only in (None, "finetune"):
        costs.append(StageFlops("finetune", tuning.epochs, _finetune(recipe, tuning, checkpointing, num_classes)))
    if not costs:
        raise UserError(f"recipe {recipe.name} has no {only or 'training'} stage that can be counted")
    return costs


def count_forward(spec: EncoderSpec, image_size: int, num_classes: int) -> int:
    """Count the FLOPs of a classifier's forward pass on one image."""
    with torch.device("meta"):
        model = build_encoder(spec, image_size, num_classes)
    with flop_counter() as count, torch.no_grad():
        model(_image(image_size))
    return count.get_total_flops()


def count_training(
    run: Callable[[], Tensor], checkpoint: Callable[[CheckpointPlan], None], plan: CheckpointPlan
) -> Flops:
    """Count the FLOPs of ``run`` and of backward through the sum of its output.

    Args:
        run: a forward pass on the meta device.
        checkpoint: applies a checkpointing plan to the modules that it runs.
        plan: plan whose recomputation is counted. Torch stops recomputing once backward has all its inputs, so the last
            product of a block without drop path is not repeated.
    """
    checkpoint(CheckpointPlan())
    with flop_counter() as forward:
        output = run()
    with flop_counter() as backward:
        output.sum().backward()
    plain = backward.get_total_flops()
    if plan == CheckpointPlan():
        return Flops(forward.get_total_flops(), plain)
    checkpoint(plan)
    output = run()
    with flop_counter() as backward_again:
        output.sum().backward()
    return Flops(forward.get_total_flops(), plain, backward_again.get_total_flops() - plain)


def flop_counter() -> FlopCounterMode:
    """Return torch's FLOP counter with a corrected formula for the backward of grouped convolutions."""
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}
    )


def _convolution_backward_flops(
    grad_out: torch.Size, inputs: torch.Size, weight: torch.Size, *others: Any, **_: Any
) -> int:
    """Count one forward's products for each of the gradients of input and weight; torch's formula ignores groups."""
    _, _, _, _, transposed, _, _, output_mask = others
    cells = inputs if transposed else grad_out
    return 2 * math.prod(cells) * math.prod(weight[1:]) * sum(output_mask[:2])


def _pretrain(
    recipe: Recipe, stage: PretrainConfig, plan: CheckpointPlan, teacher_builder: TeacherBuilder
) -> dict[str, Flops]:
    with torch.device("meta"):
        model, teachers = build_pretraining(recipe, stage, teacher_builder)
        encoder = model.encoder
        # The count depends on the number of visible tokens only.
        noise = torch.empty(1, math.prod(encoder.grid))
    visible: VisibleSet | TokenMask
    if stage.encoder_input == "visible":
        visible = choose_visible(noise, encoder.grid, stage.visible_share(noise.shape[1]))
    else:
        visible = TokenMask.whole(1, encoder.grid, noise.device)
    images = _image(recipe.model.image_size)

    checkpoint = partial(set_checkpointing, model)
    parts = {"encoder": count_training(lambda: model.latent(images, visible), checkpoint, plan)}
    num_tokens = encoder.num_prefix_tokens + visible.take(noise).shape[1]
    latent = torch.empty(1, num_tokens, encoder.embed_dim, device="meta", requires_grad=True)
    # The losses have no products, so the predictions are enough.
    name = "heads" if model.decoder is None else "decoder, heads"
    blocks = [torch.empty_like(latent, requires_grad=True) for _ in model.tapped_blocks]
    parts[name] = count_training(lambda: _sum(model.predict_from(latent, blocks, visible).values()), checkpoint, plan)
    for name, teacher in teachers.items():
        with flop_counter() as count, torch.no_grad():
            image = _image(teacher.image_size).to(teacher.dtype)
            if teacher.sees_visible and isinstance(visible, VisibleSet):
                teacher.encode_visible(image, visible)
            else:
                teacher.encode(image)
        parts[f"teacher {name}"] = Flops(count.get_total_flops())
    for name, average in model.averages.items():
        with flop_counter() as count:
            average(images)
        parts[f"teacher {name}"] = Flops(count.get_total_flops())
    return parts


def _finetune(recipe: Recipe, stage: FinetuneConfig, plan: CheckpointPlan, num_classes: int) -> dict[str, Flops]:
    size = stage.image_size or recipe.model.image_size
    with torch.device("meta"):
        model = build_encoder(recipe.model.spec(), size, num_classes, stage.drop_path)
    images = _image(size)
    return {"classifier": count_training(lambda: model(images), partial(set_checkpointing, model), plan)}


def _image(side: int) -> Tensor:
    return torch.empty(1, 3, side, side, device="meta")


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.sum() for tensor in tensors]).sum()
