"""Ink and paper of characters."""

import numpy as np
import pytest

from meta_jax.data.arrays import split_from_arrays
from meta_jax.data.dataset import DataError, lazy_splits
from meta_jax.data.polarity import with_polarity


def splits_of(images):
    return lazy_splits({"train": lambda: split_from_arrays(images, [0, 0, 1])})


LIGHT = np.zeros((3, 6, 6, 1), np.uint8)
LIGHT[:, 2:4, 2:4] = 200


@pytest.mark.parametrize("images", [LIGHT, 255 - LIGHT])
@pytest.mark.parametrize("wanted", ["ink_light", "ink_dark"])
def test_images_get_the_polarity_that_is_wanted(images, wanted):
    found = with_polarity(splits_of(images), wanted).datasets["train"]
    np.testing.assert_array_equal(found.examples, LIGHT if wanted == "ink_light" else 255 - LIGHT)
    assert found.counts.tolist() == [2, 1]


def test_as_is_and_what_is_known_stay():
    splits = splits_of(LIGHT)
    assert with_polarity(splits, "as_is") is splits
    assert with_polarity(splits, "ink_light", "ink_light") is splits
    grey = splits_of(np.full_like(LIGHT, 128))
    assert with_polarity(grey, "ink_dark", "ink_light").datasets["train"].examples.max() == 127
    with pytest.raises(DataError, match="split train are grey"):
        _ = with_polarity(grey, "ink_dark").datasets["train"]
