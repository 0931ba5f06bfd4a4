"""Match the classes of a data set to a classifier's outputs by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from timm.data import ImageNetInfo

from mrmae_ds.data.convert.imagenet_labels import WORDNET_ID
from mrmae_ds.errors import UserError
from mrmae_ds.training.evaluation.base import DataSet
from mrmae_ds.units import describe_difference


def match_classes(names: Sequence[str], num_classes: int, data: DataSet, where: str) -> tuple[int, ...] | None:
    """Return the classifier's output of each class of a data set.

    Names are those of the classifier; where they are WordNet ids, the readable names that ``mrmae data`` writes
    (``tench``, ``crane (n02012849)``) are known too, and so is the part of a name before its first comma.

    Args:
        names: of the classifier's outputs; empty if they are not known.
        num_classes: number of outputs.
        data: the data set.
        where: key and path of the classifier, for errors.

    Returns:
        Outputs in the order of the data set's classes; None if these are all outputs in their order.

    Raises:
        UserError: naming a class that the classifier does not have.
    """
    if not names:
        raise UserError(
            f"{where} does not record the names of its {num_classes} classes; put a config.json with "
            '{"id2label": {"0": NAME, ...}} beside it'
        )
    if tuple(names) == data.class_names:
        return None
    outputs = _outputs(names)
    missing = [name for name in data.class_names if name not in outputs]
    if missing:
        numbers = all(name.isdecimal() for name in data.class_names) and not any(map(str.isdecimal, names))
        named = " (its classes have numbers only: convert it with --class-names FILE, or adopt it with --classes FILE)"
        raise UserError(
            f"{where} was trained on other classes ({num_classes}) than the validation set, {data.path} "
            f"({data.num_classes}; {describe_difference(names, data.class_names)}), and not on "
            f"{missing[0]!a}{named * numbers}; evaluate it on data of its own classes"
        )
    return tuple(outputs[name] for name in data.class_names)


def _outputs(names: Sequence[str]) -> dict[str, int]:
    """Return the output of each name by which a class is known."""
    info = ImageNetInfo() if all(WORDNET_ID.fullmatch(name) for name in names) else None
    long = [info.label_name_to_description(name, detailed=False) if info else name for name in names]
    short = [name.split(",")[0].strip() for name in long]
    aliases = [{name, word, whole, f"{word} ({name})"} for name, word, whole in zip(names, short, long, strict=True)]
    counts = Counter(alias for known in aliases for alias in known)
    return {alias: i for i, known in enumerate(aliases) for alias in known if counts[alias] == 1}


def restricted_from(num_classes: int, classes: Sequence[int] | None) -> int | None:
    """Return the number of a model's classes if the data set has only some of them, else None.

    Args:
        num_classes: of the model.
        classes: result of :func:`match_classes`.
    """
    return num_classes if classes is not None and len(classes) < num_classes else None
