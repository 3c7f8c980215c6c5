import io

import numpy as np
import pytest
from PIL import Image

from meta_jax.data import image_pool
from meta_jax.data.dataset import DataError, HostDataset, Storage
from meta_jax.data.decoding import Encoded
from meta_jax.data.image_pool import ImageClass, ImagePool, any_colour


def _image(value, mode="L"):
    file = io.BytesIO()
    Image.new(mode, (4, 4), value).save(file, "PNG")
    return Encoded(file.getvalue(), f"{value}")


def _pool(train, test, **settings):
    return ImagePool(
        {"train": [ImageClass("a", "g", train)], "test": [ImageClass("b", "g", test)]},
        2,
        **settings,
    )


@pytest.fixture
def decoded(monkeypatch):
    """The numbers of images that were decoded at a time, and with how many channels."""
    calls = []
    decode = image_pool.decode_images

    def noted(images, image_size, channels):
        calls.append((len(images), channels))
        return decode(images, image_size, channels)

    monkeypatch.setattr(image_pool, "decode_images", noted)
    return calls


def test_a_set_with_colours_is_decoded_once(decoded):
    pool = _pool([_image((9, 0, 0), "RGB")] * 3, [_image(5)] * 2)
    assert pool.channels == 3
    splits = pool.splits()
    assert {split: data.examples.shape for split, data in splits.datasets.items()} == {
        "train": (3, 2, 2, 3),
        "test": (2, 2, 2, 3),
    }
    assert decoded == [(3, 3), (2, 3)]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_set_without_colours_is_decoded_once(decoded, mode):
    value = 7 if mode == "L" else (7, 7, 7)
    pool = _pool([_image(value, mode)] * 3, [_image(value, mode)] * 2)
    assert pool.channels == 1
    assert pool.splits().datasets["train"].examples.shape == (3, 2, 2, 1)
    assert pool.splits().datasets["test"].examples[0, 0, 0, 0] == 7
    assert sorted(decoded) == [(2, 1), (3, 1)]


def test_a_lone_colour_that_the_first_look_misses_is_found(decoded, monkeypatch):
    monkeypatch.setattr(image_pool, "_PROBES", 2)
    test = [_image(5), _image((200, 0, 0), "RGB"), _image(5)]
    pool = _pool([_image(7)] * 3, test)
    assert pool.channels == 3
    np.testing.assert_array_equal(pool.splits().datasets["test"].examples[1, 0, 0], [200, 0, 0])
    np.testing.assert_array_equal(pool.splits().datasets["train"].examples[0, 0, 0], [7, 7, 7])


def test_images_that_do_not_decode_count_for_the_split_that_asks_for_them():
    pool = _pool([_image(7)], [Encoded(b"x", "cats/1.png")])
    assert pool.channels == 1
    splits = pool.splits()
    assert splits.datasets["train"].examples.shape == (1, 2, 2, 1)
    with pytest.raises(DataError, match=r"cats/1\.png does not decode"):
        splits.datasets["test"]


def test_the_channels_are_those_that_were_asked_for(decoded):
    assert _pool([_image((9, 0, 0), "RGB")], [_image(5)], grey=True).channels == 1
    assert _pool([_image(5)], [_image(5)], grey=False).channels == 3
    assert decoded == []


def test_any_colour_passes_over_what_does_not_decode():
    grey = [
        _image(70),
        _image((70, 70, 70), "RGB"),
        _image((9, 0, 0, 0), "RGBA"),  # invisible
        Encoded(b"", "nothing"),
        Encoded(_image((200, 0, 0), "RGB").source[:50], "truncated"),
    ]
    assert not any_colour(grey, 4)
    assert any_colour([*grey, _image((200, 0, 0), "RGB")], 4)


def test_on_the_host_a_kept_split_is_mapped_and_another_is_not():
    images = [_image(value) for value in (3, 4)]
    for identity, is_mapped in ((lambda split: "pool on the host", True), (None, False)):
        for _ in range(2):  # decoded, and read back
            pool = _pool(images, images, identity=identity, storage=Storage("host"))
            dataset = pool.splits().datasets["train"]
            assert isinstance(dataset, HostDataset)
            assert isinstance(dataset.examples.base, np.memmap) == is_mapped
            np.testing.assert_array_equal(dataset.examples[:, 0, 0, 0], [3, 4])
