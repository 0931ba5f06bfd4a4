from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mrmae_ds.cli.main import build_parser, main
from mrmae_ds.config.recipe import load_recipe
from tests.support.processes import REPOSITORY, Finished, run
from tests.support.records import make_record
from tests.weights.test_export import CVIT, classifier_run

CONFIG = "ds_configs/tiny.json"
LIMIT_S = 120


def _train(*arguments: str | Path) -> Finished:
    return run([sys.executable, "train.py", *arguments], LIMIT_S)


@pytest.mark.parametrize(
    "arguments",
    [
        ["table", "{}/nowhere"],
        ["table", "{}/file.txt"],
        ["table", "{}/torn"],
        ["show", "{}/nowhere"],
        ["show", "{}/torn"],
        ["show", "{}/file.txt", "{}/nowhere", "--images", "3", "--num-images", "2"],
        ["data", "info", "{}/nowhere.beton"],
        ["data", "info", "{}/file.txt"],
        ["data", "verify", "{}/nowhere.beton"],
        ["data", "verify", "{}/file.txt"],
        ["export", "{}/nowhere"],
        ["export", "{}/file.txt"],
        ["export", "{}/torn"],
        ["export", "{}/torn", "--to", "safetensors"],
        ["check", "{}/nowhere"],
        ["check", "{}/file.txt"],
        ["check", "{}/torn"],
        ["check", "{}/code.pkl"],
        ["check", "{}"],
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file.txt").write_text("no .beton")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "record.json").write_text("{")
    (tmp_path / "code.pkl").write_bytes(pickle.dumps(print))
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    assert str(tmp_path) in err


def test_the_table_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_record(top1=81.25).write(_folder(tmp_path / "runs" / "tiny" / "finetune"))
    assert main(["table", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "81.2" in out and "MR-MAE" in out
    for name in ("table.md", "table.csv", "table.tex", "table.png", "table_cost.png"):
        path = tmp_path / "out" / name
        assert path.stat().st_size > 0 and str(path) in out


def test_the_papers_tables_are_asked_for_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_record(top1=81.25).write(_folder(tmp_path / "runs" / "tiny" / "finetune"))
    assert main(["table", "--paper", "3", "--paper", "5", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("# ") >= 4
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"table{n}{end}" for n in (3, 5) for end in (".md", ".csv", ".tex", ".png", "_cost.png")}
    with pytest.raises(SystemExit):
        main(["table", "--paper", "2", str(tmp_path / "runs")])


def test_the_table_goes_into_the_first_folder_by_default(tmp_path: Path) -> None:
    make_record().write(_folder(tmp_path / "runs" / "a" / "finetune"))
    make_record(seed=1).write(_folder(tmp_path / "more" / "a" / "finetune"))
    assert main(["table", str(tmp_path / "runs"), str(tmp_path / "more")]) == 0
    assert (tmp_path / "runs" / "table.md").is_file()
    assert not (tmp_path / "more" / "table.md").exists()


def test_the_printed_line_loads_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier_run(tmp_path / "run", CVIT)
    out = tmp_path / "out.safetensors"
    for layout in ("timm", "safetensors"):
        assert main(["export", str(tmp_path / "run"), "--to", layout, "--out", str(out)]) == 0
        written, *_, line = capsys.readouterr().out.splitlines()
        assert written == f"written: {out}"
        names: dict[str, Any] = {}
        exec(line.strip(), names)
        assert names["model"].num_classes == 3
        assert main(["check", str(out)]) == 0
        assert "CViT classifier" in capsys.readouterr().out
    out.write_text("notes")
    assert main(["export", str(tmp_path / "run"), "--out", str(out)]) == 2
    assert "--force" in capsys.readouterr().err and out.read_text() == "notes"
    assert main(["export", str(tmp_path / "run"), "--out", str(out), "--force"]) == 0


def test_manifests_are_read_without_deepspeed() -> None:
    code = "import sys, mrmae_ds.training.checkpoint.folder; print('deepspeed' in sys.modules)"
    assert run([sys.executable, "-c", code], LIMIT_S).stdout == "False\n"


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


COMMANDS = ["", "table", "show", "export", "check", "data", "data info", "data verify"]


@pytest.mark.parametrize("command", [text.split() for text in COMMANDS], ids=COMMANDS)
def test_every_command_explains_itself(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "usage: mrmae" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["data"],
        ["tabel"],
        ["data", "verify"],
        ["table"],
        ["show", "a", "--num-images", "x"],
        ["show", "--images", "3"],
        ["export", "a", "--to", "x"],
        ["check"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(arguments)
    assert caught.value.code == 2
    assert "usage: mrmae" in capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    from mrmae_ds import __version__

    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"mrmae_ds {__version__}\n"


def test_the_installed_command(tmp_path: Path) -> None:
    done = run([Path(sys.executable).parent / "mrmae", "data", "info", tmp_path / "x.beton"], LIMIT_S)
    assert done.status == 2
    assert done.stderr.startswith("error: ") and "x.beton" in done.stderr and "Traceback" not in done.stderr


def test_print_config_prints_the_resolved_recipe_and_the_engine_config(tmp_path: Path) -> None:
    overrides = ["seed=7", "stages.pretrain.epochs=9"]
    done = _train("--ds_config", CONFIG, *overrides, "--print-config")
    assert done.status == 0, done.stderr
    recipe_text, _, engine_text = done.stdout.partition("\n# engine config ds_configs/tiny.json\n")
    (tmp_path / "printed.yaml").write_text(recipe_text)
    printed = load_recipe(tmp_path / "printed.yaml")
    expected = load_recipe(REPOSITORY / "ds_configs/tiny.yaml", overrides)
    assert printed == expected and printed.seed == 7
    assert recipe_text.startswith(f"# recipe {expected.hash('pretrain')}\n")
    assert yaml.safe_load(recipe_text)["stages"]["pretrain"]["epochs"] == 9
    assert json.loads(engine_text) == json.loads((REPOSITORY / CONFIG).read_text())


def test_print_config_lets_deepspeed_judge_its_sections(tmp_path: Path) -> None:
    content = json.loads((REPOSITORY / CONFIG).read_text())
    content["zero_optimization"]["overlap_com"] = True
    (tmp_path / "engine.json").write_text(json.dumps(content))
    done = _train("--ds_config", tmp_path / "engine.json", "--recipe", "ds_configs/tiny.yaml", "--print-config")
    assert (done.status, done.stdout) == (2, "")
    assert "zero_optimization.overlap_com" in done.stderr and "did you mean 'overlap_comm'?" in done.stderr


def test_print_config_of_another_recipe_names_what_is_wrong() -> None:
    recipe = "ds_configs/baselines/mae_tiny.yaml"
    done = _train("--ds_config", CONFIG, "--recipe", recipe, "--print-config", "stages.pretrain.epoch=3")
    assert done.status == 2
    error = f"error: {recipe}: stages.pretrain.epoch: unknown key; did you mean 'epochs'?"
    assert done.stderr.splitlines().count(error) == 1
    assert "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "--ds_config"),
        (["--ds_config", CONFIG, "--stage", "fintune"], "--stage"),
        (["--ds_config", CONFIG, "--epochs", "3"], "--epochs"),
    ],
)
def test_a_wrong_command_line_of_train(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from train import parse_arguments

    with pytest.raises(SystemExit) as caught:
        parse_arguments(arguments)
    assert caught.value.code == 2
    assert part in capsys.readouterr().err


def test_overrides_may_stand_anywhere_and_the_launchers_rank_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    from train import parse_arguments

    args = parse_arguments(["--local_rank=1", "--ds_config", CONFIG, "seed=1", "--stage", "finetune", "size=S"])
    assert (args.overrides, args.stage, args.resume, args.run) == (["seed=1", "size=S"], "finetune", "auto", None)
    assert (args.dry_run, args.print_config, args.ds_config) == (False, False, Path(CONFIG))
