"""Layouts of image folders: where the classes are, and in which splits.

Each layout is a function from a folder to what is found there, or None where the folder is laid out
otherwise. `find_layout` tries one after another.
"""

import csv
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from meta_jax.data.class_lists import SPLIT_NAMES, list_files, split_of
from meta_jax.data.dataset import DataError
from meta_jax.data.images import EXTENSIONS, is_image_file
from meta_jax.data.notes import some

UNDIVIDED = "all"  # the one key of `Layout.splits` where nothing there says what is in which split
KNOWN = (
    "CLASS/IMAGE; GROUP/CLASS/IMAGE; either in folders train, val, test (or base, val, novel); "
    "images/ with train.csv, val.csv, test.csv (filename,label); base.json, val.json, novel.json; "
    "images/CLASS/IMAGE (CUB); data/CLASS/IMAGE with splits/NAME/train.txt (CIFAR-FS)"
)


class ClassFiles(NamedTuple):
    """A class and its images."""

    name: str  # unique in its split
    group: str
    files: list[Path]  # empty where the class's folder has no images
    folder: Path | None = None  # None where a list names the files


class Layout(NamedTuple):
    """What is found in a folder."""

    splits: dict[str, list[ClassFiles]]  # or {UNDIVIDED: all classes}
    left_out: list[Path]  # files beside the images, and images outside class folders
    class_split: str | None = None  # path of the lists of classes that come with the folder


class _Folder(NamedTuple):
    """What lies in a folder; hidden entries are passed over."""

    path: Path
    folders: list[Path]
    images: list[Path]
    others: list[Path]


def find_layout(root: Path) -> Layout:
    """Finds the classes of images in a folder.

    Args:
      root: Folder in one of the layouts `KNOWN`.

    Raises:
      DataError: no such folder, an unknown layout, or a listed image that is not there.
    """
    if not root.is_dir():
        raise DataError(f"the image folder {root} does not exist: correct folder:PATH")
    finders: tuple[Callable[[_Folder], Layout | None], ...] = (
        *(_json_lists, _csv_lists, _lists_beside_data, _split_folders, _images_folder),
        _class_folders,
    )
    top = _scan(root)
    for find in finders:
        layout = find(top)
        if layout is not None:
            return layout
    raise DataError(f"{root} has no known layout: {_seen(top)}. Known are: {KNOWN}")


def _seen(top: _Folder) -> str:
    """What lies in a folder, in words."""
    inside = [_scan(folder) for folder in top.folders]
    parts = [
        f"{len(top.images)} images outside class folders" if top.images else "",
        f"{len(top.others)} other files ({_names(top.others)})" if top.others else "",
        f"{len(inside)} class folders without images ({_names(top.folders)})" if inside else "",
    ]
    return f"found {' and '.join(filter(None, parts)) or '0 class folders'}"


def _names(paths: Sequence[Path]) -> str:
    return some([path.name for path in paths])


def _scan(folder: Path) -> _Folder:
    found = _Folder(folder, [], [], [])
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(
            f"{folder} cannot be read ({error.strerror}): correct its rights"
        ) from error
    for entry in sorted(visible, key=lambda entry: entry.name):
        path = folder / entry.name
        if entry.is_dir():
            found.folders.append(path)
        elif is_image_file(entry.name) and entry.is_file():
            found.images.append(path)
        else:
            found.others.append(path)
    return found


def _files_below(folders: Sequence[Path]) -> list[Path]:
    """All files in folders, at any depth; hidden ones and links to folders are passed over."""
    found = []
    for folder in folders:
        if folder.is_symlink():
            continue  # it may lead back
        inside = _scan(folder)
        found += inside.images + inside.others + _files_below(inside.folders)
    return found


def _has_images(folder: Path) -> bool:
    """Whether images lie in a folder, or in one of its sub-folders."""
    inside = _scan(folder)
    return bool(inside.images) or any(_scan(sub).images for sub in inside.folders)


# --- Class folders --------------------------------------------------------------------------------


