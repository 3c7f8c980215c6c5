import functools
import unicodedata
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageFont

from meta_jax.data import glyphs
from meta_jax.data.dataset import DataError
from meta_jax.data.glyphs import SCRIPTS, load_glyphs
from meta_jax.data.source import EpisodeSize, load_source


@pytest.fixture(scope="module", autouse=True)
def letters_are_drawn_once():
    """Before they are distorted, the letters are the same in all tests; to draw them takes long."""
    with pytest.MonkeyPatch.context() as patch:
        once = functools.cache(glyphs._drawings_and_members)
        patch.setattr(glyphs, "_drawings_and_members", once)
        yield


@pytest.fixture(scope="module")
def splits():
    return load_glyphs()


def _nothing_is_drawn():
    raise AssertionError("there is a copy")


def _nearest_neighbour_accuracy(dataset, episodes=1000, ways=5):
    """5-way 1-shot accuracy of the nearest neighbour in raw pixels, one query for each class."""
    rng = np.random.default_rng(0)
    pixels = np.asarray(dataset.examples, np.float32).reshape(dataset.counts.size, 20, -1)
    right = []
    for _ in range(episodes):
        classes = rng.choice(len(pixels), ways, replace=False)
        shown = np.array([rng.choice(pixels.shape[1], 2, replace=False) for _ in classes])
        support, query = pixels[classes, shown[:, 0]], pixels[classes, shown[:, 1]]
        distances = ((query[:, None] - support) ** 2).sum(-1)
        right.append(distances.argmin(1) == np.arange(ways))
    return np.mean(right)


def test_sizes_and_types(splits):
    assert len(splits.class_names["train"]) >= 400
    assert len(splits.class_names["val"]) >= 40
    assert len(splits.class_names["test"]) >= 60
    for split, dataset in splits.datasets.items():
        n = len(splits.class_names[split])
        assert dataset.examples.shape == (n * 20, 28, 28, 1)
        assert dataset.examples.dtype == np.uint8
        np.testing.assert_array_equal(dataset.counts, [20] * n)


def test_ink_is_255_on_0_and_no_image_is_empty(splits):
    for dataset in splits.datasets.values():
        images = np.asarray(dataset.examples)
        assert images.max() == 255
        assert np.median(images) == 0
        assert images.max(axis=(1, 2, 3)).min() > 100


def test_scripts_are_the_groups_and_belong_to_one_split(splits):
    for split, dataset in splits.datasets.items():
        scripts = splits.group_names[split]
        assert set(scripts) == set(SCRIPTS[split])
        assert set(np.asarray(dataset.groups).tolist()) == set(range(len(scripts)))
        for name, group in zip(splits.class_names[split], np.asarray(dataset.groups), strict=True):
            assert name.startswith(scripts[group] + " ")


