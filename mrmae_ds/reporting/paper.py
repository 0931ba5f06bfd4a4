"""The numbers of the MR-MAE paper (Gao et al., "Mimic before Reconstruct", 2023), as printed, and its known
slips.

They are shown beside ours and never used in place of ours.
"""

from __future__ import annotations

from dataclasses import dataclass

IMAGENET = "ImageNet-1K"
IMAGENET_CLASSES = 1000
IMAGENET_TRAIN_SAMPLES = 1_281_167
IMAGENET_EVAL_SAMPLES = 50_000


@dataclass(frozen=True)
class PaperRow:
    """A printed row. `cells` holds a number a column; None is a dash in print; `epochs` those of
    pre-training."""

    method: str
    epochs: int
    cells: dict[str, float | None]


@dataclass(frozen=True)
class PaperTable:
    """A printed table: its number, what it shows with its unit, on which data, and its columns in print
    order."""

    number: int
    title: str
    unit: str
    dataset: str
    columns: tuple[str, ...]
    rows: tuple[PaperRow, ...]


@dataclass(frozen=True)
class Slip:
    """A place where the paper contradicts itself or can be misread; `tables` are those whose reader must
    know."""

    text: str
    tables: tuple[int, ...]


_SIZES = ("Small", "Base", "Large", "Huge", "Huge-392", "Huge-448")

TABLE_6 = PaperTable(
    number=6,
    title="Top-1 accuracy after fine-tuning, by model size",
    unit="%",
    dataset=IMAGENET,
    columns=_SIZES,
    rows=(
        PaperRow("MAE", 1600, dict(zip(_SIZES, (79.5, 83.6, 85.9, 86.9, None, 87.8), strict=True))),
        PaperRow("MCMAE", 800, dict(zip(_SIZES, (82.6, 84.6, 84.9, 86.2, None, None), strict=True))),
        PaperRow("MR-MAE", 200, dict(zip(_SIZES, (83.6, 85.5, 86.8, 88.0, 88.5, None), strict=True))),
    ),
)

SLIPS = (
    Slip(
        "MR-MAE Base reaches 85.8 % after 400 epochs of pre-training (Tables 1 and 5); the introduction "
        "says 200. After 200 it is 85.5 % (Tables 3, 5 and 6).",
        (1, 5, 6),
    ),
    Slip("The introduction gives MAE Base 83.8 %; Tables 1 and 6 give 83.6 %.", (1, 6)),
    Slip(
        'The column printed as "Huge-393" is the model fine-tuned at 392 pixels, written Huge-392 here: '
        "patches of 14 pixels tile 392 (28 x 28), not 393.",
        (6,),
    ),
    Slip(
        '"Mask ratio 25 %" means that 25 % of the patches are visible and 75 % are masked.',
        (1, 2, 3, 4, 5, 6),
    ),
    Slip("Section 4.3 gives 52.7 box AP for 200 epochs; Tables 3 and 5 give 53.0.", (3, 5)),
    Slip('"88 M" parameters counts the encoder with its two fusion convolutions (88.93 M).', (1, 4)),
)


def slips_of(table: int) -> list[str]:
    """Return what a reader of the paper's table of this number must know of its slips."""
    return [slip.text for slip in SLIPS if table in slip.tables]