def _class_folders(top: _Folder) -> Layout | None:
    """CLASS/IMAGE or GROUP/CLASS/IMAGE."""
    classes, left_out = _classes(top)
    if not any(one.files for one in classes):
        return None
    return Layout({UNDIVIDED: classes}, left_out)


def _classes(top: _Folder) -> tuple[list[ClassFiles], list[Path]]:
    """The classes below a folder, and the files that belong to none."""
    inside = [_scan(folder) for folder in top.folders]
    left_out = top.images + top.others
    classes = [(one, one.path.name, top.path.name) for one in inside]
    if not any(one.images for one in inside):
        grouped = [(_scan(sub), one.path.name) for one in inside for sub in one.folders]
        if any(one.images for one, _ in grouped):
            classes = [(one, f"{group}/{one.path.name}", group) for one, group in grouped]
            left_out += [file for one in inside for file in one.others]
    for one, _, _ in classes:
        left_out += one.others + (_files_below(one.folders) if one.images else [])
    return [ClassFiles(name, group, one.images, one.path) for one, name, group in classes], left_out


def _images_folder(top: _Folder) -> Layout | None:
    """images/CLASS/IMAGE or data/CLASS/IMAGE, as CUB_200_2011 has it, beside what is no image."""
    holders = [folder for folder in top.folders if folder.name in ("images", "data")]
    if len(holders) != 1 or top.images:
        return None
    holder = _scan(holders[0])
    beside = [folder for folder in top.folders if folder not in holders]
    if holder.images or any(map(_has_images, beside)):
        return None
    found = _class_folders(holder)
    return found and _in_group(found, holder.path.name, top.path.name)


def _in_group(layout: Layout, old: str, new: str) -> Layout:
    """Gives classes that have no group of their own the name of the whole folder."""
    splits = {
        split: [one._replace(group=new) if one.group == old else one for one in classes]
        for split, classes in layout.splits.items()
    }
    return layout._replace(splits=splits)


def _split_folders(top: _Folder) -> Layout | None:
    """Folders train, val and test, or some of them by a usual name, with class folders inside."""
    named = [(folder, split) for folder in top.folders if (split := split_of(folder.name))]
    inside = [(_scan(folder), split) for folder, split in named]
    complete = {split for _, split in named} == set(SPLIT_NAMES)
    if (
        not named
        or any(one.images for one, _ in inside)
        or not (complete or any(one.folders for one, _ in inside))
    ):
        return None
    beside = [folder for folder in top.folders if not split_of(folder.name)]
    strangers = [folder for folder in beside if _has_images(folder)]
    if strangers and len(named) == 1:
        return None  # a class or group that happens to be called so
    names = " and ".join(folder.name for folder, _ in named)
    if strangers:
        raise DataError(
            f"{top.path} has the split folders {names}, but {_names(strangers)} beside them with "
            "images: move these into a split, or away"
        )
    if len({split for _, split in named}) < len(named):
        raise DataError(f"{top.path} has one split by two names ({names}): put them together")
    splits, left_out = {}, top.images + top.others + _files_below(beside)
    for one, split in sorted(inside, key=lambda pair: list(SPLIT_NAMES).index(pair[1])):
        classes, others = _classes(one)
        ungrouped = Layout({split: classes}, [])
        splits |= _in_group(ungrouped, one.path.name, top.path.name).splits
        left_out += others
    return Layout(splits, left_out)


# --- Lists ----------------------------------------------------------------------------------------


def _lists_beside_data(top: _Folder) -> Layout | None:
    """data/CLASS/IMAGE with splits/NAME/train.txt, val.txt, test.txt, as CIFAR-FS has them."""
    folders = {folder.name: folder for folder in top.folders}
    if not {"data", "splits"} <= folders.keys():
        return None
    lists = _scan(folders["splits"]).folders
    if not lists:
        return None
    chosen = next((one for one in lists if one.name == "bertinetto"), lists[0])
    if len(lists) > 1 and chosen.name != "bertinetto":
        raise DataError(
            f"{folders['splits']} has several lists ({_names(lists)}): name one by class_split=PATH"
        )
    found = _class_folders(_scan(folders["data"]))
    if found is None:
        return None
    return _in_group(found, "data", top.path.name)._replace(class_split=str(chosen))


