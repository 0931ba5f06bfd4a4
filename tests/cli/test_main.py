from __future__ import annotations

import argparse
import errno
import json
import pickle
import re
import shlex
import sys
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

from mrmae_ds.cli.main import COMMANDS, build_parser, main
from mrmae_ds.cli.parser import requested_device, run_command
from mrmae_ds.cli.train import STAGES, parse_arguments
from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.config.stages import StageName
from mrmae_ds.errors import UserError
from mrmae_ds.figures.select_images import select_images
from mrmae_ds.pipeline.config import load_pipeline
from tests.support.processes import REPOSITORY, Finished, environment, run
from tests.support.records import make_record
from tests.support.sample_data import photograph
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
        ["migrate", "{}/file.txt"],
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


@pytest.mark.parametrize("command", ["detect {0} {0} --out {1}", "features {0} {0}", "replay {0}"])
def test_a_device_that_is_not_there_is_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded: the weights are none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    (tmp_path / "image.png").write_bytes(b"")
    words = command.format(tmp_path / "image.png", tmp_path / "out").split()
    for name, message in (
        ("foo", "--device foo: expected cpu, cuda or cuda:N"),
        ("meta", "--device meta: expected cpu, cuda or cuda:N"),
        ("cuda:9", f"--device cuda:9: torch {torch.__version__} finds 2 GPUs here; use cuda:0 to cuda:1"),
    ):
        assert main([*words, "--device", name]) == 2
        assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(("gpus", "default"), [(0, "cpu"), (2, "cuda")])
def test_devices(gpus: int, default: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert requested_device(None) == torch.device(default) and requested_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "cuda:1"):
        if gpus:
            assert requested_device(name) == torch.device(name)
        else:
            with pytest.raises(UserError, match="finds 0 GPUs here; use --device cpu"):
                requested_device(name)
    for wrong in ("", "CPU", "cuda:", "cuda:-1", "cuda:1\n", "cuda:\u0661"):
        with pytest.raises(UserError, match="expected cpu, cuda or cuda:N"):
            requested_device(wrong)


def test_table_without_runs_has_blank_cells_and_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err == f"{tmp_path}: no run (record.json) at any depth, our cells are blank\n"
    assert "written: " in out and (tmp_path / "table.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "ds_configs/tiny.yaml"], "ds_configs/tiny.yaml: not a readable weights file"),
        (["show", "README.md"], "README.md: not a readable weights file"),
        (["data", "info", "README.md"], "README.md: not a data set; name a .beton file"),
    ],
)
def test_another_kind_of_file_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_missing_paths_are_reported_before_torch_is_imported() -> None:
    code = """
import sys
from mrmae_ds.cli.main import main
print([main([command, "nowhere"]) for command in ("check", "show", "export")], "torch" in sys.modules)
"""
    finished = run([sys.executable, "-c", code], LIMIT_S)
    assert finished.stdout == "[2, 2, 2] False\n"
    assert finished.stderr == "error: nowhere: no such file or folder\n" * 3


def test_training_starts_without_the_trackers_that_libraries_import() -> None:
    code = f"""
import sys
from mrmae_ds.cli.train import main
status = main(["--ds_config", "{CONFIG}", "--stage", "pretrain", "--print-config"])
print(status, *(name in sys.modules for name in ("timm", "deepspeed", "mlflow", "wandb")), file=sys.stderr)
"""
    done = run([sys.executable, "-c", code], LIMIT_S)
    assert done.status == 0 and "0 True True False False" in done.stderr.splitlines(), done.stderr


