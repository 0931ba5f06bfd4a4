"""Reproducible choice of samples by class."""

from __future__ import annotations

import numpy as np

from mrmae_ds.data.types import IntArray


def balanced_subset(labels: IntArray, count: int) -> IntArray:
    """Choose ``count`` samples, spread over the classes as evenly as their sizes allow.

    The choice within a class is scattered and depends on the labels and ``count`` only; a smaller subset is part of a
    larger one.

    Args:
        labels: int64 [N], not negative.
        count: 0 to N.

    Returns:
        The rows, int64 [count], ascending.
    """
    if not 0 <= count <= len(labels):
        raise ValueError(f"cannot take {count} of {len(labels)} samples")
    scattered = np.argsort(np.random.Philox(key=0).random_raw(len(labels)), kind="stable")
    by_class = scattered[np.argsort(labels[scattered], kind="stable")]
    first_of_class = np.searchsorted(labels[by_class], labels[by_class])
    position = np.arange(len(labels)) - first_of_class  # of each sample in its class
    return np.sort(by_class[np.argsort(position, kind="stable")[:count]])


def split_off(labels: IntArray, fraction: float) -> tuple[IntArray, IntArray]:
    """Divide a data set in two, moving the same ``fraction`` of every class to the second part.

    Of a class with two samples or more, at least one goes to each part.

    Args:
        labels: int64 [N], not negative.
        fraction: between 0 and 1.

    Returns:
        The rows of the first and of the second part, int64, ascending.
    """
    second = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        take = int(np.clip(round(fraction * len(rows)), 1, len(rows) - 1)) if len(rows) > 1 else 0
        second.append(rows[balanced_subset(np.zeros(len(rows), dtype=np.int64), take)])
    chosen = np.sort(np.concatenate(second))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen
