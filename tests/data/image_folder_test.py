import shutil

import jax
import numpy as np
import pytest
from absl import logging
from PIL import Image

from experiments.recorded_tasks import load_other_source
from meta_jax.data import image_pool
from meta_jax.data.dataset import DataError, class_examples
from meta_jax.data.image_folder import load_image_folder
from meta_jax.data.source import EpisodeSize, image_preprocessing, load_source


def _save(path, value, size=(6, 6), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


@pytest.fixture
def folder(tmp_path):
    """Five classes; class ci has i + 1 images, image j of value 20 i + j."""
    for i in range(5):
        for j in range(i + 1):
            _save(tmp_path / f"c{i}" / f"{j}.png", 20 * i + j, size=(3 + i, 5))
    return tmp_path


def _images_by_class(splits):
    return {
        name: np.asarray(class_examples(dataset, row))
        for split, dataset in splits.datasets.items()
        for row, name in enumerate(splits.class_names[split])
    }


def test_every_class_is_in_one_split_with_its_images(folder):
    splits = load_image_folder(folder, image_size=4)
    assert sorted(splits.datasets) == ["test", "train", "val"]
    by_class = _images_by_class(splits)
    assert sum(len(names) for names in splits.class_names.values()) == 5
    for i in range(5):
        images = by_class[f"c{i}"]
        assert images.shape == (i + 1, 4, 4, 1)
        np.testing.assert_array_equal(images, np.broadcast_to(images[:, :1, :1], images.shape))
        np.testing.assert_array_equal(images[:, 0, 0, 0], 20 * i + np.arange(i + 1))
    assert sum(len(dataset.examples) for dataset in splits.datasets.values()) == 15


def test_split_follows_the_seed(folder):
    names = [dict(load_image_folder(folder, seed=seed).class_names) for seed in range(8)]
    assert names[3] == dict(load_image_folder(folder, seed=3).class_names)
    assert len({tuple(sorted(n["test"])) for n in names}) > 1


def test_the_source_passes_the_path_and_settings(folder):
    source = load_source(f"folder:{folder}", image_size=5, split_seed=3)
    assert source.config == {
        "name": f"folder:{folder}",
        "image_size": 5,
        "grey": None,
        "rotations": "none",
        "within_group": False,
        "least_ways": None,
        "least_shots": None,
        "augment": "none",
        "polarity": "as_is",
        "objective": "cross_entropy",
        "class_split": None,
        "split_seed": 3,
        "split_fractions": None,
        "allow_shared_classes": False,
        "cache": True,
        "placement": "device",
        "device_memory": None,
    }
    assert source.preprocessing == {
        "kind": "image",
        "image_size": 5,
        "channels": 1,
        "polarity": "as_is",
        "scaling": "0..1",
        "resample": "lanczos",
    }
    expected = load_image_folder(folder, image_size=5, seed=3).datasets["train"]
    # The smallest class has one image, which an episode never draws.
    data = source.tasks("train", EpisodeSize(2, 1, 1), train=True).data
    np.testing.assert_array_equal(data.examples, expected.examples)
    colour = load_source(f"folder:{folder}", grey=False)
    assert colour.preprocessing["channels"] == 3
    assert colour.tasks("train", EpisodeSize(2, 1, 1), train=True).data.examples.shape[-1] == 3


def test_a_split_that_is_not_asked_for_may_be_broken(folder):
    splits = load_image_folder(folder, image_size=4)
    name = splits.class_names["test"][0]
    (folder / name / "0.png").write_bytes(b"no image")
    (folder / splits.class_names["val"][0] / "0.png").unlink()
    again = load_image_folder(folder, image_size=4)
    np.testing.assert_array_equal(
        again.datasets["train"].examples, splits.datasets["train"].examples
    )
    with pytest.raises(DataError, match=r"0\.png does not decode"):
        again.datasets["test"]


def test_the_channels_are_those_of_all_splits_whichever_is_asked_for(folder):
    for name in load_image_folder(folder).class_names["test"]:
        _save(folder / name / "red.png", (200, 0, 0), mode="RGB")
    assert load_image_folder(folder).datasets["train"].examples.shape[-1] == 3


def test_some_of_the_splits_are_enough(tmp_path):
    for name in "abc":
        _save(tmp_path / "test" / name / "0.png", 7)
        _save(tmp_path / "test" / name / "1.png", 8)
    source = load_source(f"folder:{tmp_path}")
    assert source.splits == ("test",)
    assert source.tasks("test", EpisodeSize(3, 1, 1), train=False).data.counts.tolist() == [2] * 3
    with pytest.raises(DataError, match="no split 'train': choose one of test"):
        source.tasks("train", EpisodeSize(3, 1, 1), train=True)


def test_classes_may_be_called_as_splits_are(tmp_path):
    for name in ("train", "test", "bus"):
        _save(tmp_path / name / "0.png", 7)
    names = load_image_folder(tmp_path).class_names.values()
    assert sorted(sum(names, ())) == ["bus", "test", "train"]


def test_one_colour_image_makes_the_set_colour(folder):
    _save(folder / "c0" / "red.PNG", (200, 0, 0), mode="RGB")
    by_class = _images_by_class(load_image_folder(folder, image_size=4))
    np.testing.assert_array_equal(by_class["c0"][:, 0, 0], [[0, 0, 0], [200, 0, 0]])
    np.testing.assert_array_equal(by_class["c1"][:, 0, 0], [[20, 20, 20], [21, 21, 21]])
    by_class = _images_by_class(load_image_folder(folder, image_size=4, grey=True))
    np.testing.assert_array_equal(by_class["c0"][:, 0, 0, 0], [0, 60])


def test_every_extension_is_read_in_either_case(folder):
    for extension in ("jpg", "JPEG", "bmp", "gif", "WebP", "tif", "TIFF"):
        _save(folder / "c0" / f"x.{extension}", 128)
    images = _images_by_class(load_image_folder(folder))["c0"]
    assert images.shape[-1] == 1
    np.testing.assert_allclose(images[1:, 0, 0, 0], 128, atol=1)
    assert len(images) == 8


def test_stray_files_are_left_out_with_one_warning_and_hidden_ones_without(folder, monkeypatch):
    expected = _images_by_class(load_image_folder(folder))
    (folder / "README.txt").write_text("stray")
    (folder / ".hidden").write_text("hidden")
    (folder / ".git").mkdir()
    (folder / "c1" / "notes.txt").write_text("stray")
    (folder / "c1" / ".DS_Store").write_text("hidden")
    _save(folder / "c2" / "old" / "deep" / "1.png", 3)
    _save(folder / "alone.png", 3)
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
    found = _images_by_class(load_image_folder(folder))
    assert found.keys() == expected.keys()
    for name, images in expected.items():
        np.testing.assert_array_equal(found[name], images)
    assert warnings == [
        f"4 of the 19 files in {folder} are left out, because they are no images or lie outside "
        "the class folders: alone.png, README.txt, c1/notes.txt, ..."
    ]


def test_notes_tell_at_the_start_and_later_what_is_left_out_and_never_drawn(folder, monkeypatch):
    (folder / "c4" / "notes.txt").write_text("stray")
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
    source = load_source(f"folder:{folder}", split_fractions="0.6,0.2,0.2", split_seed=1)
    assert len(warnings) == 1
    source.tasks("train", EpisodeSize(1, 2, 2), train=True)
    source.tasks("train", EpisodeSize(1, 2, 2), train=False)
    train = load_image_folder(folder, seed=1, fractions=(0.6, 0.2, 0.2)).class_names["train"]
    small = [name for name in train if name < "c3"]
    assert len(small) == 2
    assert warnings[1] == (
        "2 of the 3 classes of split train have fewer than 4 examples (shots + queries) and are "
        f"never drawn: {', '.join(small)}"
    )
    assert list(source.notes) == warnings[:2]


@pytest.mark.parametrize("n_classes", [3, 6, 9, 12, 15])
def test_few_classes_can_be_trained_and_tested(tmp_path, n_classes):
    for i in range(n_classes):
        for j in range(2):
            _save(tmp_path / f"c{i}" / f"{j}.png", i)
    source = load_source(f"folder:{tmp_path}", image_size=2)
    ways = n_classes // 3
    for split in source.splits:
        source.tasks(split, EpisodeSize(ways, 1, 1), train=False)
    with pytest.raises(DataError) as error:
        source.tasks("val", EpisodeSize(ways + 1, 1, 1), train=False)
    message = str(error.value)
    assert f"{ways + 1} ways are more than the {ways} classes of split val" in message
    assert ("set ways=" in message) == (ways > 1)
    assert f"{n_classes} classes were split at random into {n_classes - 2 * ways} train" in message
    assert "split_fractions=" in message
    assert "\n" not in message


def test_fractions_of_the_random_split_can_be_given(tmp_path):
    for i in range(12):
        for j in range(2):
            _save(tmp_path / f"c{i}" / f"{j}.png", i)
    source = load_source(f"folder:{tmp_path}", split_fractions="0.5,0.08,0.42", image_size=2)
    with pytest.raises(DataError, match=r"into 6 train, 1 val, 5 test"):
        source.tasks("test", EpisodeSize(6, 1, 1), train=False)
    with pytest.raises(DataError, match="'half' are not three numbers"):
        load_source(f"folder:{tmp_path}", split_fractions="half")


def test_folders_named_as_splits_are_the_splits(tmp_path):
    for split, classes in {"train": "abc", "val": "de", "test": "z"}.items():
        for name in classes:
            _save(tmp_path / split / name / "0.png", ord(name))
    splits = load_image_folder(tmp_path, seed=5)
    assert dict(splits.class_names) == {"train": ("a", "b", "c"), "val": ("d", "e"), "test": ("z",)}
    np.testing.assert_array_equal(splits.datasets["val"].examples[:, 0, 0, 0], [100, 101])
    shutil.rmtree(tmp_path / "val" / "d")
    shutil.rmtree(tmp_path / "val" / "e")
    splits = load_image_folder(tmp_path)
    assert splits.class_names["test"] == ("z",)
    with pytest.raises(DataError, match="val has no class folders"):
        splits.datasets["val"]


def test_a_class_in_two_splits_is_refused_unless_it_is_allowed(tmp_path):
    for split, classes in {"train": "abc", "test": "bcd"}.items():
        for name in classes:
            _save(tmp_path / split / name / "0.png", ord(name))
    with pytest.raises(DataError, match=r"2 classes of .* are in train and in test: b, c.*allow_"):
        load_source(f"folder:{tmp_path}")
    source = load_source(f"folder:{tmp_path}", allow_shared_classes=True)
    assert source.splits == ("train", "test")


def test_classes_of_all_splits_are_put_together_for_a_list(tmp_path):
    _save(tmp_path / "train" / "cat" / "0.png", 1)
    _save(tmp_path / "test" / "cat" / "0.png", 2)
    for name in ("dog", "Sea Cow", "bus"):
        _save(tmp_path / "train" / name / "0.png", 3)
    lists = tmp_path / "lists.csv"
    lists.write_text("split,class\ntraining,cat\nnovel,sea_cow\nval,dog\n")
    splits = load_image_folder(tmp_path, class_split=str(lists))
    assert dict(splits.class_names) == {"train": ("cat",), "val": ("dog",), "test": ("Sea Cow",)}
    np.testing.assert_array_equal(splits.datasets["train"].examples[:, 0, 0, 0], [1, 2])


def test_groups_are_the_folders_above_the_classes(tmp_path):
    for i, name in enumerate(["Greek/alpha", "Greek/beta", "Latin/a", "Latin/b"]):
        for j in range(2):
            _save(tmp_path / name / f"{j}.png", 10 * i)
    source = load_source(f"folder:{tmp_path}", within_group=True, split_fractions="0.5,0.25,0.25")
    with pytest.raises(DataError, match="largest group of split test"):
        source.tasks("test", EpisodeSize(2, 1, 1), train=False)
    splits = load_image_folder(tmp_path)
    assert {group for groups in splits.group_names.values() for group in groups} == {
        "Greek",
        "Latin",
    }
    assert _images_by_class(splits)["Latin/b"][0, 0, 0, 0] == 30


def test_decoded_images_are_kept_and_redone_when_a_file_changes(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("META_JAX_CACHE", str(tmp_path / ".kept"))
    first = _images_by_class(load_image_folder(folder, image_size=4, cache=True))

    def no_decoding(*args):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr(image_pool, "decode_images", no_decoding)
        patch.setattr(image_pool, "any_colour", no_decoding)
        again = _images_by_class(load_image_folder(folder, image_size=4, cache=True))
        with pytest.raises(AssertionError, match="decoded again"):
            dict(load_image_folder(folder, image_size=5, cache=True).datasets)
    assert first.keys() == again.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    _save(folder / "c1" / "0.png", 251, size=(5, 5))
    changed = _images_by_class(load_image_folder(folder, image_size=4, cache=True))
    assert changed["c1"][0, 0, 0, 0] == 251


def test_one_large_class_takes_no_more_memory_than_its_images(tmp_path):
    for i in range(6):
        _save(tmp_path / f"small{i}" / "0.png", i)
    for j in range(300):
        _save(tmp_path / "large" / f"{j}.png", 9)
    datasets = load_image_folder(tmp_path, image_size=8).datasets.values()
    total = sum(leaf.nbytes for data in datasets for leaf in jax.tree.leaves(data))
    assert total <= 1.3 * 306 * 8 * 8


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist: correct folder:PATH"):
        load_image_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("n_classes", [0, 1, 2])
def test_too_few_classes_are_refused(tmp_path, n_classes):
    for i in range(n_classes):
        _save(tmp_path / f"c{i}" / "0.png", 1)
    with pytest.raises(DataError, match=f"{n_classes} class folder"):
        load_image_folder(tmp_path)


def test_empty_class_is_named(folder):
    (folder / "c9").mkdir()
    with pytest.raises(DataError, match="c9 has no images"):
        dict(load_image_folder(folder).datasets)


@pytest.mark.parametrize("broken", ["truncated", "not an image", "empty"])
def test_image_that_does_not_decode_is_named(folder, broken):
    path = folder / "c2" / "1.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40), np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[:300], "not an image": b"x" * 99, "empty": b""}[broken])
    with pytest.raises(DataError, match=r"c2/1\.png does not decode.*replace it") as error:
        dict(load_image_folder(folder).datasets)
    assert "\n" not in str(error.value)


def test_image_size_must_be_positive(folder):
    with pytest.raises(DataError, match="image_size"):
        load_image_folder(folder, image_size=0)


def test_dark_ink_on_light_paper_meets_weights_trained_on_light_ink(tmp_path):
    for name in "abcdef":
        (tmp_path / name).mkdir()
        for i in range(2):
            pixels = np.full((8, 8), 240, np.uint8)
            pixels[2:5, 3 + i] = 10
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    recorded = {
        "name": "omniglot",
        "preprocessing": image_preprocessing(8, 1, polarity="ink_light", resample="lanczos"),
    }
    source = load_other_source(recorded, f"folder:{tmp_path}", {"cache": False}, None)
    examples = np.asarray(source.tasks("test", EpisodeSize(2, 1, 1), train=False).data.examples)
    assert examples[:, 0].max() == 15
    assert examples[:, 3].max() == 245
    assert source.preprocessing == recorded["preprocessing"]
