"""Traps of ZeRO on two ranks; each test fails without its guard.

Other traps are tested with their guard: missing gradient clipping and unknown keys in tests/config/test_engine.py,
parameter groups of a partitioned model in test_param_groups.py, weight decay under every stage in test_parity.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mrmae_ds.training.evaluation.base import EvalContext
from tests.support.ranks import run_in_group
from tests.support.traps_worker import RATE, measure
from tests.training.parity.cases import Case
from tests.training.parity.job import prepare, write_workspace
from tests.training.parity.plain import ALONE

pytestmark = [pytest.mark.timeout(600), pytest.mark.multi_process]
BLOCKS = [f"blocks{name}" for name in ("1.0", "2.0", "3.0", "3.1", "3.2")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traps")
    write_workspace(folder)
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """Results of each of two ranks."""
    run_in_group(measure, 2, folder, limit_s=400)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_a_parameter_without_gradient_is_not_moved_by_its_previous_one(ranks: list[dict[str, Any]]) -> None:
    """The first half shows why the guard exists: if DeepSpeed fixes this, both can go."""
    for results in ranks:
        assert results["unwatched"]["1"] == results["unwatched"]["2"] == 0
        assert results["unwatched"]["3"] == pytest.approx(RATE, rel=1e-4)
        for message in results["watched"].values():
            assert "no gradient reached sometimes.weight: " in message


def test_all_ranks_run_the_same_modules_whatever_paths_are_dropped(ranks: list[dict[str, Any]]) -> None:
    first, second = (results["modules"] for results in ranks)
    assert first == second
    # Three steps; forward and recomputation, of which the transformer's second block has none.
    expected = dict.fromkeys(BLOCKS, 6) | {"blocks3.1": 3}
    assert {name: first.count(name) for name in BLOCKS} == expected


def test_evaluates_unequal_shares_counting_each_image_once(ranks: list[dict[str, Any]], folder: Path) -> None:
    job = prepare(Case("finetune", 0, False, 1, 1), folder, ALONE)
    context = EvalContext(
        job.recipe, job.engine_config, ALONE, torch.device("cpu"), job.val_data, lambda activity: None
    )
    model, reader = job.task.model.eval(), context.loader(job.task.image_size)
    logits, labels = [], []
    with torch.no_grad():
        for batch in reader.epoch(0):
            for image, label, valid in zip(batch.images, batch.labels, batch.valid, strict=True):
                if valid:
                    logits.append(job.task.logits(model, image[None]))
                    labels.append(label)
    assert len(labels) == 9
    outputs, targets = torch.cat(logits).double(), torch.stack(labels)
    for results in ranks:
        results = results["evaluation"]
        assert results["eval_samples"] == 9
        assert results["top1"] == pytest.approx(100 * (outputs.argmax(1) == targets).double().mean().item())
        assert results["loss"] == pytest.approx(torch.nn.functional.cross_entropy(outputs, targets).item(), rel=1e-6)


def test_leaves_linear_of_torch_alone(ranks: list[dict[str, Any]]) -> None:
    assert all(results["linear"] for results in ranks)


def test_huge_gathers_its_model_once_per_step(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        steady = {name: {step["models"] for step in steps[2:]} for name, steps in results["gathers"].items()}
        for name, expected in {"huge": 1, "autocast": 1, "accumulation": 1, "released": 2}.items():
            for models in steady[name]:
                # A parameter that the ranks cannot share evenly is padded.
                assert expected <= models < 1.001 * expected, (name, steady[name])


def test_modules_have_no_hooks_where_every_parameter_stays_gathered(ranks: list[dict[str, Any]]) -> None:
    for results in ranks:
        first, *middle, last = results["accumulated"]["none"]["hooks"]
        assert first == last > 0
        assert middle == [0, 0]


@pytest.mark.parametrize("branch_in", ["none", "1", "2"])
def test_a_module_that_runs_for_the_first_time_gathers_its_parameters(
    branch_in: str, ranks: list[dict[str, Any]]
) -> None:
    """Both layers' weights are 0.5, and micro-batch i holds four times 1 + i."""
    expected = [4 * (2.0 * (1 + i)) ** 2 for i in range(4)] * 3
    if branch_in != "none":
        expected[int(branch_in)] *= 4
    for results in ranks:
        assert results["accumulated"][branch_in]["losses"] == expected
