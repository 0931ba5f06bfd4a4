"""GELU of CLIP weights: determined from the file, never guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mrmae_ds.errors import UserError
from mrmae_ds.teachers.sources.gelu import Gelu, gelu_of_file
from mrmae_ds.weights.formats import read_tensor_file

SCALARS = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}


class Quick(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Both(nn.Module):
    """An image tower of one activation, a text tower of another."""

    def __init__(self, visual: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.visual, self.text = nn.Sequential(nn.Linear(2, 2), visual), text

    def forward(self, x: Tensor) -> Tensor:
        return self.text(self.visual(x))


def archive(path: Path, visual: nn.Module, text: nn.Module, how: str) -> Path:
    module = Both(visual, text).eval()
    script = torch.jit.trace(module, torch.rand(1, 2)) if how == "trace" else torch.jit.script(module)
    script.save(str(path))
    return path


def gelu_of(path: Path) -> Gelu | None:
    return gelu_of_file(read_tensor_file(path))


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("how", ["trace", "script"])
def test_code_of_an_archives_image_tower_determines_the_gelu(how: str, tmp_path: Path) -> None:
    assert gelu_of(archive(tmp_path / "a.pt", Quick(), nn.GELU(), how)) == Gelu(True, "the archive's code")
    assert gelu_of(archive(tmp_path / "b.pt", nn.GELU(), Quick(), how)) == Gelu(False, "the archive's code")
    assert gelu_of(archive(tmp_path / "c.pt", nn.ReLU(), Quick(), how)) is None


def test_scalars_of_openais_archive_determine_the_gelu(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)} | SCALARS, tmp_path / "a.pt")
    assert gelu_of(tmp_path / "a.pt") == Gelu(True, "OpenAI's scalars in the file")
    torch.save({"w": torch.ones(2), "vocab_size": torch.tensor(3)}, tmp_path / "b.pt")
    assert gelu_of(tmp_path / "b.pt") is None


@pytest.mark.parametrize(
    ("model", "quick"),
    [
        ({"quick_gelu": True, "vision_cfg": {}}, True),
        ({"quick_gelu": False, "vision_cfg": {}}, False),
        ({"vision_cfg": {}}, False),
        ({"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_224"}}, None),
    ],
    ids=str,
)
def test_configuration_beside_the_file_determines_the_gelu(
    model: dict[str, Any], quick: bool | None, tmp_path: Path
) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    found = gelu_of(tmp_path / "a.pt")
    assert (found and found.quick) == quick
    assert found is None or str(found) == f"{'Quick' * found.quick}GELU, by open_clip_config.json beside it"


def test_a_broken_configuration_is_named(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    for text in ("{", "[]", "{}", '{"model_cfg": 3}'):
        (tmp_path / "open_clip_config.json").write_text(text)
        with pytest.raises(UserError, match=r"open_clip_config.json: not an open_clip configuration"):
            gelu_of(tmp_path / "a.pt")


def test_contradictions_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)} | SCALARS, tmp_path / "a.pt")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": {}}}))
    with pytest.raises(UserError, match=r"a.pt: contradictory evidence for its GELU .*QuickGELU, by OpenAI.*; GELU, "):
        gelu_of(tmp_path / "a.pt")
