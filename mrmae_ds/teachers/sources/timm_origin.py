"""Decide what no tensor shows for weights under a timm name: GELU, statistics, heads.

Each is decided by the file's known origin, by the name with its tag, or by an explicit key; what stays undecided, or
contradicts another, is refused. timm itself takes the values of the name's default weights, whatever the file is.
"""

from __future__ import annotations

import timm
import torch
from timm.layers import QuickGELU, create_act_layer
from timm.models import get_pretrained_cfg

from mrmae_ds.errors import UserError
from mrmae_ds.imagenet import Rgb
from mrmae_ds.teachers.options import TeacherOptions
from mrmae_ds.teachers.sources.gelu import Gelu, gelu_of_file, resolve_gelu
from mrmae_ds.teachers.sources.timm_readers import TimmNetwork
from mrmae_ds.weights.beside import config_part, model_config
from mrmae_ds.weights.resolve import Weights


def check_kind(weights: Weights, options: TeacherOptions) -> None:
    """Check that a CViT's file is not given as the weights of another model.

    Raises:
        UserError: naming the recipe key and the kind to use.
    """
    if weights.identity.family == "cvit" and not options.source.startswith("cvit"):
        raise UserError(
            f"{options.key}.weights: {options.weights} contains {weights.identity.title}, not {options.source}; use "
            f"kind: checkpoint with source: {options.weights}"
        )


def check_gelu(network: TimmNetwork, weights: Weights | None, options: TeacherOptions) -> dict[str, str]:
    """Check that a network computes the GELU of CLIP weights, and describe it.

    timm has separate names for models with either GELU, but loads the wrong weights with no more than a note.

    Raises:
        UserError: naming the recipe key, if the GELU is undetermined or the network computes another.
    """
    arch, _, tag = options.source.partition(".")
    gelu = gelu_of_file(weights.file) if weights is not None else None
    if gelu is None and "natively QuickGELU" in " ".join(network.pretrained_cfg.get("notes") or ()):
        gelu = Gelu(True, f"timm's note on {tag}") if tag or weights is None else None
    if gelu is None and "_clip_" not in arch:
        if options.quickgelu is not None:
            raise UserError(f"{options.key}.quickgelu: has no effect on {options.source}, which is no CLIP; remove it")
        return {}
    if gelu is None and (tag or weights is None):
        gelu = Gelu("quickgelu" in arch, f"timm's entry for {options.source}")
    if gelu is None and "quickgelu" in arch:
        gelu = Gelu(True, f"the name {arch}")
    gelu = resolve_gelu(gelu, options, f"name the weights' tag in source ({arch}.openai)")
    if any(isinstance(module, QuickGELU) for module in network.modules()) != gelu.quick:
        other = "a name with clip_quickgelu" if gelu.quick else "the name without quickgelu"
        raise UserError(
            f"{options.key}.source: these weights were trained with {'Quick' if gelu.quick else 'plain '}GELU (by "
            f"{gelu.why}), which {options.source} does not compute; use {other}"
        )
    return {"GELU": str(gelu)}


def check_activation(network: TimmNetwork, weights: Weights, options: TeacherOptions) -> dict[str, str]:
    """Check that a network has the activation that timm's configuration beside a file records, and describe it.

    Raises:
        UserError: naming the recipe key, if it has another.
    """
    recorded = config_part(model_config(weights.file, weights.identity.sizes), "model_args").get("act_layer")
    if recorded is None:
        return {}
    x = torch.linspace(-3, 3, 13)
    try:
        expected = create_act_layer(recorded)(x)
    except (KeyError, AttributeError, TypeError):  # timm has no such activation
        expected = None
    found = [module(x) for name, module in network.named_modules() if name.endswith(".act")]
    if expected is None or not any(torch.allclose(y, expected, atol=1e-6) for y in found):
        raise UserError(
            f"{options.key}.source: {options.weights} has the activation {recorded} (act_layer in config.json beside "
            f"it), which {options.source} does not compute; set source to the model that it was saved from"
        )
    return {"activation": f"{recorded}, by config.json beside it"}


def check_heads(heads: int | None, weights: Weights, options: TeacherOptions) -> dict[str, str]:
    """Compare a network's number of heads with the file's, and describe the comparison; empty if either has none.

    Raises:
        UserError: naming the recipe key, if they differ.
    """
    origin = weights.identity.origin
    if heads is None or not weights.identity.sizes:
        return {}
    if origin.num_heads is None:
        return {"heads": f"{heads}, as in {options.source}; not checked, the file does not record it"}
    if origin.num_heads != heads:
        raise UserError(
            f"{options.key}.weights: {options.weights} has {origin.num_heads} attention heads (by {origin.heads_by}), "
            f"{options.source} has {heads}; set source to the model that it was saved from"
        )
    return {"heads": f"{heads}, by {origin.heads_by}"}


def statistics_of(
    network: TimmNetwork, weights: Weights | None, options: TeacherOptions
) -> tuple[tuple[Rgb, Rgb], str]:
    """Return mean and std of a network's input, and the evidence for them.

    Raises:
        UserError: naming the recipe key, if they are undecided or the file contradicts the name.
    """
    config = network.pretrained_cfg
    named = (_rgb(config["mean"]), _rgb(config["std"]))
    if options.statistics is not None:
        return options.statistics, "the recipe"
    if weights is None:
        return named, "timm's entry"
    origin = weights.identity.origin
    arch, _, tag = options.source.partition(".")
    is_named = bool(tag) or ":" in options.source
    if origin.statistics is not None:
        if is_named and not _close(origin.statistics, named):
            raise UserError(
                f"{options.key}.mean: {options.weights} was trained with mean {origin.statistics[0]} (by "
                f"{origin.statistics_by}), but {options.source} with {named[0]}; name the weights' own tag in source, "
                "or give mean and std"
            )
        return origin.statistics, origin.statistics_by
    if is_named:
        return named, f"timm's entry for {options.source}"
    tags = [get_pretrained_cfg(name) for name in timm.list_pretrained(f"{arch}.*")]
    known = {(_rgb(tag.mean), _rgb(tag.std)) for tag in tags}
    if len(known) > 1:
        listed = "; ".join(sorted(f"mean {mean}" for mean, _ in known))
        raise UserError(
            f"{options.key}.mean: {options.weights} does not record the statistics of its input, and timm's weights of "
            f"{arch} differ ({listed}); name the weights' tag in source ({arch}.TAG), or give mean and std"
        )
    return named, f"all of timm's weights of {arch}"


def _rgb(values: object) -> Rgb:
    red, green, blue = map(float, values)  # type: ignore[call-overload]
    return red, green, blue


def _close(first: tuple[Rgb, Rgb], second: tuple[Rgb, Rgb]) -> bool:
    return all(
        abs(a - b) < 1e-4 for one, other in zip(first, second, strict=True) for a, b in zip(one, other, strict=True)
    )
