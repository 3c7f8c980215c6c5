"""Which classes are in which split: the field's published lists, and lists in files.

miniImageNet: Ravi and Larochelle, ICLR 2017. CIFAR-FS: Bertinetto et al., ICLR 2019. FC100:
Oreshkin et al., NeurIPS 2018; whole superclasses of CIFAR-100. CUB: Chen et al., "A Closer Look at
Few-shot Classification", ICLR 2019; a rule.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from meta_jax.data.dataset import DataError
from meta_jax.data.notes import some
from meta_jax.lookup import local_path

# The usual names of the splits, in folders, file names and columns.
SPLIT_NAMES = {
    "train": ("train", "training", "base"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "novel"),
}
_MINIIMAGENET = {
    "train": """
        n01532829 n01558993 n01704323 n01749939 n01770081 n01843383 n01910747 n02074367 n02089867
        n02091831 n02101006 n02105505 n02108089 n02108551 n02108915 n02111277 n02113712 n02120079
        n02165456 n02457408 n02606052 n02687172 n02747177 n02795169 n02823428 n02966193 n03017168
        n03047690 n03062245 n03207743 n03220513 n03337140 n03347037 n03400231 n03476684 n03527444
        n03676483 n03838899 n03854065 n03888605 n03908618 n03924679 n03998194 n04067472 n04243546
        n04251144 n04258138 n04275548 n04296562 n04389033 n04435653 n04443257 n04509417 n04515003
        n04596742 n04604644 n04612504 n06794110 n07584110 n07697537 n07747607 n09246464 n13054560
        n13133613""",
    "val": """
        n01855672 n02091244 n02114548 n02138441 n02174001 n02950826 n02971356 n02981792 n03075370
        n03417042 n03535780 n03584254 n03770439 n03773504 n03980874 n09256479""",
    "test": """
        n01930112 n01981276 n02099601 n02110063 n02110341 n02116738 n02129165 n02219486 n02443484
        n02871525 n03127925 n03146219 n03272010 n03544143 n03775546 n04146614 n04149813 n04418357
        n04522168 n07613480""",
}
_CIFAR_FS = {
    "train": """
        apple aquarium_fish bear bee bottle bowl boy bridge bus can castle caterpillar chair clock
        cloud cockroach couch cup dinosaur dolphin elephant forest girl hamster house kangaroo
        keyboard lawn_mower lion lizard lobster mountain mouse mushroom oak_tree orange orchid
        palm_tree pear pine_tree plate porcupine possum rabbit raccoon ray road seal shrew skunk
        skyscraper snake spider squirrel streetcar sunflower tank tiger train trout tulip turtle
        willow_tree wolf""",
    "val": """
        beaver beetle butterfly camel cattle crab crocodile flatfish lamp maple_tree motorcycle
        otter sea shark television tractor""",
    "test": """
        baby bed bicycle chimpanzee fox leopard man pickup_truck plain poppy rocket rose snail
        sweet_pepper table telephone wardrobe whale woman worm""",
}
# One superclass of CIFAR-100 a line.
_FC100 = {
    "train": """
        aquarium_fish flatfish ray shark trout
        orchid poppy rose sunflower tulip
        bottle bowl can cup plate
        apple mushroom orange pear sweet_pepper
        clock keyboard lamp telephone television
        bed chair couch table wardrobe
        bridge castle house road skyscraper
        cloud forest mountain plain sea
        crocodile dinosaur lizard snake turtle
        maple_tree oak_tree palm_tree pine_tree willow_tree
        bicycle bus motorcycle pickup_truck train
        lawn_mower rocket streetcar tank tractor""",
    "val": """
        bear leopard lion tiger wolf
        camel cattle chimpanzee elephant kangaroo
        crab lobster snail spider worm
        hamster mouse rabbit shrew squirrel""",
    "test": """
        beaver dolphin otter seal whale
        bee beetle butterfly caterpillar cockroach
        fox porcupine possum raccoon skunk
        baby boy girl man woman""",
}
_PUBLISHED = {"miniimagenet": _MINIIMAGENET, "cifar_fs": _CIFAR_FS, "fc100": _FC100}
_CUB_CLASSES = 200
_LIST_SUFFIXES = (".csv", ".txt", ".json")
PUBLISHED = (*_PUBLISHED, "cub")


class Listed(NamedTuple):
    """A class in a list."""

    name: str
    group: str | None = None  # its superclass, where the list has one


ClassLists = Mapping[str, Sequence[Listed]]  # by split


def split_of(name: str) -> str | None:
    """The split that a folder or file name stands for; None where it is none of the usual names.

    Examples:
      >>> split_of("Validation"), split_of("novel"), split_of("cats")
      ('val', 'test', None)
    """
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def class_members(
    class_split: str, class_names: Sequence[str]
) -> tuple[dict[str, list[int]], dict[int, str]]:
    """Finds the classes of a list among those that there are.

    Args:
      class_split: Name of a published list, one of `PUBLISHED`, or the path of one (`read_lists`).
      class_names: Names of the classes that there are; case, spaces, '_' and '-' do not count.

    Returns:
      By split, the indices of its classes, in the order of `class_names`; and by index, the group
      that the list gives a class.

    Raises:
      DataError: no such list, a listed class is not there or is listed in two splits, or two
        classes cannot be told apart.
    """
    if class_split == "cub":
        return _cub_members(class_names), {}
    lists = published_lists(class_split) or read_lists(class_split)
    rows = _rows_by_name(class_names)
    listed = {split: {_plain(one.name): one for one in ones} for split, ones in lists.items()}
    _check_listed_once(class_split, listed)
    missing = [
        one.name for ones in listed.values() for name, one in ones.items() if name not in rows
    ]
    if missing:
        raise DataError(
            f"class_split {class_split} lists {len(missing)} classes that are not there "
            f"({some(missing)}), only {len(class_names)} such as {some(class_names)}: add them, or "
            "name another list"
        )
    members = {split: sorted(rows[name] for name in ones) for split, ones in listed.items()}
    groups = {
        rows[name]: one.group for ones in listed.values() for name, one in ones.items() if one.group
    }
    return members, groups


def published_lists(name: str) -> ClassLists | None:
    """A published list by its name; None where it is no such name, or a rule (CUB)."""
    if name not in _PUBLISHED:
        return None
    return {split: [Listed(n) for n in names.split()] for split, names in _PUBLISHED[name].items()}


def read_lists(path: str) -> ClassLists:
    """Reads lists of classes from a file, or from a folder with one file for each split.

    Args:
      path: A CSV file with the columns class and split, a text file with a class and its split on
        each line, or a JSON file of {split: [class, ...]} or {class: split}. Or a folder of
        train, val and test (or another usual name) with the ending .csv (columns class and,
        perhaps, group, as tieredImageNet has them), .txt (a class on each line) or .json (a list).

    Raises:
      DataError: there is no such file, or it is no list of classes.
    """
    root = local_path(path)
    try:
        if root.is_dir():
            lists = {
                split: _read_list(file)
                for split, file in list_files(sorted(root.iterdir()), _LIST_SUFFIXES).items()
            }
        elif root.is_file():
            lists = _by_split(_read_pairs(root), root)
        else:
            raise DataError(
                f"class_split {path} is neither a published list ({', '.join(PUBLISHED)}) nor a "
                "file or folder: correct it"
            )
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no readable list of classes ({error}): correct it") from error
    if not any(lists.values()):
        raise DataError(f"{path} lists no class: give each a line, with its split")
    return {split: ones for split, ones in lists.items() if ones}


def list_files(files: Iterable[Path], suffixes: Sequence[str]) -> dict[str, Path]:
    """Finds the list of each split among files.

    Args:
      files: Files of a folder.
      suffixes: Endings of lists, such as '.csv'.

    Returns:
      The files by split, in the order of the splits.

    Raises:
      DataError: a split has two.
    """
    found: dict[str, Path] = {}
    for file in files:
        split = split_of(file.stem) if file.suffix.lower() in suffixes else None
        if split in found:
            raise DataError(
                f"{file.parent} has one split by two names ({found[split].name} and {file.name}): "
                "remove one"
            )
        if split:
            found[split] = file
    return {split: found[split] for split in SPLIT_NAMES if split in found}


def _cub_members(class_names: Sequence[str]) -> dict[str, list[int]]:
    if len(class_names) != _CUB_CLASSES:
        raise DataError(
            f"class_split cub is a rule for the {_CUB_CLASSES} classes of CUB-200-2011, but there "
            f"are {len(class_names)}: complete them, or name another list"
        )
    ordered = sorted(range(len(class_names)), key=lambda row: class_names[row])
    members: dict[str, list[int]] = {split: [] for split in SPLIT_NAMES}
    for place, row in enumerate(ordered):
        members["train" if place % 2 == 0 else "val" if place % 4 == 1 else "test"].append(row)
    return {split: sorted(rows) for split, rows in members.items()}


def _plain(name: str) -> str:
    return "".join(c for c in name.casefold() if c not in " _-")


def _rows_by_name(class_names: Sequence[str]) -> dict[str, int]:
    """The index of each class by its plain name, and by that without its group where unique."""
    rows: dict[str, int] = {}
    for row, name in enumerate(class_names):
        plain = _plain(name)
        if plain in rows:
            raise DataError(
                f"the classes {class_names[rows[plain]]} and {name} cannot be told apart in a "
                "list: rename one"
            )
        rows[plain] = row
    short = [_plain(name.rpartition("/")[-1]) for name in class_names]
    often = Counter(short)
    return {name: row for row, name in enumerate(short) if often[name] == 1} | rows


def _check_listed_once(class_split: str, listed: Mapping[str, Mapping[str, Listed]]) -> None:
    splits = list(listed)
    for i, first in enumerate(splits):
        for second in splits[i + 1 :]:
            shared = [listed[first][n].name for n in listed[first] if n in listed[second]]
            if shared:
                raise DataError(
                    f"class_split {class_split} has {some(shared)} in {first} and in {second}: "
                    "list each class once"
                )


def _by_split(pairs: Sequence[tuple[str, str]], path: Path) -> dict[str, list[Listed]]:
    lists: dict[str, list[Listed]] = {split: [] for split in SPLIT_NAMES}
    for name, split in pairs:
        known = split_of(split)
        if known is None:
            raise DataError(
                f"{path} puts {name} into split '{split}': call splits "
                f"{', '.join(SPLIT_NAMES)}, or as published"
            )
        lists[known].append(Listed(name))
    return lists


def _read_pairs(path: Path) -> list[tuple[str, str]]:
    """Classes and the names of their splits."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json":
        return _pairs_of_json(json.loads(text), path)
    lines = text.splitlines()
    if path.suffix.lower() == ".csv":
        rows = [row for row in csv.reader(lines) if row]
        header = [cell.strip().lower() for cell in rows[0]] if rows else []
        columns = (0, 1)
        if {"class", "split"} <= set(header):
            columns, rows = (header.index("class"), header.index("split")), rows[1:]
        pairs = [tuple(row[c].strip() if c < len(row) else "" for c in columns) for row in rows]
        return [(name, split) for name, split in pairs]
    split_lines = [line.rsplit(None, 1) for line in lines if line.strip()]
    return [(words[0].strip(), words[1] if len(words) == 2 else "") for words in split_lines]


def _pairs_of_json(content: Any, path: Path) -> list[tuple[str, str]]:
    if isinstance(content, dict):
        if all(isinstance(value, str) for value in content.values()):
            return list(content.items())
        if all(isinstance(value, list) for value in content.values()):
            return [(str(name), split) for split, names in content.items() for name in names]
    raise DataError(f"{path} is neither {{split: [class, ...]}} nor {{class: split}}: correct it")


def _read_list(path: Path) -> list[Listed]:
    """The classes of one split."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".json":
        content = json.loads(text)
        if not isinstance(content, list):
            raise DataError(f"{path} is no list [class, ...]: correct it")
        return [Listed(str(name)) for name in content]
    if path.suffix.lower() == ".csv":
        rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]
        if rows and rows[0][0].lower() == "class":
            rows = rows[1:]
        return [Listed(row[0], row[1] if len(row) > 1 else None) for row in rows]
    return [Listed(line.strip()) for line in text.splitlines() if line.strip()]
