"""Any prepared image-classification set of TensorFlow Datasets (TFDS), read without TensorFlow."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
    random_class_split,
    read_fractions,
    split_advice,
)
from meta_jax.data.decoding import Encoded
from meta_jax.data.episodes import Rotations
from meta_jax.data.image_pool import ImageClass, ImagePool
from meta_jax.data.images import check_image_size
from meta_jax.data.polarity import Polarity
from meta_jax.data.source import TaskSource, image_preprocessing, image_source
from meta_jax.lookup import import_extra, local_path
from meta_jax.ranges import NotNegativeInt, Positive, PositiveInt

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder


class _Set(NamedTuple):
    """The examples of all splits of a set, by class."""

    folder: Path  # of this version
    classes: list[ImageClass]


@registry.tasks("tfds")
def tfds(
    name: str,
    /,
    *,
    data_dir: str | None = None,
    image_size: PositiveInt = 28,
    rotations: Rotations = "none",
    augment: Augment = "none",
    polarity: Polarity = "as_is",
    objective: Objective | str = "cross_entropy",
    class_split: str | None = None,
    split_seed: NotNegativeInt = 0,
    split_fractions: str | None = None,
    cache: bool = True,
    placement: Placement = "device",
    device_memory: Positive | None = None,
) -> TaskSource:
    """Builds the source of a prepared image-classification set of TensorFlow Datasets (TFDS).

    Args:
      name: Name of the set: 'NAME', 'NAME/CONFIG', either with ':VERSION'.
      data_dir: Data folder of TFDS; by default $TFDS_DATA_DIR or ~/tensorflow_datasets.
      image_size: Side in pixels to which images of any size are resized.
      rotations: Quarter turns: 'none'; 'classes', a turned class is a class of its own;
        'per_class', one random turn for each class of an episode; 'per_episode', one for all.
      augment: Random changes of training images: 'none', or 'affine' (rotation, shear, scale,
        shift).
      polarity: Polarity that images of characters get: 'ink_light' on dark, or 'ink_dark' on light,
        told from their borders; or 'as_is'. With weights, it is that of their training.
      objective: Objective of the tasks: 'cross_entropy', or somebody's own as
        package.module:attribute.
      class_split: List that says which class is in which split: 'miniimagenet', 'cifar_fs',
        'fc100', 'cub', or the path of a CSV, JSON or text file, or of a folder with one for each
        split. By default a random split.
      split_seed: Seed of the random split of classes. Give the same in training and in tests, or
        classes trained on turn up in the test split.
      split_fractions: Shares of train, val and test in the random split, such as 0.6,0.1,0.3; by
        default 0.64,0.16,0.2, with at least 5 classes (or a third) in val and in test.
      cache: Whether decoded images are kept for the next start, in $META_JAX_CACHE or
        ~/.cache/meta_jax, which may be deleted at any time.
      placement: Where the images of a split lie: 'device', or 'host' for the machine's memory, or a
        file mapped into it, from where workers of grain send the same episodes: for sets that are
        larger than the device.
      device_memory: Megabytes of a device that images may take: all of a split, or with
        placement=host the episodes that are sent ahead; by default what the device has, or 256.
    """
    check_image_size(image_size)
    found = _read_set(name, data_dir)
    fractions = read_fractions(split_fractions)
    members, advice = _members(found, class_split, split_seed, fractions)
    pool = _pool(found, members, image_size, cache, Storage(placement, device_memory))
    return image_source(
        pool.splits(),
        image_preprocessing(image_size, pool.channels, polarity=polarity, resample="lanczos"),
        rotations=rotations,
        augment=augment,
        objective=objective,
        advice=advice,
    )


def load_tfds_images(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    image_size: int = 28,
    seed: int = 0,
    fractions: tuple[float, float, float] | None = None,
    class_split: str | None = None,
    cache: bool = False,
    storage: Storage = ON_DEVICE,
) -> Splits:
    """Loads a prepared TFDS set, uint8 [all, image_size, image_size, 1 or 3].

    The set's own splits divide the examples of each class; few-shot learning divides classes. So
    all splits are pooled, and classes split at random under the seed. An example found in several
    splits (as Omniglot's `small1` repeats part of `train`) is taken once. Images get 1 channel
    if none of them has a colour, else 3. Values are 0 to 255: images are decoded here, since TFDS
    without TensorFlow gives 1-bit images as 0/1.

    Args:
      name: 'NAME', 'NAME/CONFIG', either with ':VERSION'; the highest version there by default.
      data_dir: Data folder of TFDS; if empty, $TFDS_DATA_DIR or ~/tensorflow_datasets.
      image_size: Side in pixels after resizing.
      seed: Seed of the class split.
      fractions: Shares of the classes in train, val and test; if None, as `random_class_split` has
        them.
      class_split: Name or path of a list of classes that replaces the random split, as
        `class_members` takes it; classes that are not listed are left out.
      cache: Whether decoded images are kept for the next time, and read back.
      storage: Where the examples lie; by default on the device.

    Returns:
      The splits; the images of each are decoded when it is asked for.

    Raises:
      DataError: the set is not prepared there, is not in array_record format, is corrupt, has no
        single image or no class label, or has fewer than 3 classes; and when a split is asked for,
        where one of its images does not decode.
    """
    check_image_size(image_size)
    found = _read_set(name, data_dir)
    members, _ = _members(found, class_split, seed, fractions)
    return _pool(found, members, image_size, cache, storage).splits()


def _read_set(name: str, data_dir: str | os.PathLike | None) -> _Set:
    folder = find_prepared(name, tfds_data_dir(data_dir))
    builder = open_builder(folder)
    features = builder.info.features
    image_key, label_key = _image_key(builder), _label_key(builder)
    n_classes = features[label_key].num_classes
    if n_classes is None:
        raise DataError(f"label {label_key!r} of tfds:{name} does not say how many classes it has")
    by_class: list[dict[bytes, str]] = [{} for _ in range(n_classes)]
    for split in sorted(builder.info.splits):
        for position, record in enumerate(read_records(builder, split)):
            label = int(record[label_key])
            # Some sets mark the examples of an unlabelled split by -1.
            if 0 <= label < n_classes:
                by_class[label].setdefault(record[image_key], f"tfds:{name}, {split}[{position}]")
    int2str = features[label_key].int2str
    classes = [
        ImageClass(int2str(label), name, [Encoded(*item) for item in encoded.items()])
        for label, encoded in enumerate(by_class)
        if encoded
    ]
    return _Set(folder, classes)


def _members(
    found: _Set, class_split: str | None, seed: int, fractions: tuple[float, float, float] | None
) -> tuple[dict[str, list[ImageClass]], str]:
    """The classes of each split, and what to do where they are too few."""
    if class_split:
        rows, groups = class_members(class_split, [one.name for one in found.classes])
        classes = [
            one._replace(group=groups.get(row, one.group)) for row, one in enumerate(found.classes)
        ]
        return {split: [classes[row] for row in members] for split, members in rows.items()}, ""
    members = random_class_split(len(found.classes), seed, fractions)
    splits = {split: [found.classes[row] for row in rows] for split, rows in members.items()}
    return splits, split_advice(splits)


def _pool(
    found: _Set,
    splits: Mapping[str, Sequence[ImageClass]],
    image_size: int,
    cache: bool,
    storage: Storage,
) -> ImagePool:
    def identity(split: str) -> object:
        files = sorted(file for file in found.folder.iterdir() if file.is_file())
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return stats, [(one.name, len(one.images)) for one in splits[split]]

    return ImagePool(splits, image_size, identity=identity if cache else None, storage=storage)


def tfds_data_dir(data_dir: str | os.PathLike | None) -> Path:
    """The TFDS data folder: `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return local_path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def find_prepared(name: str, data_dir: Path) -> Path:
    """The folder data_dir/NAME[/CONFIG]/VERSION of a prepared set, of the highest version.

    Raises:
      DataError: there is none, or the set has several configurations and `name` says not which.
    """
    path, _, version = name.strip("/").partition(":")
    found = [info.parent for info in sorted((data_dir / path).glob("**/dataset_info.json"))]
    found = [folder for folder in found if version in ("", folder.name)]
    if not path or not found:
        raise DataError(
            f"TFDS set {name!r} is not prepared in {data_dir}: correct the name or data_dir, or "
            "prepare it where TensorFlow is installed, with "
            f"`tfds build {path} --file_format=array_record --data_dir={data_dir}`"
        )
    configs = sorted({str(folder.parent.relative_to(data_dir)) for folder in found})
    if len(configs) > 1:
        raise DataError(f"TFDS set {name!r} has several configurations: {', '.join(configs)}")
    return max(found, key=lambda folder: _version_key(folder.name))


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in version.split("."))


def open_builder(folder: Path) -> "DatasetBuilder":
    """Opens the prepared set in a folder that holds dataset_info.json.

    Raises:
      DataError: the folder's metadata is missing or corrupt, or its format is not array_record.
      UsageError: TFDS is not installed.
    """
    tfds = import_extra("tensorflow_datasets", "data", str(folder))
    from google.protobuf.json_format import ParseError

    try:
        builder = tfds.builder_from_directory(folder)
    # A feature type unknown to this TFDS is a KeyError.
    except (OSError, ValueError, KeyError, ParseError) as error:
        raise DataError(
            f"{folder} is not a readable TFDS set ({_line(error)}): prepare it again"
        ) from error
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise DataError(
            f"{folder} is in {file_format} format, which needs TensorFlow: prepare it again with "
            "--file_format=array_record"
        )
    return builder


def read_records(builder: "DatasetBuilder", split: str) -> list[dict[str, Any]]:
    """All records of one split, in TFDS's order, their images still encoded bytes.

    Raises:
      DataError: a file of the split is missing or corrupt.
    """
    import tensorflow_datasets as tfds

    image_key = _image_key(builder)
    broken = f"split {split!r} of {builder.data_dir} is missing or corrupt"
    try:
        source: Any = builder.as_data_source(
            split=split, decoders={image_key: tfds.decode.SkipDecoding()}
        )
        records = [source[i] for i in range(len(source))]
    # array_record raises a RuntimeError or an IndexError for a damaged file, protobuf a ValueError.
    except (OSError, RuntimeError, IndexError, ValueError) as error:
        raise DataError(f"{broken} ({_line(error)}): prepare it again") from error
    # A truncated file whose last bytes look right gives empty records instead of an error.
    empty = sum(record[image_key] is None for record in records)
    if empty:
        raise DataError(f"{broken} ({empty} of {len(records)} records are empty): prepare it again")
    return records


def _image_key(builder: "DatasetBuilder") -> str:
    return _only_feature(builder, "Image", "image")


def _label_key(builder: "DatasetBuilder") -> str:
    return _only_feature(builder, "ClassLabel", "label")


def _only_feature(builder: "DatasetBuilder", kind: str, usual_key: str) -> str:
    """The key of the feature of one type: the usual key, or the only one there is."""
    features = builder.info.features
    keys = [key for key, feature in features.items() if type(feature).__name__ == kind]
    if usual_key in keys:
        return usual_key
    if len(keys) != 1:
        raise DataError(
            f"TFDS set {builder.name!r} has {len(keys)} {kind} features, not one, so it is no "
            f"image-classification set; its features: {', '.join(sorted(features))}"
        )
    return keys[0]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
