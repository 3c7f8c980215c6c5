import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from meta_jax.data.dataset import (
    DataError,
    image_pixels,
    open_image,
    random_class_split,
    resize_image,
    stack_classes,
    unify_channels,
)
from meta_jax.data.registry import DATASET_NAMES, load_splits


def _constant(n, value, shape=(2, 3, 1)):
    return np.full((n, *shape), value, np.uint8)


def test_stack_classes_pads_with_zeros_at_the_end():
    dataset = stack_classes([_constant(1, 7), _constant(3, 9)], groups=[4, 2])
    assert dataset.images.shape == (2, 3, 2, 3, 1)
    assert dataset.images.dtype == np.uint8
    np.testing.assert_array_equal(dataset.images[:, :, 0, 0, 0], [[7, 0, 0], [9, 9, 9]])
    np.testing.assert_array_equal(dataset.counts, [1, 3])
    np.testing.assert_array_equal(dataset.groups, [4, 2])
    assert dataset.counts.dtype == dataset.groups.dtype == np.int32


@pytest.mark.parametrize(
    ("images", "groups", "message"),
    [
        ([], None, "at least one class"),
        ([_constant(1, 1), _constant(0, 1)], None, "class 1 has no images"),
        ([_constant(1, 1), _constant(1, 1, (3, 3, 1))], None, "class 1 has uint8 images of shape"),
        ([_constant(1, 1).astype(np.float32)], None, "class 0 has float32"),
        ([_constant(1, 1)], [0, 1], "2 groups were given for 1 classes"),
    ],
)
def test_stack_classes_refuses(images, groups, message):
    with pytest.raises(DataError, match=message):
        stack_classes(images, groups)


@given(n_classes=st.integers(3, 300), seed=st.integers(0, 2**32 - 1))
def test_random_class_split_is_a_partition_without_empty_parts(n_classes, seed):
    split = random_class_split(n_classes, seed)
    assert sorted(np.concatenate(list(split.values())).tolist()) == list(range(n_classes))
    assert min(map(len, split.values())) >= 1
    again = random_class_split(n_classes, seed)
    for name, members in split.items():
        np.testing.assert_array_equal(members, again[name])


def test_random_class_split_has_the_fractions_and_follows_the_seed():
    split = random_class_split(100, seed=0)
    assert {name: len(members) for name, members in split.items()} == {
        "train": 64,
        "val": 16,
        "test": 20,
    }
    assert split["test"].tolist() != random_class_split(100, seed=1)["test"].tolist()
    assert [len(m) for m in random_class_split(10, 0, (0.2, 0.3, 0.5)).values()] == [2, 3, 5]


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (1.0, 0.0, 0.0), (0.5, 0.5)])
def test_random_class_split_refuses_fractions(fractions):
    with pytest.raises(DataError, match="split fractions"):
        random_class_split(10, 0, fractions)


def test_random_class_split_refuses_two_classes():
    with pytest.raises(DataError, match="at least 3"):
        random_class_split(2, 0)


def test_open_image_names_what_does_not_decode():
    with pytest.raises(DataError, match=r"cats/1\.png does not decode"):
        open_image(b"\x89PNG\r\n\x1a\nnonsense", "cats/1.png")


def test_resize_image_keeps_an_image_of_the_right_size_and_refuses_unknown_filters():
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    np.testing.assert_array_equal(resize_image(Image.fromarray(pixels), 4)[..., 0], pixels)
    with pytest.raises(DataError, match="'cubic' is none of nearest, box"):
        resize_image(Image.fromarray(pixels), 4, "cubic")
    with pytest.raises(DataError, match="at least 1 pixel, not 0"):
        resize_image(Image.fromarray(pixels), 0)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (4, 4), 1), [255]),
        (Image.new("L", (4, 4), 70), [70]),
        (Image.fromarray(np.full((4, 4), 40 * 256 + 3, np.uint16)), [40]),
        (Image.new("RGB", (4, 4), (1, 2, 3)), [1, 2, 3]),
        (Image.new("RGB", (4, 4), (9, 8, 7)).convert("P", palette=1), [9, 8, 7]),
        (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), [255, 255, 255]),
        (Image.new("LA", (4, 4), (60, 255)), [60, 60, 60]),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 0)), [255, 255, 255]),
    ],
)
def test_image_pixels_of_every_mode(image, expected):
    pixels = image_pixels(image, 2)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.broadcast_to(expected, (2, 2, len(expected))))


def test_unify_channels_is_grey_unless_something_has_a_colour():
    grey = np.full((2, 2, 1), 5, np.uint8)
    grey_in_colour = np.full((2, 2, 3), 6, np.uint8)
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 200

    first, second = unify_channels([[grey, grey_in_colour], [grey]])
    assert first.shape == (2, 2, 2, 1)
    assert second.shape == (1, 2, 2, 1)
    np.testing.assert_array_equal(first[:, 0, 0, 0], [5, 6])

    first, second = unify_channels([[grey, red], [grey]])
    np.testing.assert_array_equal(first[:, 0, 0], [[5, 5, 5], [200, 0, 0]])
    assert second.shape == (1, 2, 2, 3)

    (forced,) = unify_channels([[red, grey]], grey=True)
    np.testing.assert_array_equal(forced[:, 0, 0, 0], [60, 5])  # 0.299 * 200
    (forced,) = unify_channels([[grey]], grey=False)
    assert forced.shape == (1, 2, 2, 3)


@pytest.mark.parametrize("name", ["mnist", "tfds:", "folder:", "tfds", "glyphs:x", ""])
def test_load_splits_lists_the_names_it_knows(name):
    with pytest.raises(DataError) as error:
        load_splits(name)
    assert "\n" not in str(error.value)
    for known in DATASET_NAMES:
        assert known in str(error.value)
