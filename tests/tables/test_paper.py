from __future__ import annotations

import pytest
import torch

from mrmae_ds.models.encoders import build_encoder
from mrmae_ds.models.pretrain import Fusion, FusionSpec
from mrmae_ds.models.sizes import ARCHITECTURES
from mrmae_ds.tables.paper import TABLES, PaperRow, errata_of

# Transcribed a second time from the paper: one line per row, cells in print order; a dash or N/A is "-".
PRINTED = {
    1: """
        BEiT|ViT-B|88|DALLE|100|300|83.0
        MAE|ViT-B|88|RGB|25|1600|83.6
        CAE|ViT-B|88|RGB|25|800|83.6
        MaskFeat|ViT-B|88|HOG|100|300|83.6
        SimMIM|Swin-B|88|RGB|100|800|84.0
        DMAE|ViT-B|88|MAE|25|100|84.0
        data2vec|ViT-B|88|Momentum|100|800|84.2
        MVP|ViT-B|88|CLIP|100|300|84.4
        MCMAE|CViT-B|88|RGB|25|1600|85.0
        MixMIM|MixMIM-B|88|RGB|100|600|85.1
        CMAE|CViT-B|88|RGB|25|1600|85.3
        MILAN|ViT-B|88|CLIP|25|400|85.4
        BEiT V2|ViT-B|88|CLIP|100|1600|85.5
        MR-MAE|CViT-B|88|CLIP|25|400|85.8
    """,
    2: """
        ViTDet|1600|100|51.2|45.5|111|0.8
        CMAE|1600|25|52.9|47.0|104|0.9
        MCMAE|1600|25|53.2|47.1|104|0.9
        MR-MAE|400|25|53.4|46.9|104|0.9
    """,
    3: """
        200|L_R|||||83.0|-|-
        200|L_R|L_M||||84.7|-|-
        200|L_R|L_M|yes|||84.9|-|-
        200|L_R|L_M|yes|yes||85.0|51.6|45.5
        200|L_R|L_R|yes|yes||83.3|50.3|44.9
        200||L_M|yes|yes||84.9|50.9|44.8
        200|L_R|L_M|yes|yes|yes|85.5|53.0|46.5
    """,
    4: """
        DINO|88|84.0
        CLIP|88|85.0
        CLIP/DINO (Joint)|88|83.8
        CLIP/DINO (Sep.)|176|85.5
    """,
    5: """
        200|85.5|53.0|46.5
        400|85.8|53.4|46.9
        800|85.8|53.5|47.0
    """,
    6: """
        MAE|1600|79.5|83.6|85.9|86.9|-|87.8
        MCMAE|800|82.6|84.6|84.9|86.2|-|-
        MR-MAE|200|83.6|85.5|86.8|88.0|88.5|-
    """,
}
# Headings of those cells; "method" and "epochs" are fields of a row, the rest its labels or numbers.
HEADINGS = {
    1: ("method", "Backbone", "Params (M)", "Supervision", "Ratio (%)", "epochs", "FT"),
    2: ("method", "epochs", "F-Epochs", "AP box", "AP mask", "Params (M)", "FLOPs (T)"),
    3: (
        *("epochs", "Low Level", "High Level", "Focused Mimic", "Multi-layer Fusion", "Masked Conv."),
        *("FT", "AP box", "AP mask"),
    ),
    4: ("method", "Params (M)", "FT"),
    5: ("epochs", "FT", "AP box", "AP mask"),
    6: ("method", "epochs", "Small", "Base", "Large", "Huge", "Huge-392", "Huge-448"),
}


def _printed(row: PaperRow, heading: str) -> str:
    if heading in row.labels:
        return row.labels[heading]
    value = {"method": row.method, "epochs": row.epochs, **row.cells}[heading]
    return "-" if value is None else str(value)


@pytest.mark.parametrize("number", range(1, 7))
def test_every_table_is_as_printed(number: int) -> None:
    table, headings = TABLES[number], HEADINGS[number]
    assert table.number == number
    lines = [line.strip() for line in PRINTED[number].strip().splitlines()]
    assert ["|".join(_printed(row, heading) for heading in headings) for row in table.rows] == lines
    assert table.columns == tuple(h for h in headings if h in table.rows[0].cells)


def test_rows_without_a_name_are_numbered() -> None:
    assert [row.method for row in TABLES[3].rows] == [f"row {n}" for n in range(1, 8)]


def test_errata_are_listed_with_the_tables_they_concern() -> None:
    assert any("Huge-393" in text for text in errata_of(6))
    assert any("85.8" in text and "400" in text for text in errata_of(5))
    assert any("52.7" in text for text in errata_of(5))
    assert not any("52.7" in text for text in errata_of(6))
    assert any("Table 4" in text and "85.0" in text for text in errata_of(4))
    for method in ("BEiT:", "CAE:", "DMAE:", "CMAE:", "BEiT V2:"):
        assert sum(text.startswith(method) for text in errata_of(1)) == 1
        assert not any(text.startswith(method) for text in errata_of(6))
    unconfirmed = [text.split(":")[0] for text in errata_of(1) if "not confirmed here" in text]
    assert unconfirmed == ["BEiT", "CAE", "CMAE"]
    assert all(any("visible" in text for text in errata_of(table)) for table in range(1, 7))


def test_the_parameters_of_an_erratum_are_those_of_the_models() -> None:
    def millions(name: str, classes: int, fused: tuple[int, ...] = ()) -> str:
        with torch.device("meta"):
            encoder = build_encoder(ARCHITECTURES[name], 224, classes)
            convolutions = Fusion(FusionSpec(stages=fused), encoder).stage_convs
        return f"{sum(p.numel() for p in [*encoder.parameters(), *convolutions.parameters()]) / 1e6:.1f}"

    (text,) = {text for number in TABLES for text in errata_of(number) if '"88 M"' in text}
    classifiers, fused = text.split("; ")
    for method, name in (("BEiT has", "beit_base"), ("MAE", "vit_base"), ("CViT-B", "cvit_base")):
        assert f"{method} {millions(name, 1000)}" in classifiers
    assert fused.endswith(f" {millions('cvit_base', 0, (1, 2))}.")
