import io

import numpy as np
import pytest
from PIL import Image

from meta_jax.data.dataset import DataError
from meta_jax.data.images import (
    any_colour,
    image_pixels,
    open_image,
    resize_image,
    unify_channels,
)


def _png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


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


def test_unify_channels_gives_all_images_one_number_of_channels():
    grey = np.full((2, 2, 1), 5, np.uint8)
    grey_in_colour = np.full((2, 2, 3), 6, np.uint8)
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 200

    first, second = unify_channels([[grey, grey_in_colour], [grey]], 1)
    assert first.shape == (2, 2, 2, 1)
    assert second.shape == (1, 2, 2, 1)
    np.testing.assert_array_equal(first[:, 0, 0, 0], [5, 6])

    first, second = unify_channels([[grey, red], [grey]], 3)
    np.testing.assert_array_equal(first[:, 0, 0], [[5, 5, 5], [200, 0, 0]])
    assert second.shape == (1, 2, 2, 3)

    (forced,) = unify_channels([[red, grey]], 1)
    np.testing.assert_array_equal(forced[:, 0, 0, 0], [60, 5])  # 0.299 * 200


def test_any_colour_passes_over_what_does_not_decode():
    grey = Image.new("L", (4, 4), 70)
    files = {
        "grey": _png(grey),
        "grey as colour": _png(grey.convert("RGB")),
        "invisible": _png(Image.new("RGBA", (4, 4), (9, 0, 0, 0))),
        "nothing": b"",
        "truncated red": _png(Image.new("RGB", (4, 4), (200, 0, 0)))[:50],
    }
    assert not any_colour([(content, name) for name, content in files.items()], 4)
    files["red"] = _png(Image.new("RGB", (4, 4), (200, 0, 0)))
    assert any_colour([(content, name) for name, content in files.items()], 4)
