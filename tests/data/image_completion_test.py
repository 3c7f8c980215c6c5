"""Images as tasks of regression: pixels to be predicted from other pixels."""

import jax
import numpy as np
import pytest

from meta_jax.data.dataset import dataset_from_classes
from meta_jax.data.image_completion import image_completion, places
from meta_jax.data.source import EpisodeSize, load_source, source_from_splits
from meta_jax.lookup import UsageError
from meta_jax.objectives import Gaussian
from meta_jax.training.pictures import _as_image, episode_picture

HEIGHT, WIDTH = 4, 5


def pictures(*, image_size: int = 4):
    """A source of three coloured images [4, 5, 3].

    Args:
      image_size: Not used.
    """
    del image_size
    images = np.random.default_rng(0).integers(0, 256, (3, 2, HEIGHT, WIDTH, 3), np.uint8)
    return source_from_splits({"train": dataset_from_classes(list(images))})


PICTURES = f"{__name__}:pictures"


def test_places_are_rows_and_columns():
    found = np.asarray(places(3, 2))
    expected = [[-1, -1], [-1, 1], [0, -1], [0, 1], [1, -1], [1, 1]]
    np.testing.assert_array_equal(found, expected)


def test_an_episode_is_one_image_without_a_pixel_twice():
    tasks = image_completion(images=PICTURES).tasks("train", EpisodeSize(1, 6, 9), train=True)
    episode = jax.jit(tasks.sample)(jax.random.key(0), tasks.data)
    support, query = episode
    assert support.y.shape == (6, 3)
    assert query.y.shape == (9, 3)
    assert 3 <= support.mask.sum() <= 6
    seen = np.concatenate([support.x, query.x])
    assert len(np.unique(seen, axis=0)) == 15
    # All of them are pixels of one and the same image, at their places.
    grid = np.asarray(places(HEIGHT, WIDTH))
    at = [int(np.flatnonzero((grid == x).all(1))[0]) for x in seen]
    images = np.asarray(tasks.data.examples).reshape(-1, HEIGHT * WIDTH, 3)[:, at] / 255
    colours = np.concatenate([support.y, query.y])
    assert (abs(images - colours).max((1, 2)) < 1e-6).sum() == 1


def test_a_test_asks_for_every_pixel_in_its_place():
    tasks = image_completion(images=PICTURES).tasks("train", EpisodeSize(1, 6, 2), train=False)
    support, query = jax.jit(tasks.sample)(jax.random.key(1), tasks.data)
    np.testing.assert_array_equal(query.x, places(HEIGHT, WIDTH))
    image = np.asarray(query.y).reshape(HEIGHT, WIDTH, 3)
    drawn = [np.linspace(-1, 1, n) for n in (HEIGHT, WIDTH)]
    np.testing.assert_allclose(_as_image(np.asarray(query.x), np.asarray(query.y), drawn), image)
    known = _as_image(np.asarray(support.x), np.asarray(support.y), drawn)
    assert (abs(known - image).max(-1) == 0).sum() == 6


def test_mistakes_are_refused():
    with pytest.raises(UsageError, match="together are 21, and an image has 20 pixels"):
        image_completion(images=PICTURES).tasks("train", EpisodeSize(1, 6, 15), train=True)
    with pytest.raises(UsageError, match="'sinusoid' have no images"):
        image_completion(images="sinusoid")
    with pytest.raises(UsageError, match="have no data_dir: leave it out"):
        image_completion(images="glyphs", data_dir="here")
    with pytest.raises(UsageError, match="least_shots=0"):
        image_completion(least_shots=0)


def test_the_source_is_found_by_its_name_and_takes_the_splits_of_the_images():
    source = load_source("image_completion", image_size=14)
    assert source.splits == ("train", "val", "test")
    assert source.config["images"] == "glyphs"


def test_a_completed_image_is_drawn(tmp_path):
    tasks = image_completion(images=PICTURES).tasks("train", EpisodeSize(1, 6, 2), train=False)
    episode = tasks.sample(jax.random.key(1), tasks.data)
    answer = Gaussian(episode.query.y, 0.1 + episode.query.y)
    for predictions in (None, episode.query.y, answer):
        path = tmp_path / "episode.png"
        episode_picture(episode, predictions, path)
        assert path.stat().st_size > 1000
        path.unlink()
