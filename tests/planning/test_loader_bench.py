"""``mrmae data bench``: a stage's own crops, the cores of a GPU by hand, and the file that the plan reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mrmae_ds.cli.main import main
from mrmae_ds.data.loaders.augment import AugmentSettings
from mrmae_ds.data.loaders.throughput import Throughput
from mrmae_ds.errors import UserError
from mrmae_ds.planning import loader_bench
from mrmae_ds.planning.loader_bench import LoaderBenchRequest, bench_loader
from mrmae_ds.profiling.measured_node import read_step_rates

pytestmark = pytest.mark.timeout(240, method="thread")
SMALL = Path("ds_configs/small.json")


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list:
    """Replace the measurement by 2 CPU ms an image, and record what is to be read."""
    made: list = []
    monkeypatch.setattr(
        loader_bench, "build_loader", lambda data, config, request: made.append((data, config, request))
    )
    monkeypatch.setattr(loader_bench, "measure_throughput", lambda loader, seconds: Throughput(900.0, 2.0))
    return made


def test_stages_are_read_as_they_train(betons: tuple[Path, Path], requests: list) -> None:
    recipe = ("stages.finetune.crop_scale=[0.3, 0.9]", "model.image_size=64")
    text = bench_loader(
        LoaderBenchRequest(betons[0], SMALL, backend="pillow", workers=1, images_per_s=1500, overrides=recipe)
    )
    (data, config, pretrain), (_, _, finetune) = requests
    assert (data.train, data.backend, config.num_workers) == (betons[0], "pillow", 1)
    assert pretrain.image_size == finetune.image_size == 64 and pretrain.micro_batch == 128
    assert pretrain.transform.crop.scale == (0.2, 1.0) and pretrain.transform.augment is None
    assert finetune.transform.crop.scale == (0.3, 0.9) and isinstance(finetune.transform.augment, AugmentSettings)
    assert "pretrain, 64 pixels: 900 images/s, 500 a core (2.00 CPU ms an image)" in text
    assert "finetune, 64 pixels, rand-m9-mstd0.5-inc1: 900 images/s" in text
    assert text.count("a GPU trains 1,500 images/s (as given): 3.0 cores a GPU") == 2


def test_the_plans_images_per_s_are_called_an_estimate(
    betons: tuple[Path, Path], requests: list, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out, small = tmp_path / "bench.json", ("--ds_config", str(SMALL), "--stage", "pretrain")
    blocks = "model.overrides={depths: [1, 1, 1]}"
    gpu = ("--gpu", "h100-80", "--gpus", "8")
    assert main(["data", "bench", str(betons[0]), *small, *gpu, "--out", str(out), blocks]) == 0
    text = capsys.readouterr().out
    assert "an estimate of mrmae plan for 8 x h100-80 (one node), not measured): " in text
    assert json.loads(out.read_text())["rounds"] == {
        "mrmae_ds, ffcv backend": [{"stage": "pretrain", "size": 224, "images_per_s": 900.0, "cpu_s_per_1000": 2.0}]
    }
    needed = float(text.split("a GPU trains ")[1].split(" ")[0].replace(",", ""))
    assert main(["plan", *small, *gpu, "--loader-bench", str(out), blocks]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  loader: ")]
    assert line.startswith(f"  loader: {8 * needed:,.0f}"[:-1]) and "at 2.00 CPU-s per 1,000 (224 pixels" in line
    assert f"cores, {needed * 2 / 1000:,.1f} a GPU" in line and line.endswith("measured, bench.json)")


def test_stages_of_one_loader_have_a_measurement_each(
    betons: tuple[Path, Path], requests: list, tmp_path: Path
) -> None:
    """Without RandAugment the loader of fine-tuning has the name of pre-training's."""
    out = tmp_path / "bench.json"
    overrides = ("stages.finetune.rand_augment=null", "stages.finetune.image_size=288")
    bench_loader(LoaderBenchRequest(betons[0], SMALL, out=out, overrides=overrides))
    ((name, measured),) = json.loads(out.read_text())["rounds"].items()
    assert name == "mrmae_ds, ffcv backend"
    assert [(each["stage"], each["size"]) for each in measured] == [("pretrain", 224), ("finetune", 288)]


