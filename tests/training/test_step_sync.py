from __future__ import annotations

import pytest

from mrmae_ds.training.step_sync import StepSync


def test_all_ranks_use_rank_0s_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks do not read theirs; they get the result of the reduction."""
    step_sync = StepSync(save_minutes=1 / 60)
    step_sync.last_save -= 2
    rank = 0
    monkeypatch.setattr("mrmae_ds.training.step_sync.dist.get_rank", lambda: rank)
    assert step_sync._save_is_due()
    rank = 1
    assert not step_sync._save_is_due()
    rank = 0
    step_sync.saved()
    assert not step_sync._save_is_due()
    assert not StepSync()._save_is_due()
