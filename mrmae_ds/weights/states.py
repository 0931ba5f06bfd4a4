"""Sets of weights in a checkpoint: found at any depth, one is chosen; what wrappers add to names is removed."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mrmae_ds.errors import UserError
from mrmae_ds.units import first_few, printable

# Keys of the weights in a training script's checkpoint.
STATE_KEYS = (
    *("model", "state_dict", "module", "model_state_dict", "network", "net", "backbone", "encoder"),
    *("model_ema", "state_dict_ema", "ema", "ema_state_dict", "student", "teacher"),
)
OPTIMIZER = re.compile(r"optim", re.IGNORECASE)  # its moments have the names of the weights
MAX_DEPTH = 8
# Names of wrappers within a model: torch.compile, activation checkpointing, FSDP, DeepSpeed's of Lightning.
WITHIN_MODEL = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)\."
)
WRAPPER = "module."  # of DistributedDataParallel, before every name
AVERAGES = "model_ema."  # of buffers whose names have lost their dots, as in latent diffusion's LitEma


@dataclass(frozen=True)
class ChosenState:
    """A set of weights of a checkpoint.

    Attributes:
        key: its key, ``KEY.KEY`` for one in a dictionary; "" for the checkpoint itself.
        tensors: tensors by name.
        choice: rest of the user's choice, a part of the names.
        ignored: keys beside the tensors that hold none.
    """

    key: str
    tensors: dict[str, Tensor]
    choice: str
    ignored: tuple[str, ...]


def choose_state(content: Mapping[Any, Any], path: Path, choice: str, where: str) -> ChosenState:
    """Choose the weights in the result of ``torch.load``.

    Args:
        content: the result.
        path: the file.
        choice: the user's choice; "" for none.
        where: key and path, for errors.

    Raises:
        UserError: if there are no weights, or several sets of them and no choice.
    """
    parts = _find_states(content)
    states = {name: _tensors(part) for name, part in parts.items()}
    known = [name for name in states if name in ("", *STATE_KEYS) and _has_layers(states[name])]
    unnamed = _name_lists(states, states[known[0]]) if known else []
    # Sets without a layer's weight are buffers, as of a loss.
    networks = [name for name, state in states.items() if _has_layers(state)] or list(states)
    known = known or [name for name in networks if name in ("", *STATE_KEYS)]
    chosen = max((name for name in states if name and f"{choice}.".startswith(f"{name}.")), key=len, default="")
    # Another state of the same names is another copy, as of a moving average; of other names, another part.
    names = unwrap(states[known[0]]).keys() if known else set()
    copies = [name for name in networks if unwrap(states[name]).keys() & names] + unnamed
    whole = choice and not chosen and "" in networks
    if chosen in networks or whole or (not chosen and len(known) == len(copies) == 1):
        key = chosen or ("" if whole else known[0])
        ignored = tuple(str(name) for name, value in parts[key].items() if not isinstance(value, Tensor))
        return ChosenState(key, states[key], choice[len(chosen) :].removeprefix("."), ignored)
    if states:
        shown = [name or "(top level)" for name in [*networks, *unnamed]]
        what = f"{len(shown)} sets of weights" if known else f"weights under unknown keys ({len(shown)})"
        refused = f"{printable(chosen)} holds no layers, only {first_few(list(states[chosen]), 3)}; " if chosen else ""
        raise UserError(
            f"{where}: {refused}contains {what}: {first_few(shown, len(shown))}; choose one: "
            f"{' or '.join(f'{path}#{printable(name)}' for name in networks if name)}"
        )
    keys = json.dumps([str(name) for name in list(content)[:8]])
    raise UserError(
        f"{where}: no weights found, neither at the top level nor under {first_few(STATE_KEYS, 4)}; its keys are {keys}"
    )


def _find_states(content: Mapping[Any, Any], depth: int = 0) -> dict[str, Mapping[Any, Any]]:
    """Return the dictionaries with tensors in a checkpoint by key, "" for itself; optimizers are skipped."""
    found: dict[str, Mapping[Any, Any]] = {}
    for key, value in content.items():
        items = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
        if depth < MAX_DEPTH and isinstance(items, Mapping) and not OPTIMIZER.match(str(key)):
            inner = _find_states(items, depth + 1)
            found |= {f"{key}.{name}".removesuffix("."): part for name, part in inner.items()}
    own = _tensors(content)
    return {"": content, **found} if own and (_has_layers(own) or not found) else found


def _tensors(part: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in part.items() if isinstance(value, Tensor)}


def _has_layers(state: Mapping[str, Tensor]) -> bool:
    return any(name.endswith("weight") for name in state)


def _name_lists(states: dict[str, dict[str, Tensor]], model: Mapping[str, Tensor]) -> list[str]:
    """Give lists of averaged parameters the names of a model's tensors, if they are as many and of the same shapes.

    Args:
        states: sets of tensors by key, of which lists are changed.
        model: the model's tensors.

    Returns:
        Keys of lists of other numbers, whose tensors have shapes of the model's: their names are not known.
    """
    shapes, unnamed = [tensor.shape for tensor in model.values()], []
    for key, state in states.items():
        found = [tensor.shape for tensor in state.values()]
        if not all(map(str.isdecimal, state)) or all(len(shape) < 2 for shape in found):
            continue
        if found == shapes:
            states[key] = dict(zip(model, state.values(), strict=True))
        elif Counter(found) <= Counter(shapes):
            unnamed.append(key)
    return unnamed


def unwrap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what wrappers of modules put before every name, or within names."""
    names = {WITHIN_MODEL.sub("", name): tensor for name, tensor in tensors.items()}
    if len(names) < len(tensors):  # the same tensor with and without a wrapper
        names = dict(tensors)
    while names and all(name.startswith(WRAPPER) for name in names):
        names = {name.removeprefix(WRAPPER): tensor for name, tensor in names.items()}
    return names


def removed_words(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Return the words that :func:`unwrap` removed, of the name that lost most.

    Args:
        before: tensors by name.
        after: those that it returned.
    """
    lost: list[str] = []
    for old, new in zip(before, after, strict=True):
        words: list[str] = []
        rest = new.split(".")
        for word in reversed(old.split(".")):
            if rest and word == rest[-1]:
                rest.pop()
            else:
                words.insert(0, word)
        lost = max(lost, words, key=len)
    return lost


def with_dots(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give averages whose names have lost their dots those of the tensors that they are of, without their counters."""
    averages = [name for name in tensors if name.startswith(AVERAGES)]
    others = [name.split(".") for name in tensors if not name.startswith(AVERAGES)]
    dotted = {"".join(words[i:]): ".".join(words[i:]) for words in others for i in range(min(3, len(words)))}
    names = {name: dotted[end] for name in averages if (end := name.removeprefix(AVERAGES)) in dotted}
    if not names:
        return dict(tensors)
    counters = {name for name in averages if name not in names and not tensors[name].dim()}
    kept = {name: tensor for name, tensor in tensors.items() if name not in counters}
    return {AVERAGES + names[name] if name in names else name: tensor for name, tensor in kept.items()}
