"""timm's own model tests on the registered models, from timm's source distribution, which its wheel lacks.

    pip download --no-deps --no-binary :all: timm==VERSION && tar xf timm-VERSION.tar.gz
    TIMM_TESTS=timm-VERSION/tests pytest tests/test_timm_suite.py

Left out: TorchScript, which torch has deprecated, and the test of default configurations of feature maps, whose
counterpart for tokens runs.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mrmae_ds  # noqa: F401  (registers the models)

TIMM_TESTS = os.environ.get("TIMM_TESTS")
CASES = (
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs_non_std",
    "test_model_forward_features",
    "test_model_forward_intermediates_features",
    "test_model_forward_intermediates",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_prune_intermediate_layers_contract",
)
# Of timm's test_model_input.py: what is exported after a change is rebuilt as it was.
REBUILT: dict[str, tuple[str, tuple[Any, ...]]] = {
    "another size": ("test_default_resize_hub_roundtrip", ({}, 32, 64)),
    "other classes": ("test_export_tracks_reset_classifier_structure", ({}, None, None)),
    "other pooling": ("test_export_tracks_reset_classifier_structure", ({}, "max", None)),
    "no pooling": ("test_export_tracks_reset_classifier_structure", ({}, "", None)),
    "class token kept": ("test_export_tracks_reset_classifier_structure", ({"global_pool": "token"}, "avg", None)),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(TIMM_TESTS is None, reason="needs timm's tests (TIMM_TESTS=FOLDER), which its wheel lacks"),
]


def _load(name: str, pytestconfig: pytest.Config) -> ModuleType:
    """Import a file of timm's tests, whose markers our configuration does not have."""
    path = Path(TIMM_TESTS or "") / name
    for marker in sorted(set(re.findall(r"pytest\.mark\.(\w+)", path.read_text(encoding="utf-8")))):
        pytestconfig.addinivalue_line("markers", f"{marker}: of timm's tests")
    spec = importlib.util.spec_from_file_location(f"timm_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def suite(pytestconfig: pytest.Config) -> ModuleType:
    return _load("test_models.py", pytestconfig)


@pytest.mark.parametrize("model", ["cvit_tiny", "cvit_small", "cvit_base"])
@pytest.mark.parametrize("case", CASES)
def test_timms_test_passes(suite: ModuleType, case: str, model: str) -> None:
    device = {"cfg_device": "cpu"} if case == "test_model_default_cfgs_non_std" else {}
    arguments = () if case == "test_prune_intermediate_layers_contract" else (1,)
    getattr(suite, case)(model, *arguments, **device)


@pytest.mark.parametrize("change", REBUILT)
def test_timms_test_of_exports_passes(change: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    case, (settings, *others) = REBUILT[change]
    getattr(_load("test_model_input.py", pytestconfig), case)(tmp_path, "cvit_tiny", settings, *others)
