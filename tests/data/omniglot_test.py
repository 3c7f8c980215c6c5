import hashlib
import importlib.resources
import io
import json
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from meta_jax.data import omniglot
from meta_jax.data.dataset import DataError, class_examples
from meta_jax.data.omniglot import load_omniglot
from meta_jax.data.source import EpisodeSize, load_source


@pytest.fixture(scope="module")
def vinyals(omniglot_zips):
    return load_omniglot(omniglot_zips)


@pytest.fixture(scope="module")
def lake(omniglot_tfds):
    """Found through the environment, without --data_dir, as a user of TFDS would expect."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(omniglot_tfds))
        return load_omniglot(split_rule="lake")


# --- The real data --------------------------------------------------------------------------------


def test_vinyals_split_has_the_published_sizes(vinyals):
    shapes = {split: dataset.examples.shape for split, dataset in vinyals.datasets.items()}
    assert shapes == {
        "train": (1028 * 20, 28, 28, 1),
        "val": (172 * 20, 28, 28, 1),
        "trainval": (1200 * 20, 28, 28, 1),
        "test": (423 * 20, 28, 28, 1),
    }
    for dataset in vinyals.datasets.values():
        assert dataset.examples.dtype == np.uint8
        assert (np.asarray(dataset.counts) == 20).all()


def test_vinyals_split_is_the_published_list(vinyals, omniglot_zips):
    for split in ("train", "val", "test"):
        path = omniglot_zips / "splits_vinyals" / f"{split}.json"
        if not path.is_file():
            pytest.skip(f"the published list {path} is not there")
        published = sorted(
            f"{alphabet}/{character}"
            for alphabets in json.loads(path.read_text()).values()
            for alphabet, characters in alphabets.items()
            for character in characters
        )
        assert list(vinyals.class_names[split]) == published


def test_lake_split_is_background_and_evaluation(lake, omniglot_zips):
    sizes = {split: len(names) for split, names in lake.class_names.items()}
    assert sizes == {"train": 792, "val": 172, "trainval": 964, "test": 659}
    for split, set_name in (("trainval", "images_background"), ("test", "images_evaluation")):
        with zipfile.ZipFile(omniglot_zips / f"{set_name}.zip") as archive:
            folders = {n.rsplit("/", 1)[0] for n in archive.namelist() if n.endswith(".png")}
        assert list(lake.class_names[split]) == sorted(f.split("/", 1)[1] for f in folders)


@pytest.mark.parametrize("rule", ["vinyals", "lake"])
def test_splits_are_disjoint_sorted_and_trainval_is_their_union(rule, request):
    names = request.getfixturevalue(rule).class_names
    train, val, test = (set(names[split]) for split in ("train", "val", "test"))
    assert not (train & val) | (train & test) | (val & test)
    assert set(names["trainval"]) == train | val
    assert len(train | val | test) == 1623
    for split in names.values():
        assert list(split) == sorted(split)


@pytest.mark.parametrize(("number", "train"), [(1, 114), (2, 132)])
def test_minimal_background_sets_are_the_official_ones(omniglot_zips, number, train):
    path = omniglot_zips / f"images_background_small{number}.zip"
    if not path.is_file():
        pytest.skip(f"the official {path.name} is not there")
    splits = load_omniglot(omniglot_zips, split_rule=f"lake_small{number}", image_size=5)
    names = splits.class_names
    with zipfile.ZipFile(path) as archive:
        folders = {n.rsplit("/", 1)[0] for n in archive.namelist() if n.endswith(".png")}
    assert list(names["trainval"]) == sorted(f.split("/", 1)[1] for f in folders)
    assert len(names["train"]) == train
    assert sorted((*names["train"], *names["val"])) == list(names["trainval"])
    # A validation may be 20-way within an alphabet.
    data = splits.datasets["val"]
    assert np.unique(np.asarray(data.groups), return_counts=True)[1].max() >= 20


def test_groups_are_alphabets(vinyals):
    assert len({*vinyals.group_names["trainval"], *vinyals.group_names["test"]}) == 50
    for split, dataset in vinyals.datasets.items():
        alphabets = [vinyals.group_names[split][group] for group in np.asarray(dataset.groups)]
        assert alphabets == [name.rsplit("/", 1)[0] for name in vinyals.class_names[split]]


def test_zips_and_tfds_give_the_same_pixels_in_the_same_order(vinyals, lake):
    def by_name(splits):
        return {
            name: images
            for split in ("trainval", "test")
            for name, images in zip(
                splits.class_names[split],
                np.asarray(splits.datasets[split].examples).reshape(-1, 20, 28, 28, 1),
                strict=True,
            )
        }

    from_zips, from_tfds = by_name(vinyals), by_name(lake)
    assert from_zips.keys() == from_tfds.keys()
    for name, images in from_zips.items():
        np.testing.assert_array_equal(images, from_tfds[name])


def test_example_j_is_drawer_j_of_the_zip(vinyals, omniglot_zips):
    with zipfile.ZipFile(omniglot_zips / "images_background.zip") as archive:
        folder = "images_background/Braille/character01"
        for j in (0, 7, 19):
            drawing = Image.open(archive.open(f"{folder}/0192_{j + 1:02d}.png"))
            expected = 255 - np.asarray(drawing.convert("L").resize((28, 28), Image.LANCZOS))
            row = vinyals.class_names["train"].index("Braille/character01")
            drawings = class_examples(vinyals.datasets["train"], row)
            np.testing.assert_array_equal(drawings[j, :, :, 0], expected)


def test_ink_is_bright_on_dark(vinyals):
    images = np.asarray(vinyals.datasets["test"].examples)
    assert images.max() == 255
    # 8.05 % of the original pixels are ink.
    assert 0.07 < images.mean() / 255 < 0.09


# --- Made-up data, which needs no files -----------------------------------------------------------


_SIZES = {"images_background": 60, "images_evaluation": 250}
# What is decoded with these settings is kept for the other tests.
DECODED_ONCE = {"image_size": 35, "resample": "box"}


def _png(black_column):
    pixels = np.full((105, 105), 255, np.uint8)
    pixels[:, black_column] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(file, "PNG")
    return file.getvalue()


def _write_zip(path, set_name, *, leave_out=(), replace=None):
    """A zip like the official one, all of whose characters look alike: drawer d inks column d."""
    drawings = [_png(drawer) for drawer in range(1, 21)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"__MACOSX/{set_name}/._junk.png", b"junk")
        for i in range(_SIZES[set_name]):
            for drawer, png in enumerate(drawings, start=1):
                alphabet = f"{set_name[7:9]}{i // 40:02d}".replace("ba00", "Armenian")
                name = (
                    f"{set_name}/{alphabet}/character{i % 40 + 1:02d}/{i + 1:04d}_{drawer:02d}.png"
                )
                if name not in leave_out:
                    archive.writestr(name, (replace or {}).get(name, png))


@pytest.fixture(scope="module")
def made_up_zips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("omniglot")
    for set_name in _SIZES:
        _write_zip(folder / f"{set_name}.zip", set_name)
    return folder


@pytest.fixture
def made_up(made_up_zips, monkeypatch):
    """Zips of fewer characters than the official ones, which count as complete."""
    monkeypatch.setattr(omniglot, "_SETS", {name: (n, "") for name, n in _SIZES.items()})
    return made_up_zips


@pytest.fixture
def damaged(made_up, tmp_path):
    """The made-up evaluation zip; the test puts a background zip beside it."""
    shutil.copy(made_up / "images_evaluation.zip", tmp_path)
    return tmp_path


def _refused(message, *args, **settings):
    with pytest.raises(DataError, match=message) as error:
        dict(load_omniglot(*args, **settings).datasets)
    assert "\n" not in str(error.value)


def test_settings_reach_the_pixels(made_up):
    splits = load_omniglot(made_up, invert=False, **DECODED_ONCE)
    # Drawer 7 inks column 7 of 105: a third of column 2 at a third of the size.
    expected = np.where(np.arange(35) == 2, 170, 255) * np.ones((35, 1))
    np.testing.assert_array_equal(splits.datasets["test"].examples[6, :, :, 0], expected)


def test_the_source_passes_its_settings(made_up):
    source = load_source("omniglot", data_dir=made_up, image_size=7, split_rule="lake")
    assert source.splits == ("train", "val", "trainval", "test")
    assert source.config == {
        "name": "omniglot",
        "data_dir": str(made_up),
        "image_size": 7,
        "split_rule": "lake",
        "rotations": "none",
        "within_group": False,
        "least_ways": None,
        "least_shots": None,
        "augment": "none",
        "polarity": "ink_light",
        "objective": "cross_entropy",
        "placement": "device",
        "device_memory": None,
    }
    assert source.preprocessing["polarity"] == "ink_light"
    data = source.tasks("test", EpisodeSize(5, 1, 1), train=False).data
    assert data.examples.shape == (250 * 20, 7, 7, 1)


def test_a_set_that_the_split_does_not_need_may_be_missing(made_up, tmp_path):
    shutil.copy(made_up / "images_evaluation.zip", tmp_path)
    splits = load_omniglot(tmp_path, **DECODED_ONCE)
    assert len(splits.class_names["test"]) == 14
    with pytest.raises(DataError, match=r"has no images_background\.zip"):
        splits.datasets["val"]


@pytest.mark.parametrize("missing", ["nowhere", "empty", "one zip"])
def test_missing_data_is_refused(made_up, tmp_path, missing):
    if missing == "nowhere":
        _refused("does not exist: correct data_dir", tmp_path / "nowhere")
    elif missing == "empty":
        _refused("holds neither images_background.zip and images_evaluation.zip", tmp_path)
    else:
        shutil.copy(made_up / "images_background.zip", tmp_path)
        _refused("has no images_evaluation.zip: get it from https", tmp_path, **DECODED_ONCE)


@pytest.mark.parametrize("part", [0.0, 0.5, 0.999])
def test_truncated_zip_is_named(made_up, damaged, part):
    content = (made_up / "images_background.zip").read_bytes()
    (damaged / "images_background.zip").write_bytes(content[: int(part * len(content))])
    _refused(r"images_background\.zip is truncated or corrupt.*replace it", damaged)


def test_zip_with_overwritten_bytes_is_named(made_up, damaged):
    content = bytearray((made_up / "images_background.zip").read_bytes())
    content[5000:5100] = b"x" * 100
    (damaged / "images_background.zip").write_bytes(content)
    _refused(r"images_background\.zip is truncated or corrupt.*replace it", damaged)


def test_image_that_does_not_decode_is_named(damaged):
    name = "images_background/Armenian/character01/0001_03.png"
    _write_zip(damaged / "images_background.zip", "images_background", replace={name: _png(3)[:60]})
    _refused(f"images_background.zip/{name} does not decode", damaged)


def test_missing_image_is_named_by_its_character(damaged):
    name = "images_background/ba01/character02/0042_20.png"
    _write_zip(damaged / "images_background.zip", "images_background", leave_out=[name])
    _refused("19 images of ba01/character02, not 20: get it again", damaged)


def test_missing_character_is_counted(damaged):
    names = [f"images_background/ba01/character20/0060_{d:02d}.png" for d in range(1, 21)]
    _write_zip(damaged / "images_background.zip", "images_background", leave_out=names)
    _refused("has 59 characters, not 60", damaged)


def test_unknown_settings_are_refused(made_up):
    _refused(
        "split rule 'random' is none of vinyals, lake, lake_small1, lake_small2",
        made_up,
        split_rule="random",
    )
    _refused("resample 'cubic' is none of nearest", made_up, resample="cubic")
    _refused("image_size must be at least 1", made_up, image_size=0)


def test_tfds_records_out_of_order_are_refused(omniglot_tfds, tmp_path):
    source, copy = omniglot_tfds / "omniglot" / "3.0.0", tmp_path / "omniglot" / "3.0.0"
    shutil.copytree(source, copy)
    for file in copy.iterdir():
        file.chmod(0o644)
    swapped = copy / "omniglot-train.array_record-00000-of-00001"
    shutil.copy(copy / "omniglot-test.array_record-00000-of-00001", swapped)
    info = copy / "dataset_info.json"
    info.write_text(info.read_text().replace("19280", "13180"))
    _refused("split 'train' of .* is incomplete or out of TFDS's order", tmp_path)


# --- Without --data_dir ---------------------------------------------------------------------------


@pytest.fixture
def nothing_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no_tfds"))
    cache = tmp_path / "cache" / "omniglot"
    monkeypatch.setattr(omniglot, "_CACHE", str(cache))
    return cache


def _serve(monkeypatch, folder):
    """Downloads come from the folder, whose zips count as the official ones."""
    monkeypatch.setattr(omniglot, "_URL", folder.as_uri())
    sets = {}
    for name, n in _SIZES.items():
        path = folder / f"{name}.zip"
        sets[name] = (n, hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest())
    monkeypatch.setattr(omniglot, "_SETS", sets)


def test_download_is_kept_for_the_next_time(made_up, nothing_at_home, monkeypatch):
    _serve(monkeypatch, made_up)
    splits = load_omniglot(**DECODED_ONCE)
    assert not nothing_at_home.exists()
    assert len(splits.class_names["test"]) == 14
    assert [path.name for path in nothing_at_home.iterdir()] == ["images_evaluation.zip"]
    assert len(splits.class_names["trainval"]) == 296
    kept = {path.name: path.read_bytes() for path in nothing_at_home.iterdir()}
    assert kept == {path.name: path.read_bytes() for path in made_up.iterdir()}
    monkeypatch.setattr(omniglot, "_URL", "file:///nowhere")
    assert len(load_omniglot(**DECODED_ONCE).class_names["test"]) == 14


def test_download_with_the_wrong_checksum_is_not_kept(made_up, nothing_at_home, monkeypatch):
    _serve(monkeypatch, made_up)
    wrong = {name: (n, "0" * 64) for name, n in _SIZES.items()}
    monkeypatch.setattr(omniglot, "_SETS", wrong)
    _refused("wrong sha256: download .* by hand .* data_dir")
    assert not list(nothing_at_home.iterdir())


def test_no_network_is_explained(nothing_at_home, monkeypatch, tmp_path):
    _serve(monkeypatch, tmp_path)
    _refused("cannot be downloaded .*: download .* by hand .* data_dir")
    assert not list(nothing_at_home.iterdir())


def test_cache_that_cannot_be_written_is_explained(made_up, nothing_at_home, monkeypatch):
    _serve(monkeypatch, made_up)
    nothing_at_home.parent.parent.mkdir(exist_ok=True)
    nothing_at_home.parent.write_text("a file where the cache's folder should be")
    _refused("by hand .* data_dir")


def test_the_official_zips_are_the_registered_ones():
    assert {name: n for name, (n, _) in omniglot._SETS.items()} == {
        "images_background": 964,
        "images_evaluation": 659,
    }
    registered = importlib.resources.files("tensorflow_datasets") / "url_checksums/omniglot.txt"
    text = registered.read_text()
    for name, (_, sha256) in omniglot._SETS.items():
        assert any(f"{name}.zip" in line and sha256 in line for line in text.splitlines())
