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
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(TIMM_TESTS is None, reason="needs timm's tests (TIMM_TESTS=FOLDER), which its wheel lacks"),
]


@pytest.fixture(scope="module")
def suite(pytestconfig: pytest.Config) -> ModuleType:
    """Import timm's test_models.py, whose markers our configuration does not have."""
    path = Path(TIMM_TESTS or "") / "test_models.py"
    for marker in sorted(set(re.findall(r"pytest\.mark\.(\w+)", path.read_text(encoding="utf-8")))):
        pytestconfig.addinivalue_line("markers", f"{marker}: of timm's tests")
    spec = importlib.util.spec_from_file_location("timm_test_models", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", ["cvit_tiny", "cvit_small", "cvit_base"])
@pytest.mark.parametrize("case", CASES)
def test_timms_test_passes(suite: ModuleType, case: str, model: str) -> None:
    device = {"cfg_device": "cpu"} if case == "test_model_default_cfgs_non_std" else {}
    getattr(suite, case)(model, 1, **device)
