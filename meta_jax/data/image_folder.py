"""A folder of images, one sub-folder for each class."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

from absl import logging

from meta_jax import registry
from meta_jax.core import Objective
from meta_jax.data.augmentation import Augment
from meta_jax.data.dataset import (
    DataError,
    Split,
    Splits,
    lazy_splits,
    random_class_split,
    split_from_classes,
)
from meta_jax.data.episodes import Rotations
from meta_jax.data.images import (
    any_colour,
    check_image_size,
    image_pixels,
    open_image,
    unify_channels,
)
from meta_jax.data.source import TaskSource, image_preprocessing, image_source

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif")
_SPLITS = ("train", "val", "test")
_FRACTIONS = (0.64, 0.16, 0.20)


@registry.tasks("folder")
def folder(
    path: str,
    /,
    *,
    image_size: int = 28,
    grey: bool | None = None,
    rotations: Rotations = "none",
    augment: Augment = "none",
    objective: Objective | str = "cross_entropy",
    split_seed: int = 0,
) -> TaskSource:
    """Builds the source of a folder of images, one sub-folder for each class.

    Args:
      path: Folder of class folders, or of some of train, val and test, which hold them.
      image_size: Side in pixels to which images of any size are resized.
      grey: Whether images get 1 channel, or 3; by default 1 where no image has a colour.
      rotations: Quarter turns: 'none'; 'classes', a turned class is a class of its own;
        'per_class', one random turn for each class of an episode; 'per_episode', one for all.
      augment: Random changes of training images: 'none', or 'affine' (rotation, shear, scale,
        shift).
      objective: Objective of the tasks: 'cross_entropy', or somebody's own as
        package.module:attribute.
      split_seed: Seed of the random split of classes; not used where the folder has splits. Give
        the same in training and in tests, or classes trained on turn up in the test split.
    """
    check_image_size(image_size)
    root, members = _class_folders(path, split_seed, _FRACTIONS)
    channels = _channels(members, image_size, grey)
    return image_source(
        _load_folders(root, members, image_size, lambda: channels),
        image_preprocessing(image_size, channels, polarity="as_is", resample="lanczos"),
        rotations=rotations,
        augment=augment,
        objective=objective,
    )


def load_image_folder(
    path: str | os.PathLike,
    *,
    image_size: int = 28,
    seed: int = 0,
    grey: bool | None = None,
    fractions: tuple[float, float, float] = _FRACTIONS,
) -> Splits:
    """Loads PATH/CLASS/IMAGE, uint8 [all, image_size, image_size, 1 or 3].

    Classes are split at random under the seed. If the sub-folders of `path` are `train`, `val` and
    `test`, or some of them with folders inside, these are the splits, and the classes are their
    sub-folders. Images of any size are resized to a square. Transparency is laid on white.
    Hidden files are ignored; other files that are no images too, with a warning.

    Args:
      path: Folder of class folders. Images end in .png, .jpg, .jpeg, .bmp or .gif (its first
        frame), in either case.
      image_size: Side in pixels after resizing.
      seed: Seed of the class split; not used where `path` has splits.
      grey: True for 1 channel, False for 3; if None, 1 if no image of any split has a colour.
      fractions: Shares of the classes in train, val and test.

    Returns:
      The splits, each read when it is asked for; class names are the sub-folders' names, with
      their split's where `path` has splits ('train/cat'), and all are of one group.

    Raises:
      DataError: the folder does not exist or has fewer than 3 classes; and when a split is asked
        for, where it or one of its classes has nothing in it, or an image does not decode.
    """
    check_image_size(image_size)
    root, members = _class_folders(path, seed, fractions)
    channels = functools.cache(lambda: _channels(members, image_size, grey))
    return _load_folders(root, members, image_size, channels)


def _class_folders(
    path: str | os.PathLike, seed: int, fractions: tuple[float, float, float]
) -> tuple[Path, dict[str, list[Path]]]:
    """The root, and the class folders of each split."""
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"the image folder {root} does not exist: correct folder:PATH")
    top = _subfolders(root)
    if _are_splits(top):
        return root, {split: _subfolders(root / split) for split in _SPLITS if root / split in top}
    if len(top) < 3:
        raise DataError(
            f"{root} has {len(top)} class folder(s), but train, val and test need at least "
            "one each: put the images of each class into a sub-folder"
        )
    members = random_class_split(len(top), seed, fractions)
    return root, {split: [top[i] for i in rows] for split, rows in members.items()}


def _are_splits(folders: list[Path]) -> bool:
    """Whether folders are train, val and test, or some of these with folders inside."""
    names = {folder.name for folder in folders}
    if not names or not names <= set(_SPLITS):
        return False
    inside = (entry for folder in folders for entry in folder.iterdir())
    return len(names) == len(_SPLITS) or any(
        entry.is_dir() and not entry.name.startswith(".") for entry in inside
    )


def _channels(members: dict[str, list[Path]], image_size: int, grey: bool | None) -> int:
    if grey is not None:
        return 1 if grey else 3
    # All splits are looked at, so that all have the same channels whichever is asked for.
    files = (
        (str(file), str(file))
        for folders in members.values()
        for folder in folders
        for file in _images(_visible(folder))
    )
    return 3 if any_colour(files, image_size) else 1


def _load_folders(
    root: Path,
    members: dict[str, list[Path]],
    image_size: int,
    channels: Callable[[], int],
) -> Splits:
    def load(split: str) -> Split:
        if not members[split]:
            raise DataError(f"{root / split} has no class folders: put one there for each class")
        pixels = [
            [image_pixels(open_image(str(file), str(file)), image_size) for file in _files(folder)]
            for folder in members[split]
        ]
        return split_from_classes(
            unify_channels(pixels, channels()),
            class_names=[folder.relative_to(root).as_posix() for folder in members[split]],
            groups=[root.name] * len(pixels),
        )

    return lazy_splits({split: functools.partial(load, split) for split in members})


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _images(entries: list[Path]) -> list[Path]:
    return [e for e in entries if e.is_file() and e.suffix.lower() in EXTENSIONS]


def _subfolders(folder: Path) -> list[Path]:
    entries = _visible(folder)
    for entry in entries:
        if not entry.is_dir():
            logging.warning("Ignored, not in a class folder: %s", entry)
    return [entry for entry in entries if entry.is_dir()]


def _files(folder: Path) -> list[Path]:
    entries = _visible(folder)
    images = _images(entries)
    for entry in entries:
        if entry not in images:
            logging.warning("Ignored, not an image: %s", entry)
    if not images:
        raise DataError(
            f"the class folder {folder} has no images ({', '.join(EXTENSIONS)}): add some or "
            "remove it"
        )
    return images
