"""Trained models on disk: finished stages with their recipe, and encoders of other projects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from mrmae_ds.config.files import describe_errors
from mrmae_ds.config.recipe import Recipe
from mrmae_ds.config.renamed import former_hash, rename_keys, values_hash
from mrmae_ds.config.stages import PretrainConfig
from mrmae_ds.errors import UserError
from mrmae_ds.models.encoders import Encoder, build_encoder
from mrmae_ds.models.pretrain import PretrainModel
from mrmae_ds.models.windowed import build_windowed
from mrmae_ds.records.record import RunRecord
from mrmae_ds.units import counted
from mrmae_ds.weights.detectors import DetectorFile, detector_of
from mrmae_ds.weights.identify import FAMILY_TITLES
from mrmae_ds.weights.load import load_encoder, load_encoder_weights
from mrmae_ds.weights.model_file import (
    is_ours,
    read_metadata,
    read_tensors,
    run_folder_name,
    size_from_metadata,
    spec_from_metadata,
)
from mrmae_ds.weights.paths import find_weights
from mrmae_ds.weights.resolve import RELATIVE, model_metadata, resolve


def with_present_keys(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return a model file's metadata with the present keys of its recipe, and the hash that the recipe has under them.

    ``mrmae migrate`` leaves model files as they are, because records identify them by SHA-256. Metadata without a valid
    recipe is returned unchanged, and so is a hash that is not the recipe's.
    """
    try:
        renamed = rename_keys(metadata["recipe"])
        counted = Recipe.model_validate(renamed).counted(metadata["stage"])
    except (KeyError, TypeError, AttributeError, UserError, ValidationError):
        return metadata
    changes: dict[str, Any] = {"recipe": renamed}
    if metadata.get("recipe_hash") == former_hash(counted):
        changes["recipe_hash"] = values_hash(counted)
    return metadata | changes


@dataclass(frozen=True)
class SavedEncoder:
    """An encoder of another project on disk.

    Attributes:
        path: weights file, ``FILE#KEY`` if one of several sets of weights was chosen.
        metadata: of the model file, or what is known of another project's.
        kind: ``pretrain``, ``classifier``, ``detector``, or ``encoder``.
        image_size: side of the model's input in pixels.
        mean: by which the input is normalized.
        std: by which the input is normalized.
    """

    path: Path
    metadata: dict[str, Any]
    kind: Literal["pretrain", "classifier", "detector", "encoder"]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def stride(self) -> int:
        """Side of a patch in pixels."""
        return spec_from_metadata(self.metadata).stride

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.stride
        return side, side

    @property
    def val_data(self) -> Path | None:
        """Validation set that the file names; another project's names none."""
        return None

    @property
    def num_images(self) -> int:
        """Number of images in a figure; 0 if none is recorded."""
        return 0

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.path.name

    def load(self) -> PretrainModel | Encoder:
        """Load the encoder, without a head, in eval mode on the CPU.

        Raises:
            UserError: if the file is not usable.
        """
        encoder = build_encoder(spec_from_metadata(self.metadata), self.image_size)
        load_encoder(encoder, self.path)
        return encoder.eval()

    def label(self) -> str:
        """Return two lines: architecture, file."""
        return f"{self.describe_model()}\n{self.name}"

    def describe(self) -> str:
        """Return the same in one line."""
        return f"{self.name} ({self.describe_model()})"

    def describe_model(self) -> str:
        """Return family and kind of the model: ``CViT classifier``."""
        return f"{FAMILY_TITLES[self.metadata['family']]} {self.kind}"


@dataclass(frozen=True)
class DetectorEncoder(SavedEncoder):
    """The encoder of a detector on disk, with its windows.

    Attributes:
        detector: the file.
    """

    detector: DetectorFile

    @classmethod
    def of_file(cls, detector: DetectorFile) -> DetectorEncoder:
        """Read what is known of a detector.

        Raises:
            UserError: if it is not usable, or its heads, statistics or classes are not known.
        """
        metadata, (_, side) = detector.metadata(), detector.sizes()
        mean, std = (tuple(metadata[key]) for key in ("mean", "std"))
        return cls(detector.weights.raw.path, metadata, "detector", side, mean, std, detector)

    @property
    def name(self) -> str:
        """Name of the run folder; of the file elsewhere."""
        return run_folder_name(self.path, "detect") or self.path.name

    def load(self) -> Encoder:
        """Load the encoder in eval mode on the CPU."""
        config, side = self.detector.sizes()
        positions = size_from_metadata(self.metadata)
        spec = spec_from_metadata(self.metadata)
        encoder = build_windowed(spec, side, config.window, config.global_blocks, positions)
        load_encoder_weights(encoder, self.detector.weights)
        return encoder.eval()