def _undistorted(letters, face):
    """The letters a face has, and their bitmaps without size and position, of unit length."""
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVu{face}.ttf")
    font = ImageFont.truetype(path, 48)
    covered = matplotlib.ft2font.FT2Font(str(path)).get_charmap()
    rows, bitmaps = [], []
    for row, letter in enumerate(letters):
        if ord(letter) in covered:
            mask = font.getmask(letter, mode="L")
            drawing = Image.frombytes("L", mask.size, bytes(mask))
            drawing = drawing.crop(drawing.getbbox())
            scale = 24 / max(drawing.size)
            drawing = drawing.resize([max(1, round(side * scale)) for side in drawing.size])
            square = np.zeros((24, 24), np.float32)
            y, x = ((24 - side) // 2 for side in (drawing.height, drawing.width))
            square[y : y + drawing.height, x : x + drawing.width] = drawing
            rows.append(row)
            bitmaps.append(square.ravel() / np.linalg.norm(square))
    return np.array(rows), np.array(bitmaps)


@pytest.mark.parametrize("face", ["Sans", "Sans-BoldOblique", "SansMono", "Serif", "Serif-Italic"])
def test_no_shape_is_there_twice(splits, face):
    names = [name for split in splits.class_names.values() for name in split]
    assert len(set(names)) == len(names)
    rows, bitmaps = _undistorted([unicodedata.lookup(name) for name in names], face)
    similarity = bitmaps @ bitmaps.T
    np.fill_diagonal(similarity, 0)
    alike = [(names[rows[i]], names[rows[j]]) for i, j in np.argwhere(similarity > 0.95)]
    assert not alike


@pytest.mark.parametrize(
    "lookalikes",
    [
        ("LATIN CAPITAL LETTER A", "GREEK CAPITAL LETTER ALPHA", "CYRILLIC CAPITAL LETTER A"),
        ("LATIN CAPITAL LETTER O", "ARMENIAN CAPITAL LETTER OH", "CYRILLIC SMALL LETTER O"),
        ("LATIN SMALL LETTER S", "LATIN CAPITAL LETTER S", "CYRILLIC SMALL LETTER DZE"),
        ("LATIN SMALL LETTER N", "ARMENIAN SMALL LETTER VO"),
    ],
)
def test_lookalikes_are_at_most_one_class(splits, lookalikes):
    names = {name for split in splits.class_names.values() for name in split}
    assert all(unicodedata.lookup(name) for name in lookalikes)
    assert len(names & set(lookalikes)) <= 1


def test_letters_composed_of_others_are_left_out(splits):
    for names in splits.class_names.values():
        for name in names:
            assert not unicodedata.decomposition(unicodedata.lookup(name))


def test_pixels_alone_do_not_solve_the_task(splits):
    assert 0.3 < _nearest_neighbour_accuracy(splits.datasets["test"]) < 0.8


def test_the_distortion_is_what_makes_the_task_hard(splits, monkeypatch):
    monkeypatch.setattr(glyphs, "ROTATION", 0.0)
    monkeypatch.setattr(glyphs, "SHEAR", 0.0)
    monkeypatch.setattr(glyphs, "SCALE", (1.0, 1.0))
    monkeypatch.setattr(glyphs, "SHIFT", 0.0)
    plain = load_glyphs().datasets["test"]
    distorted = _nearest_neighbour_accuracy(splits.datasets["test"])
    assert _nearest_neighbour_accuracy(plain) > distorted + 0.2


def test_seed_gives_the_distortions_and_not_the_classes(splits, tmp_path, monkeypatch):
    def draw(seed, folder):
        monkeypatch.setenv("META_JAX_CACHE", str(tmp_path / folder))  # nothing is there
        drawn = load_glyphs(image_size=14, examples=2, seed=seed)
        for split in drawn.datasets:
            assert drawn.class_names[split] == splits.class_names[split]
        return [np.asarray(dataset.examples) for dataset in drawn.datasets.values()]

    every = zip(draw(0, "first"), draw(0, "again"), draw(1, "other"), strict=True)
    for first, again, other in every:
        assert first.shape[1:] == (14, 14, 1)
        np.testing.assert_array_equal(first, again)
        assert (first != other).any(axis=(1, 2, 3)).all()


def test_glyphs_are_drawn_once_and_again_where_the_copy_is_damaged(monkeypatch, tmp_path):
    monkeypatch.setenv("META_JAX_CACHE", str(tmp_path))
    first = load_glyphs(image_size=7, examples=1)
    expected = np.asarray(first.datasets["val"].examples)
    load_glyphs(image_size=7, examples=1).datasets["val"]  # which waits until all is written
    with monkeypatch.context() as patch:
        patch.setattr(glyphs, "_drawings_and_members", _nothing_is_drawn)
        again = load_glyphs(image_size=7, examples=1)
        np.testing.assert_array_equal(again.datasets["val"].examples, expected)
        assert again.class_names["val"] == first.class_names["val"]
        for others in ({"seed": 1}, {"examples": 2}, {"image_size": 8}):
            settings = {"image_size": 7, "examples": 1, **others}
            with pytest.raises(AssertionError, match="there is a copy"):
                load_glyphs(**settings).datasets["val"]
    for path in tmp_path.iterdir():
        content = bytearray(path.read_bytes())
        content[-40] ^= 255
        path.write_bytes(content)
    redrawn = load_glyphs(image_size=7, examples=1)
    np.testing.assert_array_equal(redrawn.datasets["val"].examples, expected)
    assert redrawn.class_names["val"] == first.class_names["val"]


@pytest.mark.parametrize(
    ("settings", "message"), [({"examples": 0}, "at least 1 example"), ({"image_size": 0}, "pixel")]
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        load_glyphs(**settings)


def test_missing_font_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    splits = load_glyphs()
    with pytest.raises(DataError, match=r"DejaVuSans\.ttf is missing: install matplotlib"):
        splits.datasets["test"]


def test_the_source_passes_its_settings(splits):
    source = load_source("glyphs", image_size=14, examples=3, distortion_seed=5)
    assert source.splits == ("train", "val", "test")
    assert source.baselines == ("nearest_neighbour",)
    assert source.preprocessing["image_size"] == 14
    assert source.preprocessing["polarity"] == "ink_light"
    data = source.tasks("val", EpisodeSize(5, 1, 2), train=False).data
    expected = load_glyphs(image_size=14, examples=3, seed=5).datasets["val"]
    np.testing.assert_array_equal(data.examples, expected.examples)
    assert len(source.config) == 13
    assert source.config["distortion_seed"] == 5
