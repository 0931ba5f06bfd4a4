"""Embeddings of image files by a trained encoder: computed, written, and judged by k-NN and a linear probe.

Shape legend: N images, S x S pixels, C the encoder's width.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from mrmae_ds.api import ImageEncoder
from mrmae_ds.config.stages import KnnConfig
from mrmae_ds.data.convert.folder import open_folder
from mrmae_ds.data.loaders.pillow import Key, WorkerProcesses, center_crop
from mrmae_ds.data.types import ImageArray
from mrmae_ds.errors import UserError
from mrmae_ds.figures.select_images import images_below, left_out, open_upright
from mrmae_ds.files import check_writable, replacing
from mrmae_ds.training.evaluation.knn import Bank, votes

VAL_FRACTION = 0.1
PARQUET_EXTRA = (
    "writing Parquet needs pyarrow; in the clone: pip install -e '.[parquet]' -c constraints.txt, or write .npy"
)
_DECAY, _STEPS, _QUERIES = 1e-4, 100, 1024


@dataclass(frozen=True)
class LabeledFiles:
    """Image files, with classes if they were read from a tree of them.

    Attributes:
        paths: of N files.
        parts: ``train`` or ``val`` of each; empty without classes.
        labels: int64 [N]; empty without classes.
        class_names: by label.
    """

    paths: list[Path]
    parts: list[str]
    labels: Tensor
    class_names: list[str]

    def select(self, rows: Sequence[int]) -> LabeledFiles:
        """Return the files of these numbers, with the same classes."""
        paths = [self.paths[row] for row in rows]
        if not self.class_names:
            return replace(self, paths=paths)
        return replace(self, paths=paths, parts=[self.parts[row] for row in rows], labels=self.labels[list(rows)])


@dataclass(frozen=True)
class Embeddings:
    """Features of the images that can be read.

    Attributes:
        features: float32 [M, C] on the CPU.
        rows: numbers of the M images.
        problems: messages about the others, each with its file.
    """

    features: Tensor
    rows: list[int]
    problems: list[str]


class _Crops(Dataset[ImageArray | str]):
    """Crops of evaluation, uint8 [S, S, 3], or a message about a file that cannot be read."""

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: Key) -> ImageArray | str:
        try:
            return np.array(center_crop(open_upright(self.paths[key[1]]), self.size))
        except UserError as error:
            return str(error)


def _readable(crops: list[ImageArray | str]) -> tuple[list[str], list[Tensor]]:
    """Return a message for each crop, "" for one that was read, and the batch of those, in a list that may be empty."""
    images = [crop for crop in crops if not isinstance(crop, str)]
    messages = [crop if isinstance(crop, str) else "" for crop in crops]
    return messages, [torch.from_numpy(np.stack(images))] if images else []


def list_files(paths: Sequence[Path], with_classes: bool) -> LabeledFiles:
    """List the images of files and folders.

    Args:
        paths: files, and folders whose images are taken at any depth, sorted.
        with_classes: ``paths`` is one tree of classes, split as ``mrmae data write`` splits it.

    Raises:
        UserError: for a folder without images, or a tree of another shape.
    """
    if not with_classes:
        found = [file for path in paths for file in (images_below(path) if path.is_dir() else [path])]
        return LabeledFiles(found, [], torch.empty(0, dtype=torch.int64), [])
    if len(paths) != 1 or not paths[0].is_dir():
        raise UserError("--accuracy needs one folder with a folder per class, or with train/ and val/ of such folders")
    train, val, names = open_folder(paths[0], VAL_FRACTION)
    labels = torch.from_numpy(np.concatenate([train.labels, val.labels]))
    parts = ["train"] * len(train) + ["val"] * len(val)
    return LabeledFiles([Path(place) for place in [*train.places, *val.places]], parts, labels, names)


def embed(
    encoder: ImageEncoder, paths: Sequence[Path], device: torch.device, batch_size: int = 64, workers: int = 0
) -> Embeddings:
    """Compute the features of images, cropped as in evaluation: the layer-normalized mean of the patch tokens.

    Args:
        encoder: a loaded encoder; moved to ``device``.
        paths: N image files.
        device: where it computes.
        batch_size: images at a time.
        workers: processes that decode; 0 decodes in this one.

    Raises:
        UserError: if none of the files can be read as an image.
    """
    encoder = encoder.to(device)
    crops = _Crops(paths, encoder.image_size)
    processes: WorkerProcesses[tuple[list[str], list[Tensor]]] = WorkerProcesses(crops, _readable, workers, device)
    numbers = range(len(paths))
    batches = [numbers[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    parts: list[Tensor] = []
    messages: list[str] = []
    try:
        for batch_messages, readable in processes.epoch(0, batches):
            messages += batch_messages
            for images in readable:
                parts.append(encoder.features(images.to(device).permute(0, 3, 1, 2)).pooled.float().cpu())
    finally:
        processes.close()
    problems = [message for message in messages if message]
    if not parts:
        raise left_out(problems, len(paths))
    return Embeddings(torch.cat(parts), [row for row, message in enumerate(messages) if not message], problems)


def check_output(out: Path) -> None:
    """Check the form of the output file before anything is computed.

    Raises:
        UserError: for another ending than .npy and .parquet, without pyarrow for the latter, or if the file cannot be
            written.
    """
    if out.suffix not in (".npy", ".parquet"):
        raise UserError(f"--out: {out} must end in .npy or .parquet")
    if out.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401  (optional dependency)
        except ImportError:
            raise UserError(f"--out: {PARQUET_EXTRA}") from None
    check_writable(out)


def write_embeddings(out: Path, files: LabeledFiles, features: Tensor) -> list[Path]:
    """Write features with the names of their files, and part and class of each if they are known.

    Args:
        out: NAME.parquet gets columns ``file``, ``part``, ``class`` and ``features`` (lists of C float32). NAME.npy
            gets the features, float32 [N, C], and NAME.csv beside it the other columns, in the same order.
        files: the files, in the order of the features.
        features: float32 [N, C].

    Returns:
        The written files.
    """
    check_output(out)
    columns: dict[str, list[str]] = {"file": [str(path) for path in files.paths]}
    if files.class_names:
        columns |= {"part": files.parts, "class": [files.class_names[label] for label in files.labels.tolist()]}
    if out.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        values = pa.FixedSizeListArray.from_arrays(pa.array(features.numpy().ravel()), features.shape[1])
        with replacing(out) as temporary:
            pq.write_table(pa.table({**columns, "features": values}), temporary)
        return [out]
    names = out.with_suffix(".csv")
    with replacing(names) as temporary, temporary.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    with replacing(out) as temporary, temporary.open("wb") as binary:
        np.save(binary, features.numpy())
    return [out, names]


def quick_accuracy(files: LabeledFiles, features: Tensor, config: KnnConfig | None = None) -> dict[str, float]:
    """Measure how well the features separate the classes: train/ votes and is fitted, val/ is counted.

    For a quick look: the images are not augmented. ``--stage probe`` trains the linear probe of the paper.

    Args:
        files: files with classes.
        features: float32 [N, C].
        config: number of neighbors and temperature; default: those of ``stages.pretrain.knn``.

    Returns:
        ``knn/top1`` and ``probe/top1`` in percent.

    Raises:
        UserError: if a part has no image, or train/ has only one.
    """
    for name, least in (("train", 2), ("val", 1)):
        if files.parts.count(name) < least:
            raise UserError(f"--accuracy: {name}/ has too few images that can be read; at least {least} are needed")
    config = config or KnnConfig()
    is_val = torch.tensor([part == "val" for part in files.parts])
    (train, val), (known, wanted) = ((rows[~is_val], rows[is_val]) for rows in (features, files.labels))
    bank, classes = Bank(F.normalize(train, dim=1), known), len(files.class_names)
    near = torch.cat([votes(part, bank, config.k, config.temperature, classes) for part in val.split(_QUERIES)])
    logits = fit_linear(train, known, classes)(val)
    found = {"knn/top1": near, "probe/top1": logits}
    return {name: 100 * (scores.argmax(dim=1) == wanted).double().mean().item() for name, scores in found.items()}


def fit_linear(features: Tensor, labels: Tensor, num_classes: int) -> torch.nn.Module:
    """Fit a multinomial logistic regression on standardized features by L-BFGS, from zero: nothing is random.

    Args:
        features: float32 [N, C].
        labels: int64 [N].
        num_classes: number of outputs.

    Returns:
        Module of features [B, C] to logits [B, classes].
    """
    norm = torch.nn.BatchNorm1d(features.shape[1], eps=1e-6, affine=False, momentum=None)
    norm(features)  # momentum None: the running statistics are those of this one batch
    inputs = norm.eval()(features)
    linear = torch.nn.Linear(features.shape[1], num_classes)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(inputs), labels) + _DECAY / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return torch.nn.Sequential(norm, linear).requires_grad_(False)
