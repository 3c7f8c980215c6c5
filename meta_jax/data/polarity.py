"""Polarity of characters: light ink on dark paper, or dark ink on light paper."""

import dataclasses
import functools
from typing import Literal

import jax
import numpy as np

from meta_jax.data.dataset import DataError, Dataset, Split, Splits, lazy_splits

Ink = Literal["ink_light", "ink_dark"]
Polarity = Literal["as_is", "ink_light", "ink_dark"]
_MIDDLE = (0.4, 0.6)  # brightness of paper between these says nothing


def paper(images: np.ndarray) -> np.ndarray:
    """Brightness of the paper of images [n, side, side, channels]: the median of their borders."""
    grey = images.mean(-1)
    sides = [grey[:, 0], grey[:, -1], grey[:, 1:-1, 0], grey[:, 1:-1, -1]]
    return np.median(np.concatenate(sides, 1), 1)


def ink_of(brightness: float) -> Ink | None:
    """The polarity of ink on paper of a brightness in [0, 1]; None where it says nothing.

    Examples:
      >>> ink_of(0.9), ink_of(0.1), ink_of(0.5)
      ('ink_dark', 'ink_light', None)
    """
    if _MIDDLE[0] < brightness < _MIDDLE[1]:
        return None
    return "ink_dark" if brightness > 0.5 else "ink_light"


def with_polarity(splits: Splits, wanted: Polarity, found: Ink | None = None) -> Splits:
    """Splits of bytes whose images have the wanted polarity; each is changed when it is asked for.

    Args:
      splits: Splits of images, uint8 [all, side, side, channels].
      wanted: Polarity to have; 'as_is' changes nothing.
      found: Polarity that the images have; told from their borders if None.

    Raises:
      DataError: when a split is asked for, its borders do not tell.
    """
    if wanted in ("as_is", found):
        return splits
    loaders = {
        split: functools.partial(_converted, splits, split, wanted, found)
        for split in splits.datasets
    }
    return lazy_splits(loaders)


def _converted(splits: Splits, split: str, wanted: Polarity, found: Ink | None) -> Split:
    dataset: Dataset = splits.datasets[split]
    names = splits.class_names[split], splits.group_names[split]
    found = found or ink_of(float(np.median(paper(np.asarray(dataset.examples) / 255))))
    if found is None:
        raise DataError(
            f"the borders of the images of split {split} are grey, so ink and paper cannot be told "
            "apart: leave polarity at as_is, or convert the images"
        )
    if found == wanted:
        return Split(dataset, *names)
    swapped = jax.tree.map(lambda leaf: 255 - leaf, dataset.examples)
    return Split(dataclasses.replace(dataset, examples=swapped), *names)