def _csv_lists(top: _Folder) -> Layout | None:
    """Files train.csv, val.csv, test.csv (filename,label) beside images/, as miniImageNet's."""
    lists = list_files(top.others, [".csv"])
    if not lists:
        return None
    splits: dict[str, list[ClassFiles]] = {}
    for split, path in lists.items():
        rows = _read_csv(path)
        base = _image_base(top.path, rows)
        files = [(label, base(name, label)) for name, label in rows]
        splits[split] = _group_by_class(files, path, top.path.name)
    images = next((folder for folder in top.folders if folder.name == "images"), None)
    listed = {file for classes in splits.values() for one in classes for file in one.files}
    return Layout(splits, [f for f in _files_below([images] if images else []) if f not in listed])


def _read_csv(path: Path) -> list[tuple[str, str]]:
    """(file name, class) of each image in a list."""
    try:
        rows = [row for row in csv.reader(path.read_text("utf-8-sig").splitlines()) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no readable list of images ({error}): correct it") from error
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    label = next((column for column in ("label", "class") if column in header), None)
    if "filename" not in header or label is None:
        raise DataError(f"{path} begins with no line 'filename,label': name its columns so")
    columns = header.index("filename"), header.index(label)
    short = [i for i, row in enumerate(rows, 1) if len(row) <= max(columns)]
    if short:
        raise DataError(f"line {short[0]} of {path} has no class: complete it")
    name_column, label_column = columns
    return [(row[name_column].strip(), row[label_column].strip()) for row in rows[1:]]


def _image_base(root: Path, rows: Sequence[tuple[str, str]]) -> Callable[[str, str], Path]:
    """Where the images of a list are: in images/, images/CLASS/ or beside the list."""
    places: tuple[Callable[[str, str], Path], ...] = (
        lambda name, label: root / "images" / name,
        lambda name, label: root / "images" / label / name,
        lambda name, label: root / name,
        lambda name, label: root / label / name,
    )
    found = (place for place in places if rows and place(*rows[0]).is_file())
    return next(found, places[0])


def _json_lists(top: _Folder) -> Layout | None:
    """Files base.json, val.json, novel.json of A Closer Look at Few-shot Classification."""
    lists = list_files(top.others, [".json"])
    contents = {split: _read_json(path) for split, path in lists.items()}
    if not contents or not all(map(_lists_images, contents.values())):
        return None
    splits = {}
    for split, content in contents.items():
        names, labels = content["label_names"], content["image_labels"]
        if len(labels) != len(content["image_names"]) or not all(
            isinstance(label, int) and 0 <= label < len(names) for label in labels
        ):
            raise DataError(
                f"{lists[split]} has image_labels that are no indices of label_names, one for each "
                "of image_names: correct it"
            )
        files = [
            (str(names[label]), top.path / name)
            for name, label in zip(content["image_names"], labels, strict=True)
        ]
        splits[split] = _group_by_class(files, lists[split], top.path.name)
    return Layout(splits, [])


def _lists_images(content: Any) -> bool:
    keys = ("label_names", "image_names", "image_labels")
    return isinstance(content, dict) and all(isinstance(content.get(key), list) for key in keys)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no readable JSON ({error}): correct it") from error


def _group_by_class(
    files: Sequence[tuple[str, Path]], listed_in: Path, group: str
) -> list[ClassFiles]:
    """Classes of listed images, which must all be there."""
    missing = [str(file) for _, file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{listed_in} lists {len(missing)} of {len(files)} images that are not there "
            f"({some(missing)}): add them, or correct the list"
        )
    unknown = [str(file) for _, file in files if not is_image_file(file)]
    if unknown:
        raise DataError(
            f"{listed_in} lists files whose names do not end in one of {', '.join(EXTENSIONS)} "
            f"({some(unknown)}): correct the list"
        )
    classes: dict[str, list[Path]] = {}
    for label, file in files:
        classes.setdefault(label, []).append(file)
    return [ClassFiles(name, group, sorted(classes[name])) for name in sorted(classes)]