def test_a_training_that_ends_leaves_no_temporary_folder(tmp_path: Path) -> None:
    """Of the server that its workers are forked from."""
    code = """
import sys
from mrmae_ds.cli.train import end_process
from mrmae_ds.data.loaders.worker import fork_server
fork_server("json")
end_process(3)
"""
    temporary = environment() | {"TMPDIR": str(tmp_path)}
    assert run([sys.executable, "-c", code], LIMIT_S, temporary).status == 3
    assert list(tmp_path.glob("pymp-*")) == []
    without = "import multiprocessing.util, tempfile; from mrmae_ds.cli.train import end_process"
    without += "; tempfile.tempdir = '/nowhere'; end_process(75)"
    assert run([sys.executable, "-c", without], LIMIT_S).status == 75


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_ends_quietly_without_a_reader(unbuffered: str) -> None:
    command = f"PYTHONUNBUFFERED={unbuffered} {sys.executable} -m mrmae_ds --print-completion bash"
    script = f"{command} | true; echo ${{PIPESTATUS[0]}}"
    finished = run(["bash", "-c", script], LIMIT_S)
    assert (finished.stdout, finished.stderr) == ("141\n", "")


def test_torchrun_leaves_every_option_to_train_py(capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever a command is shown: without ``--``, torchrun takes --run for an abbreviation of options of its own."""
    from torch.distributed.run import get_args_parser

    with pytest.raises(SystemExit):
        build_parser().parse_args(["train", "--help"])
    pages = (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md")))
    texts = [" ".join(capsys.readouterr().out.split()), *(page.read_text() for page in pages)]
    commands = [found for text in texts for found in re.findall(r"torchrun ([-.][^`]*?(?:train\.py|mrmae_ds))", text)]
    assert len(commands) == 7
    for command in commands:
        words = [word for word in shlex.split(command) if word != "..."]
        parsed = get_args_parser().parse_args([*words, "--run", "folder"])
        assert parsed.training_script == words[-1] and parsed.training_script_args == ["--run", "folder"], command


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.EROFS, "Read-only file system", "out/x"), 2, "error: out/x: Read-only file system\n"),
    ],
)
def test_interrupts_and_refused_files_are_one_line(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: argparse.Namespace) -> None:
        raise error

    assert run_command(fail, argparse.Namespace()) == status
    assert capsys.readouterr().err == message


def test_prints_and_writes_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_record(top1=81.25).write(_folder(tmp_path / "runs" / "tiny" / "finetune"))
    assert main(["table", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "81.2" in out and "MR-MAE" in out
    for name in ("table.md", "table.csv", "table.tex", "table.png", "table_cost.png"):
        path = tmp_path / "out" / name
        assert path.stat().st_size > 0 and str(path) in out


def test_selects_tables_of_paper_by_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_record(top1=81.25).write(_folder(tmp_path / "runs" / "tiny" / "finetune"))
    assert main(["table", "--paper", "3", "--paper", "5", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("# ") >= 4
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"table{n}{end}" for n in (3, 5) for end in (".md", ".csv", ".tex", ".png", "_cost.png")}
    with pytest.raises(SystemExit):
        main(["table", "--paper", "7", str(tmp_path / "runs")])


def test_writes_table_to_first_folder_by_default(tmp_path: Path) -> None:
    make_record().write(_folder(tmp_path / "runs" / "a" / "finetune"))
    make_record(seed=1).write(_folder(tmp_path / "more" / "a" / "finetune"))
    assert main(["table", str(tmp_path / "runs"), str(tmp_path / "more")]) == 0
    assert (tmp_path / "runs" / "table.md").is_file()
    assert not (tmp_path / "more" / "table.md").exists()


def test_printed_line_loads_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_reads_manifests_without_deepspeed() -> None:
    code = "import sys, mrmae_ds.training.checkpoint.folder; print('deepspeed' in sys.modules)"
    assert run([sys.executable, "-c", code], LIMIT_S).stdout == "False\n"


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


HELP = ["", *COMMANDS, "data info", "data imagenet", "data verify", "data write"]


@pytest.mark.parametrize("command", [text.split() for text in HELP], ids=HELP)
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert "usage: mrmae" in capsys.readouterr().out


HEAVY = ("torch", "timm", "deepspeed", "matplotlib", "huggingface_hub", "pyarrow", "onnxruntime", "wandb", "mlflow")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_that_takes_long(command: str) -> None:
    code = f"""
import sys
from mrmae_ds.cli.main import main
try:
    main({[*command.split(), "--help"]})
except SystemExit:
    print([name for name in {HEAVY} if name in sys.modules])
"""
    assert run([sys.executable, "-c", code], LIMIT_S).stdout.endswith("\n[]\n")


def test_package_runs_as_module() -> None:
    finished = run([sys.executable, "-m", "mrmae_ds", "check", "nowhere"], LIMIT_S)
    assert (finished.status, finished.stdout) == (2, "")
    assert finished.stderr == "error: nowhere: no such file or folder\n"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_prints_completion_script(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--print-completion", shell])
    assert caught.value.code == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS) and "--num-images" in script
    if shell == "bash":
        (tmp_path / "mrmae.bash").write_text(script)
        assert run(["bash", "-n", tmp_path / "mrmae.bash"], LIMIT_S).status == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("tr", ["train"]),
        ("train --ds", ["--ds_config"]),
        ("train --stage p", ["pretrain", "probe"]),
        ("data wr", ["write"]),
        ("plan --ds_config ds_configs/tiny-z", ["ds_configs/tiny-zero1.json"]),
        ("submit pipelines/toy", [f"pipelines/toy{end}" for end in ("1.yaml", "3.yaml", "6.yaml", ".json")]),
    ],
)
def test_bash_completes_commands_options_and_files(
    words: str, expected: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    completing = """
COMP_WORDS=(mrmae $WORDS)
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
$(complete -p mrmae | sed 's/.*-F \\([^ ]*\\).*/\\1/') mrmae "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
    (tmp_path / "complete.bash").write_text(capsys.readouterr().out + f"WORDS='{words}'" + completing)
    assert sorted(run(["bash", tmp_path / "complete.bash"], LIMIT_S).stdout.split()) == sorted(expected)


RECIPE_COMMANDS = {
    "train": [["--ds_config", "x.json"], ["--stage", "finetune"]],
    "plan": [["--ds_config", "x.json"], ["--gpus", "8"]],
    "cost": [["--ds_config", "x.json"], ["--gpus", "8"]],
    "submit": [["pipeline.yaml"], ["--only", "a"], ["--seeds", "0,1"]],
    "teachers": [["recipe.yaml"], ["--images", "a.jpg", "b.jpg"], ["--seed", "1"]],
}


@pytest.mark.parametrize("command", RECIPE_COMMANDS)
def test_overrides_may_be_anywhere(command: str) -> None:
    parts = RECIPE_COMMANDS[command]
    expected = vars(build_parser().parse_args([command, *chain(*parts)]))
    assert expected.pop("overrides") == []
    for place in range(len(parts) + 1):
        line = [*parts[:place], ["seed=1", "model.overrides.dims=[8, 16]"], *parts[place:], ["data.train=/x/y=z.beton"]]
        args = vars(build_parser().parse_args([command, *chain(*line)]))
        assert args.pop("overrides") == ["seed=1", "model.overrides.dims=[8, 16]", "data.train=/x/y=z.beton"]
        assert args == expected


def test_values_and_files_with_equals_sign_are_no_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("seed=1").touch()
    args = build_parser().parse_args(["teachers", "r.yaml", "--out", "a=b", "--images", "seed=1", "seed=2", "c.jpg"])
    assert (args.out, args.images, args.overrides) == (Path("a=b"), ["seed=1", "c.jpg"], ["seed=2"])


TILDE_EXAMPLES = (
    ["train", "--ds_config=~/c.json", "--recipe=~/r.yaml", "--run=~/x", "--resume=~/x"],
    ["data", "write", "~/src", "--out=~/x"],
    ["table", "~/runs", "--out=~/x"],
    ["export", "~/run", "--out=~/x"],
    ["show", "~/run", "--out=~/x"],
    ["submit", "~/p.yaml", "--runs=~/x"],
)


@pytest.mark.parametrize("words", TILDE_EXAMPLES, ids=lambda words: words[0])
def test_a_leading_tilde_is_the_home_folder_in_every_path(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves it alone after an equals sign, and argparse would make a folder named ~."""
    monkeypatch.setenv("HOME", "/home/me")
    values = [str(value) for value in vars(build_parser().parse_args(words)).values() if not callable(value)]
    assert not any("~" in value for value in values)
    assert sum("/home/me/" in value for value in values) == sum("~" in word for word in words)


def test_a_leading_tilde_is_the_home_folder_in_recipes_and_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_bytes(Path("ds_configs/tiny.yaml").read_bytes())
    (tmp_path / "r.yaml").write_text("extends: ~/base.yaml\ndata: {val: ~/val.beton}\nloader: {cache_dir: ~/cache}\n")
    overrides = [
        "data.train=~/train.beton", "teachers.mae.source=~/teacher", "stages.finetune.init=~/w.pth#model",
        "stages.evaluate.members=[~/a, ~/b]",
    ]  # fmt: skip
    recipe = load_recipe(tmp_path / "r.yaml", overrides)
    assert (recipe.data.train, recipe.data.val) == (tmp_path / "train.beton", tmp_path / "val.beton")
    assert recipe.loader.cache_dir == tmp_path / "cache"
    assert recipe.teachers["mae"].source == f"{tmp_path}/teacher"
    assert recipe.stages.finetune and recipe.stages.finetune.init == f"{tmp_path}/w.pth#model"
    assert recipe.stages.evaluate.members == (f"{tmp_path}/a", f"{tmp_path}/b")
    assert "~" not in recipe.to_yaml()
    with pytest.raises(UserError, match=r"data\.train: ~nobody-here/x: no such user has a home directory"):
        load_recipe(tmp_path / "r.yaml", ["data.train=~nobody-here/x"])
    (tmp_path / "p.yaml").write_text("name: p\nconfig: ~/c.json\nruns: [{recipe: ~/r.yaml}]\n")
    pipeline = load_pipeline(tmp_path / "p.yaml")
    assert (pipeline.config, pipeline.runs[0].recipe) == (tmp_path / "c.json", tmp_path / "r.yaml")


def test_a_leading_tilde_is_the_home_folder_in_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    photograph().save(tmp_path / "a.png")
    assert select_images(None, ["~/a.png"], None, 1).captions == ("a.png",)


@pytest.mark.parametrize("words", TILDE_EXAMPLES, ids=lambda words: words[0])
def test_an_empty_path_is_an_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """An unset variable's; it would be the working folder."""
    for word in (word for word in words if "~" in word):
        emptied = [f"{word.partition('~')[0]}" if other == word else other for other in words]
        with pytest.raises(SystemExit) as caught:
            build_parser().parse_args(emptied)
        assert caught.value.code == 2 and "is empty; name a file or folder" in capsys.readouterr().err


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
        ["check"],
    ],
    ids=" ".join,
)
def test_wrong_command_line_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(arguments)
    assert caught.value.code == 2
    assert "usage: mrmae" in capsys.readouterr().err


