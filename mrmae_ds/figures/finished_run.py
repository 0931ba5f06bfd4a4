"""A finished stage as it lies on the disk, ready to be looked at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from mrmae_ds.config.files import describe_errors
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.stages import PretrainConfig
from mrmae_ds.errors import UserError
from mrmae_ds.models.encoders import Encoder, build_encoder
from mrmae_ds.models.pretrain import PretrainModel
from mrmae_ds.records.record import RunRecord
from mrmae_ds.weights.load import load_encoder
from mrmae_ds.weights.model_file import (
    find_weights,
    read_metadata,
    read_tensors,
    run_folder_name,
    spec_from_metadata,
)


@dataclass(frozen=True)
class ShownRun:
    """A pre-training or a fine-tuning.

    Attributes:
        path: its model file.
        metadata: what that file says about itself.
        recipe: as it was resolved.
        kind: ``pretrain`` or ``classifier``.
        image_size: side of its input in pixels.
        mean, std: that its input is normalized with.
    """

    path: Path
    metadata: dict[str, Any]
    recipe: Recipe
    kind: Literal["pretrain", "classifier"]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def open(cls, source: Path) -> ShownRun:
        """Read what a stage folder's model file, or a model file itself, says.

        Raises:
            UserError: if there is none, or it is not one of a training's end.
        """
        path = find_weights(source, "run")
        metadata = read_metadata(path)
        try:
            recipe = Recipe.model_validate(metadata["recipe"])
            stage, mean, std = metadata["stage"], tuple(metadata["mean"]), tuple(metadata["std"])
            recipe.stage(stage)
        except ValidationError as error:
            raise UserError(describe_errors(error, Recipe, path)) from None
        except KeyError as error:
            raise UserError(
                f"{path}: its metadata lacks {error}, so it is not the model file of a finished stage; name a stage "
                "folder (runs/NAME/STAGE)"
            ) from None
        return cls(path, metadata, recipe, metadata["kind"], metadata["image_size"], mean, std)

    @property
    def pretraining(self) -> PretrainConfig:
        """The stage of a pre-training."""
        stage = self.recipe.stages.pretrain
        assert stage is not None
        return stage

    @property
    def stride(self) -> int:
        """Pixels of a patch's side."""
        return spec_from_metadata(self.metadata).stride

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of its patches."""
        side = self.image_size // self.stride
        return side, side

    def load(self) -> PretrainModel | Encoder:
        """The trained model in eval mode on the CPU, of a classifier its encoder.

        It needs no teacher.

        Raises:
            UserError: if the file's tensors are not those of its recipe.
        """
        encoder = build_encoder(spec_from_metadata(self.metadata), self.image_size)
        if self.kind == "classifier":
            load_encoder(encoder, self.path)
            return encoder.eval()
        model, stage, tensors = self.recipe.model, self.pretraining, read_tensors(self.path)
        try:
            student = PretrainModel.of_tensors(encoder, model.fusion, model.decoder, stage.objectives, tensors)
        except (KeyError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"{self.path}: its tensors are not those of its recipe ({first})") from None
        return student.eval()

    @property
    def name(self) -> str:
        """The run folder's name; of a file elsewhere, the recipe's."""
        return run_folder_name(self.path, self.metadata["stage"]) or self.recipe.name

    @property
    def data(self) -> str:
        """The training data, by its name where the run's record is at hand."""
        try:
            return RunRecord.load(self.path.parent).data.dataset
        except UserError:
            return str(self.recipe.data.train)

    def training(self) -> str:
        """What was done: "400 epochs, ImageNet-1K"."""
        epochs = self.recipe.stage(self.metadata["stage"]).epochs
        done = "" if self.kind == "pretrain" else "fine-tuned "
        return f"{done}{epochs} epoch{'s' * (epochs != 1)}, {self.data}"

    def label(self) -> str:
        """Three lines: method, run, training."""
        return f"{self.recipe.method}\n{self.name}\n{self.training()}"

    def describe(self) -> str:
        """The same and the architecture, in one line."""
        return f"{self.name} ({self.recipe.method}, {self.recipe.model.arch}, {self.training()})"
