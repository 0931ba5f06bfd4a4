"""The callbacks that a section of the recipe switches on."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mrmae_ds.config.recipe import OPTIONAL_CALLBACKS, load_recipe
from mrmae_ds.errors import UserError
from mrmae_ds.records.record import RunRecord
from mrmae_ds.training.callbacks.base import Callback, TrainContext
from mrmae_ds.training.callbacks.build import TRACKER_LIMIT_S, build_optional_callbacks, check_optional_callbacks
from mrmae_ds.training.callbacks.mlflow import LIMITS
from mrmae_ds.training.callbacks.nonfatal import NonfatalCallback
from mrmae_ds.training.checkpoint.train_state import TrainState
from mrmae_ds.training.run_logger import RecordWriter
from mrmae_ds.training.step_sync import StepStatus
from tests.support.jobs import make_context
from tests.support.processes import free_port
from tests.support.records import make_record

RECIPE, CPU = Path("ds_configs/baselines/mae_tiny.yaml"), torch.device("cpu")


@pytest.fixture(autouse=True)
def _collection_is_enabled_again() -> Iterator[None]:
    yield
    gc.enable()


def _build(folder: Path, *overrides: str, rank: int = 0) -> list[Callback]:
    return build_optional_callbacks(load_recipe(RECIPE, list(overrides)), "pretrain", folder, rank, CPU)


class _Broken(Callback):
    """Counts the calls of its methods, and raises from one of them."""

    def __init__(self, broken: str) -> None:
        self.broken, self.calls = broken, 0

    def __getattribute__(self, name: str) -> Any:
        if not (name.startswith("on_") or name == "close"):
            return super().__getattribute__(name)
        return lambda *_: self.count(name)

    def count(self, name: str) -> None:
        self.calls += 1
        if name == self.broken:
            raise RuntimeError(f"no\nserver in {name}")


def _steps(callback: Callback, steps: int, start: int = 0) -> TrainContext:
    context = make_context(state=TrainState(step=start))
    callback.on_train_start(context)
    for _ in range(steps):
        torch.rand(8, 8) @ torch.rand(8, 8)
        context.state.step += 1
        callback.on_step_end(context, StepStatus())
    return context


def test_none_is_on_by_default_and_none_changes_a_hash(tmp_path: Path) -> None:
    assert _build(tmp_path) == []
    sections = [f"{name}={{}}" for name in OPTIONAL_CALLBACKS]
    plain, full = load_recipe(RECIPE), load_recipe(RECIPE, sections)
    assert len(build_optional_callbacks(full, "pretrain", tmp_path, 0, CPU)) == len(OPTIONAL_CALLBACKS)
    assert plain.hash() == full.hash() and plain.counted("pretrain") == full.counted("pretrain")


def test_other_ranks_only_collect_garbage_and_mark_stages(tmp_path: Path) -> None:
    sections = [f"{name}={{}}" for name in OPTIONAL_CALLBACKS]
    found = [type(callback).__name__ for callback in _build(tmp_path, *sections, rank=1)]
    assert found == ["GarbageCollectionCallback", "NvtxCallback"]


@pytest.mark.parametrize(("broken", "calls"), [("on_train_start", 1), ("on_log", 4), ("close", 6)])
def test_a_failing_optional_callback_is_left_out_with_one_warning(
    broken: str, calls: int, caplog: pytest.LogCaptureFixture
) -> None:
    callback = _Broken(broken)
    guarded, context = NonfatalCallback("wandb", callback), make_context()
    guarded.on_train_start(context)
    guarded.on_step_skipped(context, StepStatus())
    guarded.on_step_end(context, StepStatus())
    guarded.on_log(context, {})
    guarded.on_train_end(context)
    guarded.close()
    (record,) = caplog.records
    assert callback.calls == calls and record.levelname == "WARNING"
    assert record.message == (f"wandb: RuntimeError: no server in {broken}; it is off from here, training continues")


@pytest.mark.parametrize("hung", ["on_train_start", "on_log", "on_train_end", "close"])
def test_a_tracker_that_never_answers_is_left_out(hung: str, caplog: pytest.LogCaptureFixture) -> None:
    asked, answer = threading.Event(), threading.Event()

    class Hung(_Broken):
        def count(self, name: str) -> None:
            self.calls += 1
            if name == hung:
                asked.set()
                answer.wait()

    callback = Hung(hung)
    guarded, context = NonfatalCallback("wandb", callback), make_context()
    calls = {
        "on_train_start": lambda: guarded.on_train_start(context),
        "on_log": lambda: guarded.on_log(context, {}),
        "on_train_end": lambda: guarded.on_train_end(context),
        "close": guarded.close,
    }
    for name, call in calls.items():
        guarded.limit_s = 0.1 if name == hung else 60.0  # a loaded machine answers late
        call()
    assert asked.wait(60)
    answer.set()
    assert callback.calls == 1 + [*calls].index(hung)
    message = "wandb: TimeoutError: no answer within 0.1 s; it is off from here, training continues"
    assert [record.message for record in caplog.records] == [message]


def test_trackers_have_less_time_than_the_watchdog(tmp_path: Path) -> None:
    for minutes, seconds in ((20, TRACKER_LIMIT_S), (1, 30)):
        found = _build(tmp_path, "wandb={}", "mlflow={}", f"watchdog.timeout_minutes={minutes}")
        assert [callback.limit_s for callback in found if isinstance(callback, NonfatalCallback)] == [seconds] * 2


def test_rank_0s_observers_cannot_end_a_training(tmp_path: Path) -> None:
    observers = _build(tmp_path, "profiler={}", "memory_snapshot={}", "wandb={}", "mlflow={}")
    assert [callback.name for callback in observers if isinstance(callback, NonfatalCallback)] == [
        "profiler",
        "memory_snapshot",
        "wandb",
        "mlflow",
    ]


# ---- profiler


def test_the_profiler_writes_a_chrome_trace_of_its_window(tmp_path: Path) -> None:
    (callback,) = _build(tmp_path, "profiler={start_step: 2, num_steps: 2}")
    _steps(callback, 6)
    callback.close()
    events = json.loads((tmp_path / "profile/step_000000002.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 2


@pytest.mark.parametrize(("start", "expected"), [(1, True), (2, True), (3, False)])
def test_a_resumed_run_profiles_if_its_window_is_still_ahead(start: int, expected: bool, tmp_path: Path) -> None:
    (callback,) = _build(tmp_path, "profiler={start_step: 2, num_steps: 1}")
    _steps(callback, 3, start)
    assert (tmp_path / "profile/step_000000002.json").exists() == expected


def test_a_window_that_training_does_not_complete_is_written_at_the_end(tmp_path: Path) -> None:
    (callback,) = _build(tmp_path, "profiler={start_step: 0, num_steps: 100}")
    path = tmp_path / "profile/step_000000000.json"
    _steps(callback, 1)
    assert not path.exists()
    callback.close()
    assert path.exists()


@pytest.mark.parametrize(
    ("window", "resumed_at", "reason"),
    [(15, 0, "the stage ends at step 15"), (2, 3, "this run resumes at step 3"), (14, 0, ""), (2, 2, "")],
)
def test_a_window_that_never_opens_is_warned_of(
    window: int, resumed_at: int, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (callback,) = _build(tmp_path, f"profiler={{start_step: {window}}}")
    callback.on_train_start(make_context(state=TrainState(step=resumed_at)))
    callback.close()
    assert (f"profiler trace: starts at step {window}, but {reason}; nothing is recorded" in caplog.text) == bool(
        reason
    )


def test_the_trace_of_the_start_before_is_not_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (2, 5):
        (callback,) = _build(tmp_path, "profiler={start_step: 2, num_steps: 9}")
        _steps(callback, 1, start=step)
        callback.close()
    assert "nothing is recorded" not in caplog.text and (tmp_path / "profile/step_000000002.json").exists()


# ---- memory snapshot


def test_a_memory_snapshot_without_a_gpu_is_refused_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (callback,) = _build(tmp_path, "memory_snapshot={}")
    assert "memory_snapshot: needs a CUDA device, not cpu; nothing is recorded" in caplog.text
    _steps(callback, 5)
    callback.close()
    assert list(tmp_path.iterdir()) == []


def test_a_memory_snapshot_covers_its_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda **settings: calls.append(("record", settings)))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: calls.append(("dump", path)))
    recipe = load_recipe(RECIPE, ["memory_snapshot={start_step: 1, num_steps: 2, max_entries: 9}"])
    (callback,) = build_optional_callbacks(recipe, "pretrain", tmp_path, 0, torch.device("cuda"))
    _steps(callback, 6)
    callback.close()
    path = str(tmp_path / "profile/memory_step_000000001.pickle")
    assert calls == [("record", {"max_entries": 9}), ("dump", path), ("record", {"enabled": None})]


# ---- garbage collection


def test_garbage_is_collected_every_few_steps_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    collected: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda generation=2: collected.append(generation))
    (callback,) = _build(tmp_path, "garbage_collection={every_steps: 3}")
    _steps(callback, 7)
    assert collected == [2, 1, 1] and not gc.isenabled()
    callback.close()
    assert gc.isenabled()


# ---- Weights & Biases


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_trackers_missing_package_is_bad_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(RECIPE, [f"{name}={{}}"])
    check_optional_callbacks(recipe)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UserError, match=rf"{name}: the package is not installed; .*pip install -e '\.\[{name}\]' -c constraints\.txt"
    ):
        check_optional_callbacks(recipe)
    check_optional_callbacks(load_recipe(RECIPE))


def _wandb_records(path: Path) -> Iterator[Any]:
    """Read a file of an offline run: a header of 7 bytes, then records of LevelDB's log, all small here."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, start = path.read_bytes(), 7
    while start < len(content):
        length = int.from_bytes(content[start + 4 : start + 6], "little")
        assert content[start + 6] == 1  # a whole record
        yield Record.FromString(content[start + 7 : start + 7 + length])
        start += 7 + length


