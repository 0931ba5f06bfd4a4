"""COCO's scores of a detector while it trains; every validation image is counted exactly once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from mrmae_ds.data.loaders.build import num_workers_of
from mrmae_ds.detection.coco import CocoSplit
from mrmae_ds.detection.draw import draw_predictions, fixed_rows
from mrmae_ds.detection.evaluate import (
    ResultsByImage,
    batch_results,
    coco_scores,
    gather_results,
    merge_results,
    write_per_class,
    write_results,
)
from mrmae_ds.detection.loader import DetectionBatch, DetectionLoader
from mrmae_ds.distributed.collectives import broadcast_object, raise_on_all_ranks
from mrmae_ds.errors import UserError
from mrmae_ds.training.evaluation.base import EvalContext, Evaluator, Scores

Detect = Callable[[nn.Module, DetectionBatch], Sequence[Mapping[str, Tensor]]]
RESULTS_FILE, CLASSES_FILE, FIGURE_FILE = "results_val.json", "per_class.csv", "predictions.png"


class CocoEvaluator(Evaluator):
    """AP of boxes and masks on the validation set.

    Rank 0 writes the results, AP by class and a figure of eight images into the stage's folder.

    Args:
        context: recipe, ranks and device.
        detect: function of the engine and of a batch to the detections of each image.
        split: validation set.
        image_size: side of the square input, pixels.
        every_epochs: epochs between two measurements.
        last_epoch: number of epochs of the stage.
    """

    metrics: ClassVar = {"box/AP": "box/AP", "mask/AP": "mask/AP"}

    def __init__(
        self,
        context: EvalContext,
        detect: Detect,
        split: CocoSplit,
        image_size: int,
        every_epochs: int,
        last_epoch: int,
    ) -> None:
        super().__init__(every_epochs, last_epoch)
        self.detect, self.split, self.heartbeat = detect, split, context.heartbeat
        self.stage_dir, self.draw_score = context.stage_dir, context.recipe.logging.draw_score
        workers = num_workers_of(context.recipe.loader)
        self.loader = DetectionLoader(split, context.request(image_size), None, workers, context.device)

    @torch.no_grad()
    def run(self, engine: nn.Module) -> Scores:
        """Measure AP on the validation set."""
        engine.eval()
        own: ResultsByImage = {}
        for batch in self.loader.epoch(0):
            self.heartbeat("evaluating")
            own |= batch_results(self.detect(engine, batch), batch, self.split.index.category_ids)
        parts = gather_results(own)
        scores: Scores = {}
        error = None
        if parts is not None:
            self.heartbeat("computing COCO's scores")
            try:
                scores = self._score(parts)
            except (UserError, OSError) as problem:
                error = str(problem)
        raise_on_all_ranks(error)
        return broadcast_object(scores)

    def _score(self, parts: Sequence[ResultsByImage]) -> Scores:
        split = self.split
        results = merge_results(parts, split.index.image_ids[split.rows])
        found = coco_scores(results, split.index, split.rows)
        if self.stage_dir is not None:
            write_results(results, self.stage_dir / RESULTS_FILE)
            write_per_class(found, self.stage_dir / CLASSES_FILE)
            draw_predictions(split, fixed_rows(split), results, self.stage_dir / FIGURE_FILE, score=self.draw_score)
        named = {f"box/{name}": value for name, value in found.box.items()}
        named |= {f"mask/{name}": value for name, value in found.mask.items()}
        scores: Scores = {name: value for name, value in named.items() if value is not None}
        return scores | {"eval_samples": split.num_samples}
