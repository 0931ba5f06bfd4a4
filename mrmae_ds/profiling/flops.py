"""The arithmetic of a recipe, counted on what is really computed for one image.

The modules of a stage are built on the meta device (shapes without memory) and run, forward and backward, under
torch's counter. It counts matrix products and convolutions, two operations a multiply-add, and nothing else; of
attention, the products of the textbook (a fused kernel's backward forms the scores once more).
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
from mrmae_ds.config.stages import FinetuneConfig, PretrainConfig
from mrmae_ds.errors import UserError
from mrmae_ds.factory import TeacherBuilder, build_pretraining
from mrmae_ds.imagenet import IMAGENET_CLASSES
from mrmae_ds.models.activation_checkpointing import CheckpointPlan
from mrmae_ds.models.masking import choose_visible
from mrmae_ds.models.pretrain import set_checkpointing
from mrmae_ds.models.sizes import EncoderSpec
from mrmae_ds.profiling.meta_teachers import outline_teacher
from mrmae_ds.weights.load import build_encoder


@dataclass(frozen=True)
class Flops:
    """Operations for one image: forward, backward, and what activation checkpointing computes once more."""

    forward: int
    backward: int = 0
    recomputed: int = 0

    @property
    def total(self) -> int:
        """All three."""
        return self.forward + self.backward + self.recomputed


@dataclass(frozen=True)
class StageCost:
    """Operations of a stage for one image, by part, and how many epochs it has."""

    stage: str
    epochs: int
    parts: dict[str, Flops]

    @property
    def per_image(self) -> int:
        """Operations of all parts for one image of training."""
        return sum(part.total for part in self.parts.values())

    def total(self, images: int) -> int:
        """Operations of the whole stage on a training set of so many images, evaluation left out."""
        return self.per_image * images * self.epochs


def recipe_cost(
    recipe: Recipe,
    checkpointing: CheckpointPlan,
    num_classes: int = IMAGENET_CLASSES,
    teacher_builder: TeacherBuilder = outline_teacher,
) -> list[StageCost]:
    """The stages that train, in order.

    Args:
        recipe: none of the files that it names is read, but for a teacher that is a run of this project.
        checkpointing: the engine config's plan.
        num_classes: of the data set.
        teacher_builder: gives teachers on the meta device.

    Raises:
        UserError: if no stage trains, or as :func:`~mrmae_ds.factory.build_pretraining`.
    """
    costs = []
    if stage := recipe.stages.pretrain:
        costs.append(StageCost("pretrain", stage.epochs, _pretrain(recipe, stage, checkpointing, teacher_builder)))
    if tuning := recipe.stages.finetune:
        costs.append(StageCost("finetune", tuning.epochs, _finetune(recipe, tuning, checkpointing, num_classes)))
    if not costs:
        raise UserError(f"recipe {recipe.name} has no stage that trains, so there is nothing to count")
    return costs


def count_forward(spec: EncoderSpec, image_size: int, num_classes: int) -> int:
    """Operations of a classifier's forward pass on one image."""
    with torch.device("meta"):
        model = build_encoder(spec, image_size, num_classes)
    with counter() as counted, torch.no_grad():
        model(_image(image_size))
    return counted.get_total_flops()


def count_trained(
    run: Callable[[], Tensor], checkpoint: Callable[[CheckpointPlan], None], plan: CheckpointPlan
) -> Flops:
    """Operations of ``run`` and of backward through the sum of what it returns.

    Args:
        run: a forward pass on the meta device.
        checkpoint: sets a checkpointing plan on the modules that it runs.
        plan: whose recomputation is counted. Torch stops it where backward has all that it needs, so that the last
            product of a block without drop path is not computed again.
    """
    checkpoint(CheckpointPlan())
    with counter() as forward:
        output = run()
    with counter() as backward:
        output.sum().backward()
    plain = backward.get_total_flops()
    if plan == CheckpointPlan():
        return Flops(forward.get_total_flops(), plain)
    checkpoint(plan)
    output = run()
    with counter() as backward_again:
        output.sum().backward()
    return Flops(forward.get_total_flops(), plain, backward_again.get_total_flops() - plain)


def counter() -> FlopCounterMode:
    """Torch's counter, with the backward of grouped convolutions put right."""
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}
    )


def _convolution_backward_flops(
    grad_out: torch.Size, _input: torch.Size, weight: torch.Size, *others: Any, **_: Any
) -> int:
    """Gradients of input and weight each take forward's products; torch's own count forgets the groups.

    Not for transposed convolutions, of which there are none here.
    """
    output_mask = others[-1]
    return 2 * math.prod(grad_out) * math.prod(weight[1:]) * sum(output_mask[:2])


def _pretrain(
    recipe: Recipe, stage: PretrainConfig, plan: CheckpointPlan, teacher_builder: TeacherBuilder
) -> dict[str, Flops]:
    with torch.device("meta"):
        model, teachers = build_pretraining(recipe, stage, teacher_builder)
        encoder = model.encoder
        # Which tokens are visible changes nothing, only how many.
        noise = torch.empty(1, math.prod(encoder.grid))
    visible = choose_visible(noise, encoder.grid, stage.masking.keep_ratio)
    images = _image(recipe.model.image_size)

    checkpoint = partial(set_checkpointing, model)
    parts = {"encoder": count_trained(lambda: model.latent(images, visible), checkpoint, plan)}
    seen = encoder.num_prefix_tokens + visible.ids_keep.shape[1]
    latent = torch.empty(1, seen, encoder.embed_dim, device="meta", requires_grad=True)
    # The losses themselves have no products, so predictions are as good.
    rest = "heads" if model.decoder is None else "decoder, heads"
    parts[rest] = count_trained(lambda: _sum(model.predict_from(latent, visible).values()), checkpoint, plan)
    for name, teacher in teachers.items():
        with counter() as counted, torch.no_grad():
            teacher.encode(_image(teacher.image_size).to(teacher.dtype))
        parts[f"teacher {name}"] = Flops(counted.get_total_flops())
    return parts


def _finetune(recipe: Recipe, stage: FinetuneConfig, plan: CheckpointPlan, num_classes: int) -> dict[str, Flops]:
    size = stage.image_size or recipe.model.image_size
    with torch.device("meta"):
        model = build_encoder(recipe.model.spec(), size, num_classes, stage.drop_path)
    images = _image(size)
    return {"classifier": count_trained(lambda: model(images), partial(set_checkpointing, model), plan)}


def _image(side: int) -> Tensor:
    return torch.empty(1, 3, side, side, device="meta")


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.sum() for tensor in tensors]).sum()