def test_prints_version(capsys: pytest.CaptureFixture[str]) -> None:
    from mrmae_ds import __version__

    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"mrmae_ds {__version__}\n"


def test_installed_command_reports_an_error_without_a_traceback(tmp_path: Path) -> None:
    done = run([Path(sys.executable).parent / "mrmae", "data", "info", tmp_path / "x.beton"], LIMIT_S)
    assert done.status == 2
    assert done.stderr.startswith("error: ") and "x.beton" in done.stderr and "Traceback" not in done.stderr


def test_print_config_prints_the_resolved_recipe_and_the_engine_config(tmp_path: Path) -> None:
    overrides = ["seed=7", "stages.pretrain.epochs=9"]
    done = _train("--ds_config", CONFIG, *overrides, "--print-config")
    assert done.status == 0, done.stderr
    recipe_text, _, engine_text = done.stdout.partition("\n# engine config ds_configs/tiny.json\n")
    engine_text, _, defaults_text = engine_text.partition("\n# defaults of the engine config's other keys\n")
    (tmp_path / "printed.yaml").write_text(recipe_text)
    printed = load_recipe(tmp_path / "printed.yaml")
    expected = load_recipe(REPOSITORY / "ds_configs/tiny.yaml", overrides)
    assert printed == expected and printed.seed == 7
    assert recipe_text.startswith(f"# recipe {expected.hash('pretrain')}\n")
    assert yaml.safe_load(recipe_text)["stages"]["pretrain"]["epochs"] == 9
    assert json.loads(engine_text) == json.loads((REPOSITORY / CONFIG).read_text())
    defaults = json.loads(defaults_text)
    assert (defaults["attention_backend"], defaults["deterministic"]) == ("flash", False)


