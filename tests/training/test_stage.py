from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mrmae_ds.errors import UserError
from mrmae_ds.recipe_sections import RecordConfig
from mrmae_ds.training import stage
from mrmae_ds.training.stage import _Hooks
from mrmae_ds.training.tasks import FinetuneTask

from .builders import finetune_config


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps at which a checkpoint was written."""
    steps: list[int] = []
    monkeypatch.setattr(stage, "save_checkpoint", lambda engine, folder, step, *rest: steps.append(step))
    monkeypatch.setattr(stage, "evaluate", lambda *_: {"top1": 50.0, "loss": 1.5, "eval_samples": 10})
    return steps


def _hooks(epochs: int = 5, eval_every: int = 2, save_every: int = 3, val: Any = "a reader") -> _Hooks:
    recipe = SimpleNamespace(
        record=RecordConfig(save_every_epochs=save_every, keep_checkpoints=2), hash=lambda stage: f"abc {stage}", seed=0
    )
    config = finetune_config(epochs=epochs, eval_every_epochs=eval_every)
    task = FinetuneTask.__new__(FinetuneTask)
    folder = Path("runs/x/finetune")
    job = SimpleNamespace(recipe=recipe, stage_name="finetune", stage=config, task=task, stage_dir=folder)
    return _Hooks(job, None, val, None)


def test_it_evaluates_every_few_epochs_and_at_the_end(saved: list[int]) -> None:
    hooks = _hooks(epochs=5, eval_every=2)
    evaluated = [epoch for epoch in range(1, 6) if hooks.end_of_epoch(epoch, epoch * 10)]
    assert evaluated == [2, 4, 5]
    assert hooks.end_of_epoch(2, 20) == {"top1": 50.0, "val_loss": 1.5}
    assert _hooks(val=None).end_of_epoch(2, 20) == {}


def test_it_saves_every_few_epochs_and_at_the_end(saved: list[int]) -> None:
    hooks = _hooks(epochs=5, save_every=3)
    for epoch in range(1, 6):
        hooks.save(epoch, epoch * 10)
    assert saved == [30, 50]


def test_results_hold_the_first_and_the_last_loss_and_the_newest_evaluation(saved: list[int]) -> None:
    hooks = _hooks(epochs=2, eval_every=1)
    for step, loss in ((1, 3.0), (10, 2.0), (20, 1.0)):
        if step % 10 == 0:
            hooks.end_of_epoch(step // 10, step)
        hooks.log(step, {"loss": loss})
    assert hooks.results == {"first_loss": 3.0, "last_loss": 1.0, "top1": 50.0, "loss": 1.5, "eval_samples": 10}


@pytest.mark.parametrize("error", [UserError("the set is gone"), RuntimeError("a fault of ours")], ids=["user", "ours"])
def test_a_finished_stage_stays_finished_when_a_picture_cannot_be_drawn(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[Path] = []

    def fail(folder: Path, path: Path) -> None:
        raise error

    monkeypatch.setattr("mrmae_ds.reporting.figures.loss_curves", fail)
    monkeypatch.setattr("mrmae_ds.reporting.show.show_run", drawn.append)
    stage._draw(tmp_path)
    assert drawn == [tmp_path]  # one failure does not keep the other from being drawn
    told = capsys.readouterr().err
    assert told.startswith(f"{tmp_path}: finished, but its loss curves were not drawn: ") and str(error) in told
    assert ("Traceback" in told) == isinstance(error, RuntimeError)