def test_wandb_gets_recipe_lines_and_results_and_resumes_its_run(tmp_path: Path) -> None:
    """The real library, offline: two starts write two folders of one run."""
    pytest.importorskip("wandb")
    for start in range(2):
        (callback,) = _build(tmp_path, "wandb={project: p, mode: offline, tags: [a]}")
        context = make_context(state=TrainState(step=5 + start), results={"top1": 50.0})
        callback.on_train_start(context)
        callback.on_log(context, {"loss": 1.5 + start})
        callback.on_train_end(context)
        callback.close()
        assert not callback.failed  # type: ignore[attr-defined]
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    identity = (tmp_path / "wandb_id.txt").read_text()
    assert len(files) == 2 and {file.name for file in files} == {f"run-{identity}.wandb"}
    for start, file in enumerate(files):
        records = list(_wandb_records(file))
        (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert (run.run_id, run.project, list(run.tags)) == (identity, "p", ["a"])
        assert config["model"]["arch"] == load_recipe(RECIPE).model.arch
        (line,) = (record.history for record in records if record.WhichOneof("record_type") == "history")
        values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in line.item}
        assert (values["loss"], values["_step"]) == (1.5 + start, 5 + start)
        updates = [item for record in records for item in record.summary.update]
        assert any((item.key or item.nested_key[0], item.value_json) == ("top1", "50.0") for item in updates)