def test_print_config_validates_deepspeed_sections(tmp_path: Path) -> None:
    content = json.loads((REPOSITORY / CONFIG).read_text())
    content["zero_optimization"]["overlap_com"] = True
    (tmp_path / "engine.json").write_text(json.dumps(content))
    done = _train("--ds_config", tmp_path / "engine.json", "--recipe", "ds_configs/tiny.yaml", "--print-config")
    assert (done.status, done.stdout) == (2, "")
    assert "zero_optimization.overlap_com" in done.stderr and "did you mean 'overlap_comm'?" in done.stderr


def test_print_config_of_other_recipe_names_wrong_key() -> None:
    recipe = "ds_configs/baselines/mae_tiny.yaml"
    done = _train("--ds_config", CONFIG, "--recipe", recipe, "--print-config", "stages.pretrain.epoch=3")
    assert done.status == 2
    override = f"override 'stages.pretrain.epoch=3' of {recipe}"
    error = f"error: {override}: stages.pretrain.epoch: unknown key; did you mean 'epochs'?"
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
def test_wrong_command_line_of_train(arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(arguments)
    assert caught.value.code == 2
    assert part in capsys.readouterr().err


def test_train_accepts_local_rank_of_launcher() -> None:
    args = parse_arguments(["--local_rank=1", "--ds_config", CONFIG, "seed=1", "--stage", "finetune", "size=S"])
    assert (args.overrides, args.stage, args.resume, args.run) == (["seed=1", "size=S"], "finetune", "auto", None)
    assert (args.dry_run, args.print_config, args.ds_config) == (False, False, Path(CONFIG))


def test_train_has_all_stages() -> None:
    assert get_args(StageName) == STAGES


def test_mrmae_train_is_train_py_in_any_directory(tmp_path: Path) -> None:
    config = REPOSITORY / CONFIG
    arguments = ["seed=7", "--ds_config", config, "--stage", "finetune", "--print-config", "size=Small"]
    script = run([sys.executable, REPOSITORY / "train.py", *arguments], LIMIT_S, cwd=tmp_path)
    command = run(["mrmae", "train", *arguments], LIMIT_S, cwd=tmp_path)
    assert (command.status, command.stderr) == (0, "")
    assert command == script and "\nseed: 7\n" in command.stdout and "\nsize: Small\n" in command.stdout


def test_mrmae_train_exits_with_status_of_train(tmp_path: Path) -> None:
    finished = run(["mrmae", "train", "--ds_config", "nowhere.json"], LIMIT_S, cwd=tmp_path)
    assert (finished.status, finished.stdout) == (2, "")
    assert finished.stderr.startswith("error: ") and "nowhere.json" in finished.stderr


SCRIPTS = ["train.py", "slurm/restarts.py", *(f"data/{path.name}" for path in (REPOSITORY / "data").glob("*.py"))]


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_scripts_run_in_any_directory(script: str, tmp_path: Path) -> None:
    finished = run([sys.executable, REPOSITORY / script, "--help"], LIMIT_S, cwd=tmp_path)
    assert finished.status == 0 and "usage: " in finished.stdout, finished.stderr
