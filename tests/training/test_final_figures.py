from __future__ import annotations

from pathlib import Path

import pytest

from mrmae_ds.errors import UserError
from mrmae_ds.training.final_figures import draw


@pytest.mark.parametrize("error", [UserError("the set is gone"), RuntimeError("a fault of ours")], ids=["user", "ours"])
def test_a_finished_stage_stays_finished_when_an_image_cannot_be_drawn(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    drawn: list[Path] = []

    def fail(folder: Path, path: Path) -> None:
        raise error

    monkeypatch.setattr("mrmae_ds.figures.plots.loss_curves", fail)
    monkeypatch.setattr("mrmae_ds.figures.visualize.show_run", drawn.append)
    draw(tmp_path)
    assert drawn == [tmp_path]  # one failure does not keep the other from being drawn
    assert f"{tmp_path}: finished, but its loss curves were not drawn" in caplog.text and str(error) in caplog.text
    assert ("Traceback" in caplog.text) == isinstance(error, RuntimeError)