def test_the_record_names_the_trackers_runs(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, make_record())
    writer.write("running")
    assert RunRecord.load(tmp_path).trackers == {}
    (tmp_path / "wandb_id.txt").write_text("abc123")
    writer.write("running")
    assert RunRecord.load(tmp_path).trackers == {"wandb": "abc123"}
    (tmp_path / "mlflow_id.txt").write_text("def456")
    writer.write("running")
    assert RunRecord.load(tmp_path).trackers == {"wandb": "abc123", "mlflow": "def456"}


def test_wandb_that_never_finishes_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package, server = ModuleType("wandb"), threading.Event()
    package.init = lambda **settings: SimpleNamespace(id="abc123", finish=server.wait)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setattr("mrmae_ds.training.callbacks.wandb.FINISH_LIMIT_S", 0.01)
    (callback,) = _build(tmp_path, "wandb={}")
    callback.on_train_start(make_context())
    callback.close()
    server.set()
    assert "wandb: TimeoutError: not everything was sent within 0.01 s; wandb sync sends the rest" in caplog.text


# ---- MLflow


def test_mlflow_gets_recipe_lines_and_results_and_resumes_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real library, into a folder: a start that is killed, and one that continues its run to the end."""
    client_of = pytest.importorskip("mlflow").MlflowClient
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = (tmp_path / "store").as_uri()
    (tmp_path / "stage").mkdir()
    for start, status in enumerate(("KILLED", "FINISHED")):
        (callback,) = _build(tmp_path / "stage", f"mlflow={{tracking_uri: '{store}', experiment: e, tags: {{a: b}}}}")
        context = make_context(state=TrainState(step=5 + start), results={"top1": 50.0})
        callback.on_train_start(context)
        identity = (tmp_path / "stage" / "mlflow_id.txt").read_text()
        assert client_of(store).get_run(identity).info.status == "RUNNING"
        callback.on_log(context, {"loss": 1.5 + start, "loss/pixels": 2.0})
        if status == "FINISHED":
            callback.on_train_end(context)
        callback.close()
        assert not callback.failed  # type: ignore[attr-defined]
        run = client_of(store).get_run(identity)
        assert run.info.status == status
    client = client_of(store)
    experiment = client.get_experiment_by_name("e")
    assert [found.info.run_id for found in client.search_runs([experiment.experiment_id])] == [identity]
    assert [(item.step, item.value) for item in client.get_metric_history(identity, "loss")] == [(5, 1.5), (6, 2.5)]
    assert run.data.metrics == {"loss": 2.5, "loss.pixels": 2.0, "top1": 50.0}
    assert (run.data.tags["a"], run.data.tags["stage"]) == ("b", "pretrain")
    recipe = json.loads(Path(client.download_artifacts(identity, "recipe.json")).read_text())
    assert recipe["model"]["arch"] == load_recipe(RECIPE).model.arch


@pytest.mark.parametrize("way", ["deleted", "purged"])
def test_a_stage_whose_mlflow_run_was_deleted_gets_a_new_one(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client_of = pytest.importorskip("mlflow").MlflowClient
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store, identities = (tmp_path / "store").as_uri(), []
    (tmp_path / "stage").mkdir()
    for step in range(2):
        (callback,) = _build(tmp_path / "stage", f"mlflow={{tracking_uri: '{store}'}}")
        context = make_context(state=TrainState(step=step))
        callback.on_train_start(context)
        identities.append((tmp_path / "stage" / "mlflow_id.txt").read_text())
        callback.on_log(context, {"loss": 1.0})
        callback.close()
        assert not callback.failed  # type: ignore[attr-defined]
        if step == 0 and way == "deleted":
            client_of(store).delete_run(identities[0])
        elif step == 0:
            shutil.rmtree(next((tmp_path / "store").glob(f"*/{identities[0]}")))
    message = f"mlflow: run {identities[0]} was deleted; a new one gets the values from here"
    assert [record.message for record in caplog.records] == [message]
    (metric,) = client_of(store).get_metric_history(identities[1], "loss")
    assert identities[0] != identities[1] and metric.step == 1


def test_an_mlflow_server_that_is_gone_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mlflow")
    for name in LIMITS:
        monkeypatch.setenv(name, "0" if "RETRIES" in name else "1")
    (callback,) = _build(tmp_path, f"mlflow={{tracking_uri: 'http://127.0.0.1:{free_port()}'}}")
    _steps(callback, 2)
    callback.close()
    warnings = [record.message for record in caplog.records if record.message.startswith("mlflow: ")]
    assert len(warnings) == 1 and warnings[0].endswith("; it is off from here, training continues")
    assert not (tmp_path / "mlflow_id.txt").exists()
