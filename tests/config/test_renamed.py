"""Old keys of recipes and pipeline files: refused by one error that names the new key, and renamed in the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mrmae_ds.config.recipe import load_recipe
from mrmae_ds.config.renamed import (
    RENAMED,
    former_hash,
    refuse_renamed,
    rename_in_text,
    rename_keys,
    rename_overrides,
    values_hash,
)
from mrmae_ds.errors import UserError
from mrmae_ds.pipeline.config import load_pipeline

LEGACY = Path(__file__).resolve().parents[1] / "legacy/recipes"
BLOCK = """name: x
record:  # a head
  # why
  log_every: 3  # three
  save_every_epochs: null

  pictures: 0
  hang_minutes: 7
# after
loader: {workers: 2}
stages:
  finetune:
    smoothing: 0.1
"""
RENAMED_BLOCK = """name: x
logging:  # a head
  # why
  every_steps: 3  # three

  num_images: 0
checkpoint:
  every_epochs: null
watchdog:
  timeout_minutes: 7
# after
loader: {num_workers: 2}
stages:
  finetune:
    label_smoothing: 0.1
"""
PIPELINE = """runs:
  - {config: a, set: {record: {pictures: 0, keep_checkpoints: 1}, stages: {finetune: {erasing: 0.1}}}}
sets:
  few:
    record:
      pictures: 1
set: {record: null}"""
RENAMED_PIPELINE = """runs:
  - {config: a, set: {logging: {num_images: 0}, checkpoint: {keep_last: 1}, stages: {finetune: {random_erasing: 0.1}}}}
sets:
  few:
    logging:
      num_images: 1