def open_saved(source: Path, detectors: bool = False) -> SavedEncoder:
    """Open a finished stage, or an encoder of another project whose heads and statistics are known.

    Args:
        source: stage folder or its model file, or a weights file.
        detectors: open detectors too, whose encoders compute in windows.

    Raises:
        UserError: if it is none of these.
    """
    path = find_weights(source)
    kind = read_metadata(path).get("kind") if is_ours(path) else "encoder"
    if kind == "detector" and not detectors:
        raise UserError(f"{path}: {RELATIVE}")
    if kind not in ("encoder", "detector"):
        return FinishedRun.open(path)
    weights = resolve(path)
    if detectors and (detector := detector_of(weights)):
        return DetectorEncoder.of_file(detector)
    if weights.identity.ours and weights.identity.kind != "encoder":
        return FinishedRun.open(source)
    metadata = model_metadata(weights)
    if "mean" not in metadata:
        raise UserError(f"{path}: its metadata lacks the statistics of its input; export it again")
    size = metadata["image_size"]
    if not isinstance(size, int):
        raise UserError(f"{path}: is of rectangular images; only square ones are shown")
    # Without a recipe, the decoder of a released pre-training cannot be built: its encoder is taken.
    taken: Literal["classifier", "encoder"] = "classifier" if metadata["kind"] == "classifier" else "encoder"
    return SavedEncoder(path, metadata, taken, size, tuple(metadata["mean"]), tuple(metadata["std"]))


@dataclass(frozen=True)
class FinishedRun(SavedEncoder):
    """A finished pre-training or fine-tuning on disk.

    Attributes:
        recipe: resolved recipe.
    """

    recipe: Recipe

    @classmethod
    def open(cls, source: Path) -> FinishedRun:
        """Read the metadata of a stage folder's model file, or of a model file.

        Raises:
            UserError: if there is none, or it is not the model file of a finished stage.
        """
        path = find_weights(source)
        metadata = read_metadata(path)
        try:
            recipe = Recipe.model_validate(rename_keys(metadata["recipe"]))
            stage, mean, std = metadata["stage"], tuple(metadata["mean"]), tuple(metadata["std"])
            recipe.stage(stage)
        except ValidationError as error:
            raise UserError(describe_errors(error, Recipe, path)) from None
        except KeyError as error:
            raise UserError(
                f"{path}: its metadata lacks {error}, so it is not the model file of a finished stage; name a stage "
                "folder (runs/NAME/STAGE)"
            ) from None
        return cls(path, metadata, metadata["kind"], metadata["image_size"], mean, std, recipe)

    @property
    def pretraining(self) -> PretrainConfig:
        """Configuration of the pre-training stage."""
        stage = self.recipe.stages.pretrain
        assert stage is not None
        return stage

    @property
    def val_data(self) -> Path | None:
        """Validation set of the recipe."""
        return self.recipe.data.val

    @property
    def num_images(self) -> int:
        """Number of images in the recipe's figures."""
        return self.recipe.logging.num_images

    def load(self) -> PretrainModel | Encoder:
        """Load the pre-trained model, or a classifier's encoder, in eval mode on the CPU; no teacher is needed.

        Raises:
            UserError: if the file holds a bare encoder, or its tensors do not match its recipe.
        """
        if self.kind not in ("pretrain", "classifier"):
            raise UserError(
                f"{self.path}: holds weights of kind {self.kind}, expected pretrain or classifier; name the folder of "
                "a finished pre-training or fine-tuning (runs/NAME/STAGE)"
            )
        if self.kind == "classifier":
            return super().load()
        model, stage, tensors = self.recipe.model, self.pretraining, read_tensors(self.path)
        mask_token = "encoder.mask_token" in tensors
        encoder = build_encoder(spec_from_metadata(self.metadata), self.image_size, mask_token=mask_token)
        try:
            student = PretrainModel.of_tensors(encoder, model.fusion, model.decoder, stage.objectives, tensors)
        except (KeyError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"{self.path}: its tensors do not match its recipe ({first})") from None
        return student.eval()

    @property
    def name(self) -> str:
        """Name of the run folder; for a file elsewhere, of the recipe."""
        return run_folder_name(self.path, self.metadata["stage"]) or self.recipe.name

    @property
    def data(self) -> str:
        """Name of the training data from the run's record, or its file if there is no record."""
        try:
            return RunRecord.load(self.path.parent).data.dataset
        except UserError:
            return str(self.recipe.data.train)

    def training(self) -> str:
        """Return epochs and training data: "400 epochs, ImageNet-1K"."""
        epochs = self.recipe.stage(self.metadata["stage"]).epochs
        prefix = "" if self.kind == "pretrain" else "fine-tuned "
        return f"{prefix}{counted(epochs, 'epoch')}, {self.data}"

    def label(self) -> str:
        """Return three lines: method, run, training."""
        return f"{self.recipe.method}\n{self.name}\n{self.training()}"

    def describe(self) -> str:
        """Return the same and the architecture in one line."""
        return f"{self.name} ({self.recipe.method}, {self.recipe.model.arch}, {self.training()})"
