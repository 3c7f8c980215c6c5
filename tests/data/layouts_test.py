import json
import os
import shutil

import pytest
from PIL import Image

from meta_jax.data.class_lists import published_lists
from meta_jax.data.dataset import DataError
from meta_jax.data.image_folder import load_image_folder
from meta_jax.data.layouts import UNDIVIDED, find_layout


@pytest.fixture(scope="session")
def pixel(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "image.png"
    Image.new("L", (2, 2), 9).save(path)
    return path


@pytest.fixture
def put(pixel, tmp_path):
    """Puts an image into the folder."""

    def put(name):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(pixel, tmp_path / name)

    return put


def _names(layout):
    return {split: [one.name for one in classes] for split, classes in layout.splits.items()}


def _sizes(splits):
    return [len(names) for names in splits.class_names.values()]


def test_class_folders(put, tmp_path):
    for name in ("b/1.png", "a/2.JPG", "a/1.tif", "ä c/é 1.webp"):
        put(name)
    layout = find_layout(tmp_path)
    assert _names(layout) == {UNDIVIDED: ["a", "b", "ä c"]}
    assert [path.name for path in layout.splits[UNDIVIDED][0].files] == ["1.tif", "2.JPG"]
    assert layout.left_out == []


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (["train", "val", "test"], ["train", "val", "test"]),
        (["Training", "validation"], ["train", "val"]),
        (["train", "valid", "test"], ["train", "val", "test"]),
        (["base", "val", "novel"], ["train", "val", "test"]),
        (["train", "test"], ["train", "test"]),
    ],
)
def test_split_folders_by_any_usual_name(put, tmp_path, folders, splits):
    for i, folder in enumerate(folders):
        put(f"{folder}/c{i}/1.png")
        put(f"{folder}/d{i}/1.png")
    assert _names(find_layout(tmp_path)) == {s: [f"c{i}", f"d{i}"] for i, s in enumerate(splits)}


def test_groups_with_and_without_splits(put, tmp_path):
    for name in ("Greek/a", "Greek/b", "Latin/a"):
        put(f"all/{name}/1.png")
        put(f"split/train/{name}/1.png")
    put("split/test/Old/x/1.png")
    (tmp_path / "all" / "Greek" / "info.txt").write_text("stray")
    layout = find_layout(tmp_path / "all")
    assert _names(layout) == {UNDIVIDED: ["Greek/a", "Greek/b", "Latin/a"]}
    assert [one.group for one in layout.splits[UNDIVIDED]] == ["Greek", "Greek", "Latin"]
    assert [path.name for path in layout.left_out] == ["info.txt"]
    layout = find_layout(tmp_path / "split")
    assert _names(layout) == {"train": ["Greek/a", "Greek/b", "Latin/a"], "test": ["Old/x"]}


def test_a_group_may_be_called_as_a_split(put, tmp_path):
    for name in ("base/a", "base/b", "Greek/a"):
        put(f"{name}/1.png")
    assert _names(find_layout(tmp_path)) == {UNDIVIDED: ["Greek/a", "base/a", "base/b"]}


def test_classes_beside_splits_are_refused_and_other_folders_left_out(put, tmp_path):
    for name in ("train/a", "test/b", "more/c"):
        put(f"{name}/1.png")
    with pytest.raises(DataError, match="split folders test and train, but more beside them"):
        find_layout(tmp_path)
    shutil.rmtree(tmp_path / "more")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("stray")
    assert [path.name for path in find_layout(tmp_path).left_out] == ["a.txt"]


def test_one_split_by_two_names_is_refused(put, tmp_path):
    for name in ("train/a", "val/b", "validation/c"):
        put(f"{name}/1.png")
    with pytest.raises(DataError, match=r"one split by two names \(train and val and validation"):
        find_layout(tmp_path)


def test_miniimagenet_as_published(put, tmp_path):
    for split, names in published_lists("miniimagenet").items():
        rows = []
        for listed in names:
            put(f"images/{listed.name}00000001.jpg")
            rows.append(f"{listed.name}00000001.jpg,{listed.name}")
        (tmp_path / f"{split}.csv").write_text("\n".join(["filename,label", *rows]) + "\n")
    put("images/n0000000000000001.jpg")
    splits = load_image_folder(tmp_path, image_size=2)
    assert _sizes(splits) == [64, 16, 20]
    assert splits.datasets["test"].counts.tolist() == [1] * 20
    layout = find_layout(tmp_path)
    assert [path.name for path in layout.left_out] == ["n0000000000000001.jpg"]
    (tmp_path / "images" / "n0153282900000001.jpg").unlink()
    with pytest.raises(DataError, match=r"train\.csv lists 1 of 64 .*/n0153282900000001\.jpg"):
        load_image_folder(tmp_path)


