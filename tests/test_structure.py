"""Structure and language of the code base: layers, import cycles, unique names, docstrings and vocabulary."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY

# Layer of every package and top-level module. A module imports from lower layers, or from its own layer without cycles
# between the layer's packages.
LAYERS = {
    **dict.fromkeys(("errors", "files", "schema", "units", "imagenet", "timm_hook"), 1),
    **dict.fromkeys(("models", "records", "distributed"), 2),
    **dict.fromkeys(("config", "weights"), 3),
    **dict.fromkeys(("data", "teachers", "timm_registry"), 4),
    "factory": 5,
    **dict.fromkeys(("figures", "api"), 6),
    **dict.fromkeys(("tables", "profiling"), 7),
    **dict.fromkeys(("detection", "report"), 8),
    "training": 9,
    **dict.fromkeys(("pipeline", "planning"), 10),
    "doctor": 11,
    "cli": 12,
    "__main__": 13,
}
INTERROGATIVE = re.compile(r"(What|How|Who|Whom|Whose|Which|Where|Whether|Why|When)\b")
# Words of an earlier, private vocabulary, and the field's terms that replaced them.
VOCABULARY = {
    r"pictures?": "image",
    r"told|tells": "report, print, pass",
    r"(go|goes|going|went) on": "resume, continue",
    r"mend(s|ed|ing)?": "fix, correct",
    r"census": "parameter counts",
    r"so many": "N, this many",
    r"device-hours?": "GPU-hours",
    r"slips": "errata",
    r"anew": "again, over",
    r"for ever": "forever",
    r"standstill": "pause, wait",
}
# The words in a sense of their own: quotations and names.
EXCEPTIONS = (
    "CHANGELOG.md",
    "tests/test_structure.py",
    "tests/legacy",
    "mrmae_ds/config/renamed.py",
    "mrmae_ds/training/migrate.py",
    "tests/config/test_renamed.py",
    "tests/training/test_migrate.py",
)


def module_files(root: Path) -> dict[str, Path]:
    """Map the dotted names of all modules of the package below ``root`` to their files."""
    names = {}
    for path in sorted((root / "mrmae_ds").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def import_graph(root: Path) -> dict[str, set[str]]:
    """Return the modules of the package that each module imports, in functions and under TYPE_CHECKING too."""
    files = module_files(root)
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                both = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
                imported |= {full if full in files else node.module for full in both.values()}
        graph[name] = {other for other in imported if other in files} - {name}
    return graph


def package_of(module: str) -> str:
    """Return the first part of a module's name below ``mrmae_ds``; the empty string for the root."""
    return module.partition(".")[2].partition(".")[0]


def upward_imports(root: Path) -> list[str]:
    """List imports of a module of a higher layer, or of no layer."""
    graph = import_graph(root)
    missing = {package_of(module) for module in graph} - {""} - LAYERS.keys()
    wrong = [f"{name}: no layer in tests/test_structure.py" for name in sorted(missing)]
    for module, imported in graph.items():
        layer = LAYERS.get(package_of(module))
        for other in sorted(imported):
            above = LAYERS.get(package_of(other))
            if layer is not None and above is not None and above > layer:
                wrong.append(f"{module} (layer {layer}) imports {other} (layer {above})")
    return wrong


