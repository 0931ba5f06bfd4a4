"""A file's tensors against a model's: which are taken, under which name, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.models.pos_embed import resize_positions
from mrmae_ds.models.sizes import FAMILIES, EncoderSpec
from mrmae_ds.weights.identify import FAMILY_TITLES, WeightIdentity, size_differences, spec_sizes

if TYPE_CHECKING:  # timm_registry.py uses this module before there are encoders
    from mrmae_ds.models.pretrain import Encoder


@dataclass
class LoadReport:
    """What became of a file's tensors: names loaded, resized, missing from the file, unexpected in it."""

    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def listed(label: str, names: list[str]) -> str:
            shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            return f"{label} {len(names)}" + (f" ({shown})" if names else "")

        return "; ".join(
            [
                f"loaded {len(self.loaded)} tensors",
                listed("resized", self.resized),
                listed("missing", self.missing),
                listed("not used", self.unexpected),
            ]
        )


def check_encoder(found: WeightIdentity, wanted: EncoderSpec, where: str) -> None:
    """Refuse a file whose encoder is not ``wanted``; ``where`` names the file, for errors.

    Raises:
        UserError: naming every size that differs.
    """
    family = next(name for name, kind in FAMILIES.items() if isinstance(wanted, kind))
    if found.family != family:
        raise UserError(f"{where}: holds {found.title}, but the recipe's model is a {FAMILY_TITLES[family]}")
    if found.extras:
        raise UserError(
            f"{where}: holds a ViT with more than the plain one has ({', '.join(found.extras[:6])}), which would "
            "compute something else here; it can be a teacher (kind: timm)"
        )
    if differences := size_differences(found.sizes, spec_sizes(wanted)):
        raise UserError(
            f"{where}: another encoder than the recipe's: {'; '.join(differences)}; "
            "take another file, or set model.arch and model.overrides to this one's sizes"
        )


def match_tensors(
    tensors: Mapping[str, Tensor],
    found: WeightIdentity,
    own: Mapping[str, Tensor],
    encoder: Encoder,
    where: str,
    prefix: str = "",
) -> tuple[dict[str, Tensor], LoadReport]:
    """A file's tensors that ``own`` takes, by its names, positions resized; and what became of each.

    Args:
        tensors: by the file's names.
        found: what the file is.
        own: the model's; its names are those of a pre-training model that start with ``prefix``, without it.
        encoder: whose class token and grid the positions must fit.
        where: names the file, for errors.
        prefix: of the names in a pre-training model.

    Raises:
        UserError: for a tensor of another shape, but for a head's, which is left out.
    """
    report, incoming = LoadReport(), {}
    for name, tensor in tensors.items():
        full = found.names.get(name, "")
        ours = full.removeprefix(prefix)
        if not full.startswith(prefix) or ours not in own:
            report.unexpected.append(name)
            continue
        if full == "encoder.pos_embed":
            fitted = fit_positions(tensor, found, encoder, where)
            if fitted.shape != tensor.shape:
                report.resized.append(ours)
            tensor = fitted
        if tensor.shape != own[ours].shape:
            if not full.startswith(("encoder.head.", "heads.")):
                raise UserError(f"{where}: {name} is {tuple(tensor.shape)}, expected {tuple(own[ours].shape)}")
            report.unexpected.append(name)
            continue
        incoming[ours] = tensor
        report.loaded.append(ours)
    report.missing = [name for name in own if name not in incoming]
    return incoming, report


def fit_positions(positions: Tensor, found: WeightIdentity, encoder: Encoder, where: str) -> Tensor:
    """A file's positions [1, rows, C] for the encoder's class token, or lack of one, and its grid.

    Raises:
        UserError: if the rows are those of no grid that is known.
    """
    wanted = encoder.num_prefix_tokens
    if found.grid is None:
        if tuple(positions.shape[1:2]) == tuple(encoder.pos_embed.shape[1:2]):
            return positions
        raise UserError(
            f"{where}: pos_embed is {tuple(positions.shape)}: its rows are no square grid, and the model's are "
            f"{encoder.grid[0]} x {encoder.grid[1]}"
        )
    if found.prefix_rows > wanted:
        positions = positions[:, found.prefix_rows :]
    elif found.prefix_rows < wanted:  # a class token without a position is one whose position is zero
        positions = torch.cat([positions.new_zeros(1, wanted, positions.shape[2]), positions], dim=1)
    return resize_positions(positions, found.grid, encoder.grid, wanted)
