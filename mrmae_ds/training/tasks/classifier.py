"""Base class of the tasks that train a classifier: fine-tuning and linear probing."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.stages import FinetuneConfig, ProbeConfig
from mrmae_ds.models.encoders import Encoder, build_encoder, init_classifier
from mrmae_ds.training.evaluation.accuracy import AccuracyEvaluator
from mrmae_ds.training.evaluation.base import EvalContext
from mrmae_ds.training.tasks.crops import CropTask
from mrmae_ds.weights.load import load_encoder
from mrmae_ds.weights.paths import find_weights

ClassifierConfigT = TypeVar("ClassifierConfigT", FinetuneConfig, ProbeConfig)


class ClassifierTask(CropTask[ClassifierConfigT]):
    """A classifier of images, trained on labels and evaluated by its accuracy."""

    weights_kind = "classifier"

    @abstractmethod
    def logits(self, engine: nn.Module, images: Tensor) -> Tensor:
        """Return the logits, float32 [B, classes].

        Args:
            engine: wraps :attr:`model`.
            images: decoded images, uint8 [B, 3, H, W].
        """

    def build_evaluator(self, context: EvalContext) -> AccuracyEvaluator:
        """Return the evaluation of the accuracy."""
        config = self.config
        return AccuracyEvaluator(context, self.logits, self.image_size, config.eval_every_epochs, config.epochs)


def build_classifier_encoder(
    recipe: Recipe,
    stage_name: str,
    config: FinetuneConfig | ProbeConfig,
    num_classes: int,
    run_dir: Path | None,
    drop_path: float = 0.0,
    pool: str = "avg",
) -> tuple[Encoder, Path | None, str]:
    """Build an encoder with a classification head and load the weights that ``init`` names.

    Args:
        recipe: recipe of the run.
        stage_name: stage, for error messages.
        config: the recipe's stage.
        num_classes: outputs of the head.
        run_dir: folder of the run, in which ``init: pretrain`` is found; None leaves the weights random.
        drop_path: stochastic depth rate of the last block.
        pool: input of the head, see :func:`~mrmae_ds.weights.load.build_encoder`.

    Returns:
        The encoder, the weights file (None for random weights) and a summary of what was loaded.

    Raises:
        UserError: if the weights file is missing or does not fit.
    """
    key, init = f"stages.{stage_name}.init", None
    if run_dir is not None and config.init != "scratch":
        init = find_weights(run_dir / "pretrain" if config.init == "pretrain" else Path(config.init), key)
    image_size = config.image_size or recipe.model.image_size
    encoder = build_encoder(recipe.model.spec(), image_size, num_classes, drop_path, pool)
    init_classifier(encoder)
    return encoder, init, f"{init}: {load_encoder(encoder, init, key)}" if init else "random weights"