def import_cycles(root: Path) -> list[str]:
    """Return the first import cycle between modules, or else between packages; an empty list without one."""
    modules = import_graph(root)
    packages: dict[str, set[str]] = defaultdict(set)
    for module, imported in modules.items():
        packages[package_of(module)] |= {package_of(other) for other in imported} - {package_of(module), ""}
    packages.pop("", None)
    for graph in (modules, packages):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            return list(error.args[1])
    return []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, to break."""
    shutil.copytree(REPOSITORY / "mrmae_ds", tmp_path / "mrmae_ds", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_imports_go_down() -> None:
    assert upward_imports(REPOSITORY) == []


def test_an_upward_import_is_found(copy: Path) -> None:
    with (copy / "mrmae_ds/models/layers.py").open("a") as file:
        file.write("\n\ndef late() -> None:\n    from mrmae_ds.training import loop\n")
    assert upward_imports(copy) == ["mrmae_ds.models.layers (layer 2) imports mrmae_ds.training.loop (layer 9)"]


def test_imports_have_no_cycle() -> None:
    assert import_cycles(REPOSITORY) == []


def test_a_cycle_is_found(copy: Path) -> None:
    with (copy / "mrmae_ds/models/pos_embed.py").open("a") as file:
        file.write("\n\ndef late() -> None:\n    from mrmae_ds.models import cvit\n")
    assert {"mrmae_ds.models.pos_embed", "mrmae_ds.models.cvit"} <= set(import_cycles(copy))


def test_public_names_are_unique() -> None:
    """Two public classes of one name in the package make every search ambiguous."""
    homes: dict[str, list[str]] = defaultdict(list)
    for module, path in module_files(REPOSITORY).items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


def _python_files() -> list[Path]:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [REPOSITORY / name for name in tracked.stdout.split()]


def test_docstrings_start_with_a_verb_or_a_noun() -> None:
    """A docstring's first line is an imperative or a noun phrase, not an indirect question."""
    wrong = []
    for path in _python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and INTERROGATIVE.match(text):
                    wrong.append(f"{path.relative_to(REPOSITORY)}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}")
    assert wrong == []


def test_names_that_benchmarks_import_exist() -> None:
    """Neither mypy nor a test reads all of the benchmarks and examples."""
    wrong = []
    for path in _python_files():
        if path.relative_to(REPOSITORY).parts[0] not in ("benchmarks", "examples"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(("mrmae_ds.", "tests.")):
                file = REPOSITORY / node.module.replace(".", "/")
                modules = {module.stem for module in file.glob("*.py")}
                source = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
                missing = {alias.name for alias in node.names} - modules - _bound_names(source)
                wrong += [f"{path.relative_to(REPOSITORY)}: {node.module}.{name}" for name in sorted(missing)]
    assert wrong == []


def _bound_names(path: Path) -> set[str]:
    """Return all names that a module binds, in functions too; none if there is no such file."""
    if not path.is_file():
        return set()
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return names | {alias.asname or alias.name for node in imports for alias in node.names}


@pytest.mark.parametrize("word", VOCABULARY)
def test_the_vocabulary_is_the_fields(word: str) -> None:
    excluded = [f":!{path}*" for path in EXCEPTIONS]
    command = [
        "git",
        "grep",
        "-nIiwE",
        word,
        "--",
        "*.py",
        "*.md",
        "*.yaml",
        "*.sh",
        "*.sbatch",
        "*.toml",
        "Makefile",
        *excluded,
    ]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert found.stdout == "", f"write {VOCABULARY[word]}"


def test_tests_that_pages_cite_exist() -> None:
    """Every `FILE::test_name` of a page is a test of that file; `::test_name` alone is one of the file before it."""
    missing, cited = [], 0
    for page in sorted((REPOSITORY / "docs").glob("*.md")):
        path = REPOSITORY
        for file, name in re.findall(r"`(tests/[\w/.]+)?::(test_\w+)`", page.read_text()):
            path, cited = REPOSITORY / file if file else path, cited + 1
            if not path.is_file() or f"def {name}(" not in path.read_text():
                missing.append(f"{page.name}: {path.relative_to(REPOSITORY)}::{name}")
    assert missing == [] and cited


def test_commands_of_the_pages_select_tests() -> None:
    """Every word of `pytest FILE -k "A or B"` in the documentation occurs in a test of that file."""
    wrong = []
    for page in sorted((REPOSITORY / "docs").glob("*.md")):
        for file, quoted, word in re.findall(r'pytest (tests/[\w/.]+)(?: -k (?:"([^"]+)"|(\w+)))?', page.read_text()):
            path = REPOSITORY / file
            text = path.read_text() if path.exists() else ""
            names = " ".join(re.findall(r"^def (test_\w+)", text, re.M))
            wrong += [f"{page.name}: {file} -k {part}" for part in (quoted or word).split(" or ") if part not in names]
            wrong += [] if path.exists() else [f"{page.name}: {file} does not exist"]
    assert wrong == []