def test_csv_lists_may_name_images_in_class_folders(put, tmp_path):
    for name in ("a", "b"):
        put(f"images/{name}/1.png")
    (tmp_path / "train.csv").write_text("filename,class\n1.png,a\n")
    (tmp_path / "test.csv").write_text("filename,class\n1.png,b\n")
    assert _names(find_layout(tmp_path)) == {"train": ["a"], "test": ["b"]}


def test_miniimagenet_wnids_without_lists(put, tmp_path):
    wnids = [one.name for names in published_lists("miniimagenet").values() for one in names]
    for wnid in [*wnids, "n00000001"]:
        put(f"{wnid}/1.png")
    splits = load_image_folder(tmp_path, class_split="miniimagenet", image_size=2)
    assert _sizes(splits) == [64, 16, 20]


def test_json_lists_of_a_closer_look(put, tmp_path):
    label_names = ["a", "b", "c", "d"]
    for split, labels in {"base": [0, 2, 0], "val": [1], "novel": [3]}.items():
        names = []
        for i, label in enumerate(labels):
            put(f"pictures/{label_names[label]}/{i}.png")
            names.append(f"pictures/{label_names[label]}/{i}.png")
        if split == "val":
            names = [str(tmp_path / name) for name in names]
        content = {"label_names": label_names, "image_names": names, "image_labels": labels}
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    assert _names(find_layout(tmp_path)) == {"train": ["a", "c"], "val": ["b"], "test": ["d"]}
    (tmp_path / "pictures" / "d" / "0.png").unlink()
    with pytest.raises(DataError, match=r"novel\.json lists 1 of 1 images .*pictures/d/0\.png"):
        find_layout(tmp_path)
    content |= {"image_labels": [4]}
    (tmp_path / "novel.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="no indices of label_names"):
        find_layout(tmp_path)


def test_cub_200_2011(put, tmp_path):
    for i in range(200):
        put(f"images/{i + 1:03d}.Bird/Bird_{i}.jpg")
    for name in ("images.txt", "classes.txt"):
        (tmp_path / name).write_text("1 x\n")
    (tmp_path / "attributes").mkdir()
    splits = load_image_folder(tmp_path, class_split="cub", image_size=2)
    assert _sizes(splits) == [100, 50, 50]
    assert splits.class_names["val"][:2] == ("002.Bird", "006.Bird")
    layout = find_layout(tmp_path)
    assert layout.left_out == []
    assert {one.group for one in layout.splits[UNDIVIDED]} == {tmp_path.name}


def test_cifar_fs_with_its_lists(put, tmp_path):
    (tmp_path / "splits" / "bertinetto").mkdir(parents=True)
    (tmp_path / "splits" / "other").mkdir(parents=True)
    for split, names in published_lists("cifar_fs").items():
        for listed in names:
            put(f"data/{listed.name}/1.png")
        lines = "\n".join(listed.name for listed in names)
        (tmp_path / "splits" / "bertinetto" / f"{split}.txt").write_text(lines)
    assert _sizes(load_image_folder(tmp_path, image_size=2)) == [64, 16, 20]
    assert _sizes(load_image_folder(tmp_path, image_size=2, class_split="fc100")) == [60, 20, 20]
    shutil.rmtree(tmp_path / "data" / "wolf")
    with pytest.raises(DataError, match=r"lists 1 classes that are not there \(wolf\)"):
        load_image_folder(tmp_path)


def test_a_folder_that_cannot_be_read_is_named_and_a_link_that_leads_back_passed_over(
    put, tmp_path, monkeypatch
):
    put("a/1.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert find_layout(tmp_path).left_out == []

    def no_rights(folder):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", no_rights)
    with pytest.raises(
        DataError, match=r"cannot be read \(Permission denied\): correct its rights"
    ):
        find_layout(tmp_path)


def test_an_unknown_layout_is_described_with_those_that_are_known(put, tmp_path):
    put("1.png")
    put("2.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "labels.xml").write_text("")
    with pytest.raises(DataError) as error:
        find_layout(tmp_path)
    message = str(error.value)
    assert "found 2 images outside class folders and 1 other files (labels.xml) and 1" in message
    assert "Known are: CLASS/IMAGE; GROUP/CLASS/IMAGE" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a.png,cat\n", "begins with no line 'filename,label'"),
        ("filename,label\na.png\n", "line 2 of .* has no class"),
        ("filename,label\na.txt,cat\n", "do not end in"),
    ],
)
def test_csv_lists_that_cannot_be_understood_are_refused(tmp_path, content, message):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "train.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        find_layout(tmp_path)