set: {logging: null, checkpoint: null, watchdog: null}"""


STYLES = {
    "crlf": ("record:\r\n  # why\r\n  log_every: 3\r\n", "logging:\r\n  # why\r\n  every_steps: 3\r\n"),
    "json": (
        '{"record":{"pictures":0},"loader":{"workers":2}}',
        '{"logging": {"num_images": 0},"loader":{"num_workers":2}}',
    ),
    "comments in braces": (
        "record: {log_every: 3, # c\n  pictures: 0, # d\n  hang_minutes: 4}\n",
        "# c\n# d\nlogging: {every_steps: 3, num_images: 0}\nwatchdog: {timeout_minutes: 4}\n",
    ),
    "empty": ("record: {}  # c\n", "logging: {}\ncheckpoint: {}\nwatchdog: {}  # c\n"),
    "null": (
        "record: null\nlogging: {num_images: 3}\n",
        "checkpoint: null\nwatchdog: null\nlogging: {num_images: 3}\n",
    ),
    "anchor": (
        "set: &s {record: {pictures: 0}}\nruns: [{config: a, set: *s}]\n",
        "set: &s {logging: {num_images: 0}}\nruns: [{config: a, set: *s}]\n",
    ),
    "sets": (
        "sets: [a]\nruns: []\nset: {loader: {workers: 1}}\n",
        "sets: [a]\nruns: []\nset: {loader: {num_workers: 1}}\n",
    ),
}


@pytest.mark.parametrize(("old", "new"), [(BLOCK, RENAMED_BLOCK), (PIPELINE, RENAMED_PIPELINE), *STYLES.values()])
def test_text_is_renamed_with_its_comments(old: str, new: str) -> None:
    assert rename_in_text(old) == new
    assert rename_in_text(new) == new
    assert rename_keys(yaml.safe_load(old)) == yaml.safe_load(new)


@pytest.mark.parametrize("ending", ["", "\n", "\n\n"])
@pytest.mark.parametrize(
    "value", ["", " null", " {}", "\n  pictures: 1", " {pictures: 1}", "\n  pictures: 1\n  odd: 2"]
)
def test_a_section_at_the_end_of_the_text(value: str, ending: str) -> None:
    text = f"seed: 1\nrecord:{value}{ending}"
    assert yaml.safe_load(rename_in_text(text)) == rename_keys(yaml.safe_load(text))


def test_text_that_cannot_be_renamed() -> None:
    with pytest.raises(UserError, match="by hand"):
        rename_in_text("a: &x {pictures: 1}\nrecord: *x\n")
    for text in ("checkpoint: {}\nrecord: {keep_checkpoints: 1}\n", "seed: &s 3\nrecord: {log_every: *s}\n"):
        with pytest.raises(UserError, match="by hand"):
            rename_in_text(text)
    with pytest.raises(UserError, match=r"both loader\.workers and loader\.num_workers"):
        rename_in_text("loader: {workers: 1, num_workers: 2}")


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_key_is_refused_with_one_error(old: str, tmp_path: Path) -> None:
    raw: Any = 1
    for part in reversed(old.split(".")):
        raw = {part: raw}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(raw))
    line = f"{old} is now {RENAMED[old]}; "
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert str(caught.value) == f"{path}: {line}`mrmae migrate {path}` rewrites the file"
    path.write_text(yaml.safe_dump({"name": "p", "runs": [{"set": raw}]}))
    with pytest.raises(UserError, match=rf"runs\.0\.set\.{old} is now runs\.0\.set\.{RENAMED[old]}; `mrmae migrate"):
        load_pipeline(path)


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_key_of_an_override_is_renamed_with_a_warning(old: str, caplog: pytest.LogCaptureFixture) -> None:
    given = ["seed=1", f"{old}=a=b", f"{RENAMED[old]}=null", f"{old}er=1", f"{old}"]
    assert rename_overrides(given) == ["seed=1", f"{RENAMED[old]}=a=b", *given[2:]]
    assert caplog.messages == [f"{old} is now {RENAMED[old]}; the old name will be refused"]


def test_the_last_override_counts_under_either_name(caplog: pytest.LogCaptureFixture) -> None:
    both = ["record.save_every_epochs=3", "checkpoint.every_epochs=4"]
    for given, expected in ((both[:1], 3), (both, 4), (both[::-1], 3), ([*both, "record.save_every_epochs=null"], 1)):
        assert load_recipe(LEGACY.parents[1] / "golden/mae.yaml", given).checkpoint.every_epochs == expected
    assert "record.save_every_epochs is now checkpoint.every_epochs" in caplog.text


@pytest.mark.parametrize("given", ["record=null", "record={pictures: 0}", "loader={workers: 1}"])
def test_an_old_key_inside_an_overrides_value_is_refused(given: str) -> None:
    with pytest.raises(UserError, match=r"^override: \w+(\.\w+)? is now \w+.*; write the new key$"):
        load_recipe(LEGACY.parents[1] / "golden/mae.yaml", [given])


def test_an_old_key_of_the_file_that_is_extended_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("loader: {workers: 1}\n")
    (tmp_path / "over.yaml").write_text("extends: below.yaml\n")
    with pytest.raises(UserError, match=rf"^{tmp_path}/below\.yaml: loader\.workers is now loader\.num_workers"):
        load_recipe(tmp_path / "over.yaml")


def test_present_keys_are_not_refused() -> None:
    refuse_renamed(yaml.safe_load(RENAMED_BLOCK), Path("r.yaml"))
    refuse_renamed(yaml.safe_load(RENAMED_PIPELINE), Path("p.yaml"))


def test_the_hash_that_a_recipe_had(tmp_path: Path) -> None:
    """Those of runs that commit d00ec3c made of these recipes."""
    for file in LEGACY.glob("*.yaml"):
        (tmp_path / file.name).write_text(rename_in_text(file.read_text()))
    recipe = load_recipe(tmp_path / "mrmae.yaml")
    assert former_hash(recipe.counted("finetune")) == "10313a478866" != recipe.hash("finetune")
    assert former_hash(recipe.counted("pretrain")) == "eab81b8471df" == recipe.hash("pretrain")
    assert recipe.hash("pretrain") == values_hash(recipe.counted("pretrain"))
