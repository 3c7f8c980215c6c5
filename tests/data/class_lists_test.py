import json

import pytest

from meta_jax.data.class_lists import PUBLISHED, class_members, published_lists, read_lists
from meta_jax.data.dataset import DataError

_CIFAR_100 = {
    name
    for names in published_lists("cifar_fs").values()
    for name in (listed.name for listed in names)
}


@pytest.mark.parametrize(
    ("name", "counts"),
    [("miniimagenet", [64, 16, 20]), ("cifar_fs", [64, 16, 20]), ("fc100", [60, 20, 20])],
)
def test_published_lists_are_disjoint_and_of_the_published_sizes(name, counts):
    lists = published_lists(name)
    assert list(lists) == ["train", "val", "test"]
    assert [len(names) for names in lists.values()] == counts
    assert len({listed.name for names in lists.values() for listed in names}) == 100


def test_the_lists_of_cifar_100_have_the_same_classes():
    fc100 = {listed.name for names in published_lists("fc100").values() for listed in names}
    assert fc100 == _CIFAR_100


def test_wnids_are_well_formed():
    for names in published_lists("miniimagenet").values():
        for listed in names:
            assert len(listed.name) == 9
            assert listed.name[0] == "n"
            assert listed.name[1:].isdigit()


def test_names_match_without_case_spaces_and_dashes_and_others_are_left_out():
    names = [name.replace("_", " ").title() for name in sorted(_CIFAR_100)] + ["zebra"]
    members, groups = class_members("cifar_fs", names)
    assert {split: len(rows) for split, rows in members.items()} == {
        "train": 64,
        "val": 16,
        "test": 20,
    }
    assert "Sweet Pepper" in [names[row] for row in members["test"]]
    assert 100 not in [row for rows in members.values() for row in rows]
    assert groups == {}


def test_cub_is_split_by_the_place_in_alphabetical_order():
    names = [f"{i + 1:03d}.Bird" for i in reversed(range(200))]
    members, _ = class_members("cub", names)
    assert [len(rows) for rows in members.values()] == [100, 50, 50]
    assert sorted(names[row] for row in members["train"])[:2] == ["001.Bird", "003.Bird"]
    assert sorted(names[row] for row in members["val"])[:2] == ["002.Bird", "006.Bird"]
    assert sorted(names[row] for row in members["test"])[:2] == ["004.Bird", "008.Bird"]
    with pytest.raises(DataError, match="200 classes of CUB-200-2011, but there are 199"):
        class_members("cub", names[1:])


def test_listed_classes_that_are_missing_are_named():
    names = sorted(_CIFAR_100 - {"apple", "wolf"})
    with pytest.raises(DataError, match=r"lists 2 classes that are not there \(apple, wolf\)"):
        class_members("cifar_fs", names)


_NAMES = ["cat", "dog", "Sea Cow", "emu"]
_EXPECTED = {"train": [0, 2], "test": [1], "val": [3]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lists.csv", "class,split\ncat,train\nsea_cow,train\ndog,test\nemu,val\n"),
        ("lists.csv", "n,split,class\n1,base,cat\n2,base,sea cow\n3,novel,dog\n4,valid,emu\n"),
        ("lists.csv", "cat,train\nsea_cow,train\ndog,test\nemu,val\n"),
        ("lists.txt", "cat train\nsea cow\ttrain\n\ndog  test\nemu val"),
        ("lists.json", json.dumps({"base": ["cat", "seacow"], "val": ["emu"], "test": ["dog"]})),
        (
            "lists.json",
            json.dumps({"cat": "train", "Sea Cow": "train", "emu": "val", "dog": "test"}),
        ),
    ],
)
def test_one_file_of_lists(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    members, groups = class_members(str(tmp_path / name), _NAMES)
    assert {split: rows for split, rows in members.items() if rows} == _EXPECTED
    assert groups == {}


@pytest.mark.parametrize(
    ("suffix", "contents"),
    [
        ("txt", ["cat\nsea cow\n", "emu\n", "dog\n"]),
        ("json", ['["cat", "sea cow"]', '["emu"]', '["dog"]']),
        ("csv", ["cat\nsea cow\n", "class\nemu\n", "dog\n"]),
    ],
)
def test_one_file_for_each_split(tmp_path, suffix, contents):
    for split, content in zip(("train", "val", "novel"), contents, strict=True):
        (tmp_path / f"{split}.{suffix}").write_text(content)
    (tmp_path / "README.md").write_text("not a list")
    members, _ = class_members(str(tmp_path), _NAMES)
    assert {split: rows for split, rows in members.items() if rows} == _EXPECTED


def test_the_second_column_of_tieredimagenet_is_the_group(tmp_path):
    (tmp_path / "train.csv").write_text("n001,n900\nn002,n901\n")
    (tmp_path / "test.csv").write_text("n003,n900\n")
    members, groups = class_members(str(tmp_path), ["n003", "n002", "n001"])
    assert members == {"train": [1, 2], "test": [0]}
    assert groups == {0: "n900", 1: "n901", 2: "n900"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lists.csv", "cat,train\ndog,extra\n", "puts dog into split 'extra'"),
        ("lists.csv", "cat\n", "puts cat into split ''"),
        ("lists.json", "{", "is no readable list"),
        ("lists.json", "[1]", "is neither"),
        ("lists.txt", "", "lists no class"),
        ("lists.txt", "cat train\ncat test\n", "has cat in train and in test"),
        ("lists.txt", "cat train\nyak test\n", "not there"),
    ],
)
def test_lists_that_cannot_be_understood_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        class_members(str(tmp_path / name), _NAMES)
    assert "\n" not in str(error.value)


def test_an_unknown_list_is_refused_with_those_that_are_known():
    with pytest.raises(DataError, match=f"published list.*{', '.join(PUBLISHED)}.*file or folder"):
        read_lists("imagenet")


def test_classes_that_cannot_be_told_apart_are_refused():
    with pytest.raises(DataError, match="sea-cow and Sea Cow cannot be told apart"):
        class_members("cifar_fs", ["sea-cow", "Sea Cow"])
