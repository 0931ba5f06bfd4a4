from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError, model_validator

from mrmae_ds.config.files import (
    apply_overrides,
    describe_errors,
    merge,
    nearest_key,
    read_extended,
    read_json,
    read_yaml,
)
from mrmae_ds.errors import ConfigError, UserError
from mrmae_ds.schema import Section

HERE = Path("somewhere/recipe.yaml")


class Leaf(Section):
    width: int = Field(1, gt=0)
    label: str = ""

    @model_validator(mode="after")
    def _label_fits(self) -> Leaf:
        if len(self.label) > self.width:
            raise ConfigError("label", f"longer than {self.width}")
        return self


class Tree(Section):
    leaf: Leaf = Leaf()
    maybe: Leaf | None = None
    named: dict[str, Leaf] = Field({})
    listed: tuple[Leaf, ...] = ()


def _problems(raw: dict[str, Any]) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Tree.model_validate(raw)
    return describe_errors(caught.value, Tree, HERE).splitlines()


def test_yaml_and_json_are_read(tmp_path: Path) -> None:
    content = {"a": 1, "b": {"c": [1, 2.5, "x"], "d": None}}
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "a.yaml").write_text("a: 1\nb:\n  c: [1, 2.5, x]\n  d: null\n")
    assert read_json(tmp_path / "a.json") == content
    assert read_yaml(tmp_path / "a.yaml") == content


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    for name in ("huge.yaml", "tiny.yaml", "tinny.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"tinny\.yaml: no such file; did you mean 'tiny\.yaml'\?"):
        read_yaml(tmp_path / "tinny.yaml")
    (tmp_path / "mine.yaml").write_text("extends: min.yaml")
    with pytest.raises(UserError, match=r"nope\.json: no such file; there are tinny\.json$"):
        read_json(tmp_path / "nope.json")
    with pytest.raises(UserError) as caught:
        read_extended(tmp_path / "mine.yaml", Tree)
    missing = f"{tmp_path / 'mine.yaml'}: extends: {tmp_path / 'min.yaml'}: no such file"
    assert str(caught.value) == f"{missing}; there are huge.yaml, tiny.yaml"
    with pytest.raises(UserError, match=r"nowhere/x\.yaml: no such file$"):
        read_yaml(tmp_path / "nowhere/x.yaml")


@pytest.mark.parametrize("name", ["table1.yml", "table1.json", "table1"])
def test_a_wrong_suffix_names_the_file_that_has_the_right_one(name: str, tmp_path: Path) -> None:
    for other in ("table1.yaml", "table1.zip"):
        (tmp_path / other).write_text("{}")
    with pytest.raises(UserError, match=rf"{name}: no such file; did you mean 'table1\.yaml'\?$"):
        read_yaml(tmp_path / name)
    (tmp_path / "mine.yaml").write_text(f"extends: {name}")
    with pytest.raises(UserError, match=rf"{name}: no such file; did you mean 'table1\.yaml'\?$"):
        read_extended(tmp_path / "mine.yaml", Tree)


BROKEN = {
    "syntax": b"a: [1, 2\nb: 3\n",
    "a tab": b"a:\n\tb: 1\n",
    "an object of Python's": b"a: !!python/object:os.system x\n",
    "a list": b"- 1\n- 2\n",
    "a number": b"3\n",
    "nothing": b"",
    "no text": bytes(range(256)),
    "a zero byte": b"a: 1\x00\n",
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("read", [read_yaml, read_json])
def test_names_a_file_that_is_not_a_mapping(case: str, read: Any, tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(BROKEN[case])
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value) and "<unicode string>" not in str(caught.value)


def test_reports_the_position_of_a_syntax_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1\nb: ]\n")
    (tmp_path / "a.json").write_text('{"a": 1,\n"b": }')
    with pytest.raises(UserError, match=r"line 2"):
        read_yaml(tmp_path / "a.yaml")
    with pytest.raises(UserError, match=r"line 2"):
        read_json(tmp_path / "a.json")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: it is a folder"):
        read_yaml(tmp_path)


def test_an_impossible_date_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: 2001-99-99\n")
    with pytest.raises(UserError):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize(("read", "text"), [(read_yaml, "a: 1\na: 2\n"), (read_json, '{"a": 1, "a": 2}')])
def test_refuses_a_duplicate_key(read: Any, text: str, tmp_path: Path) -> None:
    path = tmp_path / "twice"
    path.write_text(text)
    with pytest.raises(UserError, match="a"):
        read(path)


def test_merges_one_mapping_into_another() -> None:
    base = {"a": {"b": 1, "c": {"d": 2, "e": 3}}, "list": [1, 2], "gone": {"x": 1}, "scalar": 1}
    over = {"a": {"c": {"d": 5, "e": None}, "new": 6}, "list": [9], "gone": None, "scalar": {"now": 1}, "never": None}
    before = copy.deepcopy((base, over))
    assert merge(base, over) == {"a": {"b": 1, "c": {"d": 5}, "new": 6}, "list": [9], "scalar": {"now": 1}}
    assert (base, over) == before


@pytest.mark.parametrize("empty", [0, 0.0, False, "", [], {}])
def test_merge_replaces_values_with_empty_ones(empty: Any) -> None:
    assert merge({"a": 5}, {"a": empty}) == {"a": empty}


def test_merge_removes_inside_a_section_that_only_the_upper_one_has() -> None:
    assert merge({}, {"a": {"b": None, "c": 1}}) == {"a": {"c": 1}}


def test_overrides_are_yaml_assignments_in_order() -> None:
    raw = {"a": {"b": 1, "gone": 2}, "seed": 0}
    overrides = ["seed=7", "a.b=[1, 2.5]", "a.gone=null", "new.deep.key=x=y", "seed=8", "a.on=true"]
    expected = {"a": {"b": [1, 2.5], "on": True}, "seed": 8, "new": {"deep": {"key": "x=y"}}}
    assert apply_overrides(raw, overrides, HERE) == expected
    assert raw == {"a": {"b": 1, "gone": 2}, "seed": 0}


def test_an_override_may_open_a_section_that_is_null() -> None:
    assert apply_overrides({"a": None}, ["a.b.c=1"], HERE) == {"a": {"b": {"c": 1}}}


@pytest.mark.parametrize("text", ["seed", "=3", "a..b=1", ".a=1", "a.=1", ""])
def test_refuses_a_string_that_is_not_an_assignment(text: str) -> None:
    with pytest.raises(UserError, match=r"is not an override; write key\.path=value") as caught:
        apply_overrides({}, [text], HERE)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("raw", [{"a": {"b": 3}}, {"a": {"b": "text"}}, {"a": {"b": [{"c": 1}]}}, {"a": {"b": 0}}])
def test_override_below_a_scalar_is_an_error(raw: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"'a\.b\.c\.d=1'.* b of somewhere/recipe\.yaml is a value"):
        apply_overrides(raw, ["a.b.c.d=1"], HERE)


def test_an_override_whose_value_is_no_yaml() -> None:
    with pytest.raises(UserError, match=r"'seed=\[1': the value is not YAML"):
        apply_overrides({}, ["seed=[1"], HERE)


def test_an_impossible_date_in_an_override() -> None:
    with pytest.raises(UserError):
        apply_overrides({}, ["name=2001-99-99"], HERE)


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ({"leav": {}}, "leav: unknown key; did you mean 'leaf'?"),
        ({"leaf": {"widht": 2}}, "leaf.widht: unknown key; did you mean 'width'?"),
        ({"maybe": {"widht": 2}}, "maybe.widht: unknown key; did you mean 'width'?"),
        ({"named": {"any": {"widht": 2}}}, "named.any.widht: unknown key; did you mean 'width'?"),
        ({"listed": [{}, {"widht": 2}]}, "listed.1.widht: unknown key; did you mean 'width'?"),
        ({"leaf": {"zzz": 2}}, "leaf.zzz: unknown key; known are label, width"),
    ],
)
def test_an_unknown_key_names_its_path_and_the_nearest(raw: dict[str, Any], line: str) -> None:
    assert _problems(raw) == [f"{HERE}: {line}"]


