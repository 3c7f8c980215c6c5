"""A folder of images, in one of the layouts that `meta_jax.data.layouts` knows."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from meta_jax import registry
from meta_jax.core import Objective
from meta_jax.data.augmentation import Augment
from meta_jax.data.class_lists import class_members
from meta_jax.data.dataset import (
    ON_DEVICE,
    DataError,
    Placement,
    Splits,
    Storage,
    check_disjoint,
    random_class_split,
    read_fractions,
    split_advice,
)
from meta_jax.data.decoding import Encoded
from meta_jax.data.episodes import Rotations
from meta_jax.data.image_pool import ImageClass, ImagePool
from meta_jax.data.images import EXTENSIONS, check_image_size
from meta_jax.data.layouts import UNDIVIDED, ClassFiles, Layout, find_layout
from meta_jax.data.notes import Notes, some
from meta_jax.data.polarity import Polarity
from meta_jax.data.source import TaskSource, image_preprocessing, image_source
from meta_jax.lookup import local_path
from meta_jax.ranges import NotNegativeInt, Positive, PositiveInt


class _Divided(NamedTuple):
    """Classes by split, and how they came there."""

    root: Path
    splits: Mapping[str, Sequence[ClassFiles]]
    advice: str  # what to do about splits with too few classes


@registry.tasks("folder")
def folder(
    path: str,
    /,
    *,
    image_size: PositiveInt = 28,
    grey: bool | None = None,
    rotations: Rotations = "none",
    within_group: bool = False,
    least_ways: PositiveInt | None = None,
    least_shots: PositiveInt | None = None,
    augment: Augment = "none",
    polarity: Polarity = "as_is",
    objective: Objective | str = "cross_entropy",
    class_split: str | None = None,
    split_seed: NotNegativeInt = 0,
    split_fractions: str | None = None,
    allow_shared_classes: bool = False,
    cache: bool = True,
    placement: Placement = "device",
    device_memory: Positive | None = None,
) -> TaskSource:
    """Builds the source of a folder of images, one sub-folder for each class.

    Args:
      path: Folder of class folders, or of train, val and test, which hold them; or another layout
        that `load_image_folder` describes.
      image_size: Side in pixels to which images of any size are resized.
      grey: Whether images get 1 channel, or 3; by default 1 where no image has a colour.
      rotations: Quarter turns: 'none'; 'classes', a turned class is a class of its own;
        'per_class', one random turn for each class of an episode; 'per_episode', one for all.
      within_group: Whether all classes of an episode are of one group (GROUP/CLASS/IMAGE); in tests
        all of them then show images of the same numbers.
      least_ways: Smallest number of classes in a training episode. Each episode draws its number
        between this and the ways, and pads the rest; by default all have as many classes.
      least_shots: Likewise the smallest number of support examples of each class.
      augment: Random changes of training images: 'none', or 'affine' (rotation, shear, scale,
        shift).
      polarity: Polarity that images of characters get: 'ink_light' on dark, or 'ink_dark' on light,
        told from their borders; or 'as_is'. With weights, it is that of their training.
      objective: Objective of the tasks: 'cross_entropy', or somebody's own as
        package.module:attribute.
      class_split: List that says which class is in which split: 'miniimagenet', 'cifar_fs',
        'fc100', 'cub', or the path of a CSV, JSON or text file, or of a folder with one for each
        split. By default the folder's own splits; without these, a random split.
      split_seed: Seed of the random split of classes; not used where the folder or a list has
        splits. Give the same in training and in tests, or classes trained on turn up in the test
        split.
      split_fractions: Shares of train, val and test in the random split, such as 0.6,0.1,0.3; by
        default 0.64,0.16,0.2, with at least 5 classes (or a third) in val and in test.
      allow_shared_classes: Whether a class may be in several splits. Tests then ask for classes
        trained on, and results are not those of few-shot learning.
      cache: Whether decoded images are kept for the next start, in $META_JAX_CACHE or
        ~/.cache/meta_jax, which may be deleted at any time.
      placement: Where the images of a split lie: 'device', or 'host' for the machine's memory, or a
        file mapped into it, from where workers of grain send the same episodes: for sets that are
        larger than the device.
      device_memory: Megabytes of a device that images may take: all of a split, or with
        placement=host the episodes that are sent ahead; by default what the device has, or 256.
    """
    check_image_size(image_size)
    notes = Notes()
    divided = _divide(
        path, class_split, split_seed, read_fractions(split_fractions), allow_shared_classes, notes
    )
    pool = _pool(divided, image_size, grey, cache, Storage(placement, device_memory))
    return image_source(
        pool.splits(),
        image_preprocessing(image_size, pool.channels, polarity=polarity, resample="lanczos"),
        rotations=rotations,
        within_group=within_group,
        least_ways=least_ways,
        least_shots=least_shots,
        augment=augment,
        objective=objective,
        notes=notes,
        advice=divided.advice,
    )


def load_image_folder(
    path: str | os.PathLike,
    *,
    image_size: int = 28,
    seed: int = 0,
    grey: bool | None = None,
    fractions: tuple[float, float, float] | None = None,
    class_split: str | None = None,
    allow_shared_classes: bool = False,
    cache: bool = False,
    storage: Storage = ON_DEVICE,
) -> Splits:
    """Loads a folder of images, uint8 [all, image_size, image_size, 1 or 3].

    Layouts, by what lies in `path`:
      * CLASS/IMAGE: classes are split at random under the seed.
      * GROUP/CLASS/IMAGE, such as Alphabet/character: likewise; classes are named 'GROUP/CLASS'.
      * train, val and test, or some of them, by any usual name (base, val, novel; training, valid
        or validation), with one of the layouts above inside.
      * images/ and train.csv, val.csv, test.csv with the columns filename,label: miniImageNet.
      * base.json, val.json, novel.json with label_names, image_names and image_labels, the image
        names relative to `path` or absolute: A Closer Look at Few-shot Classification.
      * images/CLASS/IMAGE beside other things: CUB_200_2011; `class_split="cub"` splits it.
      * data/CLASS/IMAGE and splits/bertinetto/train.txt, val.txt, test.txt: CIFAR-FS.

    Images of any size are resized to a square, upright as EXIF says. Transparency is laid on white.
    Hidden files are ignored; one warning sums up what else is left out.

    Args:
      path: Folder of images, which end in .png, .jpg, .jpeg, .bmp, .gif (its first frame), .webp,
        .tif or .tiff, in either case.
      image_size: Side in pixels after resizing.
      seed: Seed of the random split of classes.
      grey: True for 1 channel, False for 3; if None, 1 if no image of any split has a colour.
      fractions: Shares of the classes in train, val and test in the random split; if None, as
        `random_class_split` has them.
      class_split: Name or path of a list of classes, as `class_members` takes it. Classes of one
        name are put together first, and classes that are not listed left out.
      allow_shared_classes: Whether a class may be in several splits.
      cache: Whether decoded images are kept for the next time, and read back.
      storage: Where the examples lie; by default on the device.

    Returns:
      The splits, each read when it is asked for; class names are the sub-folders' names. Groups
      are those of the layout, or all one.

    Raises:
      DataError: the folder does not exist, has an unknown layout or fewer than 3 classes to split,
        a class is in several splits, or what a list names is not there; and when a split is asked
        for, where it or one of its classes has nothing in it, or an image does not decode.
    """
    check_image_size(image_size)
    divided = _divide(path, class_split, seed, fractions, allow_shared_classes, Notes())
    return _pool(divided, image_size, grey, cache, storage).splits()


def _divide(
    path: str | os.PathLike,
    class_split: str | None,
    seed: int,
    fractions: tuple[float, float, float] | None,
    allow_shared_classes: bool,
    notes: Notes,
) -> _Divided:
    root = local_path(path)
    layout = find_layout(root)
    _note_left_out(root, layout, notes)
    lists = class_split or layout.class_split
    if lists:
        splits, advice = _by_lists(root, layout, lists, notes), ""
    elif UNDIVIDED in layout.splits:
        classes = layout.splits[UNDIVIDED]
        if len(classes) < 3:
            raise DataError(
                f"{root} has {len(classes)} class folder(s), but train, val and test need at least "
                "one each: put the images of each class into a sub-folder"
            )
        members = random_class_split(len(classes), seed, fractions)
        splits = {split: [classes[row] for row in rows] for split, rows in members.items()}
        advice = split_advice(splits)
    else:
        splits, advice = layout.splits, ""
    if not allow_shared_classes:
        check_disjoint(
            {split: [one.name for one in classes] for split, classes in splits.items()}, str(root)
        )
    return _Divided(root, splits, advice)


def _by_lists(root: Path, layout: Layout, lists: str, notes: Notes) -> dict[str, list[ClassFiles]]:
    """The listed classes by split; folders of one class in several splits are put together."""
    merged: dict[str, ClassFiles] = {}
    for one in (one for classes in layout.splits.values() for one in classes):
        before = merged.get(one.name)
        merged[one.name] = one._replace(files=before.files + one.files) if before else one
    classes = list(merged.values())
    members, groups = class_members(lists, [one.name for one in classes])
    used = {row for rows in members.values() for row in rows}
    unused = [one.name for row, one in enumerate(classes) if row not in used]
    if unused:
        notes.add(
            f"{len(unused)} of the {len(classes)} classes in {root} are in no split of {lists} and "
            f"left out: {some(unused)}"
        )
    return {
        split: [classes[i]._replace(group=groups.get(i, classes[i].group)) for i in rows]
        for split, rows in members.items()
    }


def _note_left_out(root: Path, layout: Layout, notes: Notes) -> None:
    if layout.left_out:
        used = sum(len(one.files) for classes in layout.splits.values() for one in classes)
        names = [os.path.relpath(path, root) for path in layout.left_out]
        notes.add(
            f"{len(names)} of the {used + len(names)} files in {root} are left out, because they "
            f"are no images or lie outside the class folders: {some(names)}"
        )


def _pool(
    divided: _Divided, image_size: int, grey: bool | None, cache: bool, storage: Storage
) -> ImagePool:
    def identity(split: str) -> list[tuple[str, int, int]]:
        files = (file for one in divided.splits[split] for file in one.files)
        return [_file_identity(divided.root, file) for file in files]

    return ImagePool(
        {
            split: [_image_class(one) for one in classes]
            for split, classes in divided.splits.items()
        },
        image_size,
        grey=grey,
        identity=identity if cache else None,
        check=lambda split: _check_not_empty(divided, split),
        storage=storage,
    )


def _file_identity(root: Path, file: Path) -> tuple[str, int, int]:
    found = file.stat()
    return os.path.relpath(file, root), found.st_size, found.st_mtime_ns


def _image_class(one: ClassFiles) -> ImageClass:
    return ImageClass(one.name, one.group, [Encoded(str(file), str(file)) for file in one.files])


def _check_not_empty(divided: _Divided, split: str) -> None:
    classes = divided.splits[split]
    if not classes:
        raise DataError(
            f"{divided.root / split} has no class folders: put one there for each class"
        )
    for one in classes:
        if not one.files:
            raise DataError(
                f"the class folder {one.folder} has no images ({', '.join(EXTENSIONS)}): add some "
                "or remove it"
            )
