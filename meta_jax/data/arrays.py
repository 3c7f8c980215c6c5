"""Datasets from arrays of examples and their labels."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from meta_jax.concrete import check_finite
from meta_jax.core import PyTree
from meta_jax.data.dataset import (
    ON_DEVICE,
    DataError,
    Dataset,
    Split,
    Splits,
    Storage,
    lazy_splits,
    split_from_classes,
)
from meta_jax.shapes import take_rows


def dataset_from_arrays(
    x: PyTree,
    labels: Sequence[Any] | np.ndarray,
    groups: Sequence[Any] | np.ndarray | None = None,
    *,
    storage: Storage = ON_DEVICE,
) -> Dataset:
    """Builds a `Dataset` from examples in any order and their labels.

    Args:
      x: Examples, an array [n, ...] of any dtype or a pytree of such arrays.
      labels: Name or integer of each example's class, [n]; classes are sorted by it.
      groups: Name or integer of each example's group, [n], the same within a class; or None.
      storage: Where the examples lie; by default on the device.

    Raises:
      DataError: labels or groups that do not fit the examples, or examples that are no numbers, or
        not finite.

    Examples:
      >>> data = dataset_from_arrays(np.arange(6.0).reshape(3, 2), ["cat", "ant", "cat"])
      >>> data.counts.tolist(), data.examples.tolist()
      ([1, 2], [[2.0, 3.0], [0.0, 1.0], [4.0, 5.0]])
    """
    return split_from_arrays(x, labels, groups, storage=storage).dataset


def split_from_arrays(
    x: PyTree,
    labels: Sequence[Any] | np.ndarray,
    groups: Sequence[Any] | np.ndarray | None = None,
    *,
    storage: Storage = ON_DEVICE,
) -> Split:
    """Builds a `Split` from examples in any order and their labels.

    Args:
      x, labels, groups, storage: As in `dataset_from_arrays`.

    Raises:
      DataError: as in `dataset_from_arrays`.
    """
    x, n = jax.tree.map(np.asarray, x), len(labels)
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if leaf.ndim < 1 or len(leaf) != n:
            where = jax.tree_util.keystr(path)
            raise DataError(f"x{where} has shape {list(leaf.shape)}, and there are {n} labels")
    try:
        check_finite(x, "x")
    except ValueError as error:
        raise DataError(str(error)) from error
    labels = _names(labels, "labels")
    names, index = np.unique(labels, return_inverse=True)
    if not names.size:
        raise DataError("a dataset needs at least one example, but none was given")
    class_groups = _class_groups(groups, index, names)
    order = np.argsort(index, kind="stable")
    ends = np.cumsum(np.bincount(index))[:-1]
    rows = np.split(order, ends)
    classes = [take_rows(x, own) for own in rows]
    return split_from_classes(classes, [str(name) for name in names], class_groups, storage=storage)


def _names(values: Sequence[Any] | np.ndarray, what: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iuUSb":
        raise DataError(
            f"{what} are {array.dtype}{list(array.shape)}: give one name or integer each"
        )
    return array.astype(str) if array.dtype.kind == "S" else array


def _class_groups(
    groups: Sequence[Any] | np.ndarray | None, index: np.ndarray, names: np.ndarray
) -> list[str]:
    """The group of each class, by name."""
    if groups is None:
        return [""] * len(names)
    groups = _names(groups, "groups")
    if len(groups) != len(index):
        raise DataError(f"{len(groups)} groups were given for {len(index)} examples")
    found = []
    for position, name in enumerate(names):
        own = np.unique(groups[index == position])
        if len(own) > 1:
            raise DataError(f"class {name} has examples of the groups {', '.join(map(str, own))}")
        found.append(str(own[0]))
    return found


def embedded(splits: Splits, embed: Callable[[PyTree], Any]) -> Splits:
    """Splits whose examples are embedded once, when a split is first asked for.

    Args:
      splits: Splits of inputs.
      embed: Function from inputs, leaves [n, ...], to embeddings [n, ...], such as
        `meta_jax.networks.frozen` builds.

    Examples:
      >>> splits = lazy_splits({"train": lambda: split_from_arrays(np.ones((4, 3)), [0, 0, 1, 1])})
      >>> embedded(splits, lambda x: 2 * x[:, :1]).datasets["train"].examples.tolist()
      [[2.0], [2.0], [2.0], [2.0]]
    """

    def load(split: str) -> Split:
        dataset = splits.datasets[split]
        examples = jax.tree.map(jax.numpy.asarray, embed(dataset.examples))
        found = Dataset(
            examples, dataset.starts, dataset.counts, dataset.groups, largest=dataset.largest
        )
        return Split(found, splits.class_names[split], splits.group_names[split])

    return lazy_splits({split: lambda split=split: load(split) for split in splits.datasets})