@pytest.mark.parametrize("name", ["width", "label"])
def test_an_entry_of_a_mapping_that_is_named_like_a_field(name: str) -> None:
    assert _problems({"named": {name: {"widht": 2}}}) == [
        f"{HERE}: named.{name}.widht: unknown key; did you mean 'width'?"
    ]


def test_every_problem_has_a_line_with_what_was_given() -> None:
    lines = _problems({"leaf": {"width": 0, "label": 3}, "named": {"a": {"width": "x"}}, "extra": 1})
    assert len(lines) == 4
    assert all(line.startswith(f"{HERE}: ") for line in lines)
    assert "leaf.width" in lines[0] and lines[0].endswith("(got 0)")
    assert "leaf.label" in lines[1] and lines[1].endswith("(got 3)")
    assert "named.a.width" in lines[2] and lines[2].endswith("(got 'x')")


def test_null_is_shown_as_the_file_has_it() -> None:
    (line,) = _problems({"leaf": {"width": None}})
    assert line.endswith("(got null)")


def test_a_section_names_a_key_below_it() -> None:
    assert _problems({"leaf": {"label": "ab"}}) == [f"{HERE}: leaf.label: longer than 1"]
    assert _problems({"named": {"a": {"label": "ab"}}}) == [f"{HERE}: named.a.label: longer than 1"]
    with pytest.raises(ValidationError) as caught:
        Leaf.model_validate({"label": "ab"})
    assert describe_errors(caught.value, Leaf, HERE) == f"{HERE}: label: longer than 1"


def test_the_nearest_key_or_all_of_them() -> None:
    assert nearest_key("optimzer", ["optimizer", "scheduler"]) == "; did you mean 'optimizer'?"
    assert nearest_key("q", ["b", "a"]) == "; known are a, b"
    assert nearest_key("q", []) == ""