def test_augmentation_on_the_device_is_not_measured_on_the_cpu(
    betons: tuple[Path, Path], requests: list, tmp_path: Path
) -> None:
    out = tmp_path / "bench.json"
    overrides = ("loader.augment_on=device", "loader.cache_dir=/nowhere", "loader.num_workers=7")
    request = LoaderBenchRequest(betons[0], SMALL, stage="finetune", workers=1, out=out, overrides=overrides)
    assert "finetune, 224 pixels, rand-m9-mstd0.5-inc1 on the device and not measured: " in bench_loader(request)
    ((_, config, read),) = requests
    assert read.transform.augment is None and config.num_workers == 1
    assert (config.augment_on, config.cache_dir) == ("device", None)  # all else as in the recipe, but read in place
    assert list(json.loads(out.read_text())["rounds"]) == ["mrmae_ds, ffcv backend"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpu": "h100"}, "--gpu h100: unknown GPU.* `mrmae data bench` --images-per-s"),
        ({"gpu": "h100-80", "gpus": 0}, "--gpus"),
        ({"gpu": "h100-80", "measured": Path("none.json")}, "none.json"),
        ({"out": Path("/proc/none/bench.json")}, "/proc/none: cannot be made"),
        ({"out": Path("tests")}, "tests: is a folder"),
    ],
)
def test_invalid_options_are_errors_before_anything_is_measured(
    betons: tuple[Path, Path], requests: list, values: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        bench_loader(LoaderBenchRequest(betons[0], SMALL, stage="pretrain", **values))
    assert requests == []


def test_steps_of_the_doctor_come_before_the_estimate(
    betons: tuple[Path, Path], requests: list, tmp_path: Path
) -> None:
    rows = [{"name": "recipe", "value": "small", "unit": ""}]
    rows += [{"name": f"{n}", "value": rate, "unit": "images/s"} for n, rate in enumerate((700.0, 1200.0, 900.0))]
    doctor = tmp_path / "doctor.json"
    measured = {"device": "NVIDIA H100 80GB HBM3", "op_us": 9.0}
    doctor.write_text(
        json.dumps(
            {
                "format": 1,
                "checks": [{"name": "steps", "status": "done", "message": "", "rows": rows}],
                "measured": measured,
            }
        )
    )
    assert read_step_rates(doctor) == {"small": 1200.0}
    request = LoaderBenchRequest(betons[0], SMALL, stage="pretrain", gpu="h100-80", measured=doctor)
    assert "a GPU trains 1,200 images/s (measured by mrmae doctor on NVIDIA H100" in bench_loader(request)


@pytest.mark.parametrize("backend", [pytest.param("ffcv", marks=pytest.mark.ffcv), "pillow"])
def test_a_measurement_is_consistent(betons: tuple[Path, Path], backend: str, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    request = LoaderBenchRequest(betons[0], backend=backend, workers=1, seconds=0.5, out=out)
    assert "  no recipe, 224 pixels: " in bench_loader(request)
    ((measured,),) = json.loads(out.read_text())["rounds"].values()
    # A worker and this process cannot use more than two cores.
    assert 0 < measured["cpu_s_per_1000"] * measured["images_per_s"] / 1000 < 2.3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpu": "h100-80"}, "--gpu: needs --ds_config"),
        ({"overrides": ("seed=1",)}, "seed=1: needs --ds_config"),
        ({"seconds": 0.0}, "--seconds must be above 0, got 0"),
        ({"workers": 0}, "--workers must be at least 1, got 0"),
        ({"ds_config": SMALL, "measured": Path("x")}, "--measured needs --gpu"),
        ({"ds_config": SMALL, "stage": "detect"}, "has no stage detect"),
    ],
)
def test_contradicting_options_are_errors(betons: tuple[Path, Path], values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench_loader(LoaderBenchRequest(betons[0], **values))
