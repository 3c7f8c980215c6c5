"""A folder of images, one sub-folder for each class."""

import os
from pathlib import Path

import numpy as np
from absl import logging

from meta_jax.data.dataset import (
    DataError,
    Splits,
    check_image_size,
    image_pixels,
    make_splits,
    open_image,
    random_class_split,
    unify_channels,
)

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif")
_SPLITS = ("train", "val", "test")


def load_image_folder(
    path: str | os.PathLike,
    *,
    image_size: int = 28,
    seed: int = 0,
    grey: bool | None = None,
    fractions: tuple[float, float, float] = (0.64, 0.16, 0.20),
) -> Splits:
    """Loads PATH/CLASS/IMAGE, uint8 [classes, examples, image_size, image_size, 1 or 3].

    Classes are split at random under the seed. If the sub-folders of `path` are exactly `train`,
    `val` and `test`, these are the splits, and the classes are their sub-folders. Images of any
    size are resized to a square, classes of unequal size padded. Transparency is laid on white.
    Hidden files are ignored; other files that are no images too, with a warning.

    Args:
      path: the folder. Images end in .png, .jpg, .jpeg, .bmp or .gif (its first frame), in either
        case.
      image_size: side in pixels after resizing.
      seed: of the class split; not used where `path` has train, val and test.
      grey: True for 1 channel, False for 3; if None, 1 if no image has a colour.
      fractions: shares of the classes in train, val and test.

    Returns:
      The splits; class names are the sub-folders' names, with their split's where `path` has
      splits ('train/cat'), and all groups are 0.

    Raises:
      DataError: the folder does not exist, has fewer than 3 classes, has a class (or a split)
        with nothing in it, or an image does not decode.
    """
    check_image_size(image_size)
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"the image folder {root} does not exist: correct folder:PATH")
    top = _subfolders(root)
    if sorted(folder.name for folder in top) == sorted(_SPLITS):
        by_split = {split: _subfolders(root / split) for split in _SPLITS}
        for split, found in by_split.items():
            if not found:
                raise DataError(
                    f"{root / split} has no class folders: put one there for each class"
                )
        folders = [folder for split in _SPLITS for folder in by_split[split]]
        split_of = np.repeat(_SPLITS, [len(by_split[split]) for split in _SPLITS])
        members = {split: np.flatnonzero(split_of == split) for split in _SPLITS}
    else:
        folders = top
        if len(folders) < 3:
            raise DataError(
                f"{root} has {len(folders)} class folder(s), but train, val and test need at least "
                "one each: put the images of each class into a sub-folder"
            )
        members = random_class_split(len(folders), seed, fractions)

    pixels = [
        [image_pixels(open_image(str(file), str(file)), image_size) for file in _files(folder)]
        for folder in folders
    ]
    return make_splits(
        members,
        unify_channels(pixels, grey),
        class_names=[folder.relative_to(root).as_posix() for folder in folders],
        groups=[0] * len(folders),
        group_names=[root.name],
    )


def _subfolders(folder: Path) -> list[Path]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    for entry in entries:
        if not entry.is_dir():
            logging.warning("Ignored, not in a class folder: %s", entry)
    return [entry for entry in entries if entry.is_dir()]


def _files(folder: Path) -> list[Path]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    images = [e for e in entries if e.is_file() and e.suffix.lower() in EXTENSIONS]
    for entry in entries:
        if entry not in images:
            logging.warning("Ignored, not an image: %s", entry)
    if not images:
        raise DataError(
            f"the class folder {folder} has no images ({', '.join(EXTENSIONS)}): add some or "
            "remove it"
        )
    return images
