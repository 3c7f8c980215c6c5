"""Features from a file: vectors, or any other arrays, that some other program made."""

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from meta_jax import registry
from meta_jax.core import Objective
from meta_jax.data.arrays import split_from_arrays
from meta_jax.data.dataset import (
    ON_DEVICE,
    DataError,
    Placement,
    Split,
    Splits,
    Storage,
    lazy_splits,
    random_class_split,
)
from meta_jax.data.source import TaskSource, source_from_splits
from meta_jax.lookup import local_path
from meta_jax.objectives import as_objective
from meta_jax.ranges import NotNegativeInt, Positive, PositiveInt


@registry.tasks("features")
def features(
    file: str,
    /,
    *,
    within_group: bool = False,
    least_ways: PositiveInt | None = None,
    least_shots: PositiveInt | None = None,
    objective: Objective | str = "cross_entropy",
    split_seed: NotNegativeInt = 0,
    placement: Placement = "device",
    device_memory: Positive | None = None,
) -> TaskSource:
    """Builds the source of a file of features.

    Args:
      file: File `.npz` with `x` [n, ...] and `label` [n], and where there are such `split` [n]
        (names of splits) and `group` [n].
      within_group: Whether all classes of an episode are of one group.
      least_ways: Smallest number of classes in a training episode. Each episode draws its number
        between this and the ways, and pads the rest; by default all have as many classes.
      least_shots: Likewise the smallest number of support examples of each class.
      objective: Objective of the tasks: 'cross_entropy', or somebody's own as
        package.module:attribute.
      split_seed: Seed of the random split of classes; not used where the file has splits. Give the
        same in training and in tests, or classes trained on turn up in the test split.
      placement: Where the features of a split lie: 'device', or 'host' for the machine's memory,
        from where workers of grain send the same episodes: for sets larger than the device.
      device_memory: Megabytes of a device that features may take: all of a split, or with
        placement=host the episodes that are sent ahead; by default what the device has, or 256.
    """
    objective = as_objective(objective)
    return source_from_splits(
        load_features(file, seed=split_seed, storage=Storage(placement, device_memory)),
        within_group=within_group,
        least_ways=least_ways,
        least_shots=least_shots,
        objective=objective,
        baselines=("nearest_neighbour",) if objective.kind == "classification" else (),
    )


def load_features(
    file: str | os.PathLike, *, seed: int = 0, storage: Storage = ON_DEVICE
) -> Splits:
    """Loads features from a `.npz` file, as `np.savez(file, x=..., label=...)` writes it.

    Real numbers become float32 and are not scaled; bytes (uint8) are taken for pixels, and become
    [0, 1] in an episode; other integers stay as they are.

    Args:
      file: File with `x` [n, ...] and `label` [n] (names or integers), and where there are such
        `split` [n] (names of splits, such as train, val and test) and `group` [n].
      seed: Seed of the random split of classes, where the file has no `split`.
      storage: Where the examples lie; by default on the device.

    Raises:
      DataError: the file is not there, is damaged or lacks an array, arrays differ in length, a
        feature is not finite, or a class is in two splits.
    """
    path = local_path(file)
    arrays = _read(path)
    x, labels, groups = arrays["x"], arrays["label"], arrays.get("group")
    for name in ("label", "split", "group"):
        if name in arrays and arrays[name].shape != (len(x),):
            raise DataError(
                f"{path}: {name} has shape {list(arrays[name].shape)}, and x has {len(x)} rows"
            )
    if np.issubdtype(x.dtype, np.floating):
        x = x.astype(np.float32)
        if not np.isfinite(x).all():
            row = int(np.argmax(~np.isfinite(x).reshape(len(x), -1).all(1)))
            raise DataError(f"{path}: row {row} of x is not finite: repair it or leave it out")
    splits = _splits(path, arrays, seed)

    def load(rows: np.ndarray) -> Split:
        own = None if groups is None else groups[rows]
        return split_from_arrays(x[rows], labels[rows], own, storage=storage)

    return lazy_splits({name: lambda rows=rows: load(rows) for name, rows in splits.items()})


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError(f"the file {path} does not exist: correct features:FILE")
    try:
        with path.open("rb") as file:  # NumPy leaves a damaged one open
            archive: Any = np.load(file, allow_pickle=False)
            arrays = {name: archive[name] for name in getattr(archive, "files", ())}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no .npz file of plain arrays ({error})") from error
    if isinstance(archive, np.ndarray):
        raise DataError(f"{path} holds one array: write it with np.savez(x=..., label=...)")
    missing = {"x", "label"} - arrays.keys()
    if missing or not arrays["x"].ndim:
        what = ", ".join(sorted(arrays)) or "nothing"
        raise DataError(f"{path} has {what}: it needs x [n, ...] and label [n]")
    return arrays


def _splits(path: Path, arrays: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """By split, the rows that are in it."""
    labels = arrays["label"]
    names, index = np.unique(labels, return_inverse=True)
    if "split" not in arrays:
        members = random_class_split(len(names), seed)
        return {split: np.isin(index, own) for split, own in members.items()}
    given = arrays["split"].astype(str)
    found = {split: given == split for split in np.unique(given).tolist()}
    for position, name in enumerate(names):
        inside = [split for split, rows in found.items() if (index[rows] == position).any()]
        if len(inside) > 1:
            raise DataError(
                f"{path}: class {name} is in the splits {' and '.join(inside)}: few-shot learning "
                "tests on classes that were not trained on, so put each class into one"
            )
    return found
