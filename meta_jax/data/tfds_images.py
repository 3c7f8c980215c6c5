"""Any prepared image-classification set of TensorFlow Datasets (TFDS), read without TensorFlow."""

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

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

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder


class _Pool(NamedTuple):
    """The examples of all splits of a set, by class."""

    name: str
    class_names: list[str]
    encoded: list[dict[bytes, str]]  # of each class, its images' bytes and what to call them


@registry.tasks("tfds")
def tfds(
    name: str,
    /,
    *,
    data_dir: str | None = None,
    image_size: int = 28,
    rotations: Rotations = "none",
    augment: Augment = "none",
    objective: Objective | str = "cross_entropy",
    split_seed: int = 0,
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
      objective: Objective of the tasks: 'cross_entropy', or somebody's own as
        package.module:attribute.
      split_seed: Seed of the random split of classes. Give the same in training and in tests, or
        classes trained on turn up in the test split.
    """
    check_image_size(image_size)
    pool = _read_pool(name, data_dir)
    channels = _channels(pool, image_size)
    return image_source(
        _split_pool(pool, image_size, channels, random_class_split(len(pool.encoded), split_seed)),
        image_preprocessing(image_size, channels, polarity="as_is", resample="lanczos"),
        rotations=rotations,
        augment=augment,
        objective=objective,
    )


def load_tfds_images(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    image_size: int = 28,
    seed: int = 0,
    fractions: tuple[float, float, float] = (0.64, 0.16, 0.20),
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
      fractions: Shares of the classes in train, val and test.

    Returns:
      The splits; the images of each are decoded when it is asked for.

    Raises:
      DataError: the set is not prepared there, is not in array_record format, is corrupt, has no
        single image or no class label, or has fewer than 3 classes; and when a split is asked for,
        where one of its images does not decode.
    """
    check_image_size(image_size)
    pool = _read_pool(name, data_dir)
    members = random_class_split(len(pool.encoded), seed, fractions)
    return _split_pool(pool, image_size, _channels(pool, image_size), members)


def _read_pool(name: str, data_dir: str | os.PathLike | None) -> _Pool:
    builder = open_builder(find_prepared(name, tfds_data_dir(data_dir)))
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
    present = [label for label, encoded in enumerate(by_class) if encoded]
    int2str = features[label_key].int2str
    return _Pool(name, [int2str(label) for label in present], [by_class[i] for i in present])


def _channels(pool: _Pool, image_size: int) -> int:
    images = (item for encoded in pool.encoded for item in encoded.items())
    return 3 if any_colour(images, image_size) else 1


def _split_pool(
    pool: _Pool, image_size: int, channels: int, members: dict[str, np.ndarray]
) -> Splits:
    def load(split: str) -> Split:
        pixels = [
            [image_pixels(open_image(*item), image_size) for item in pool.encoded[i].items()]
            for i in members[split]
        ]
        return split_from_classes(
            unify_channels(pixels, channels),
            class_names=[pool.class_names[i] for i in members[split]],
            groups=[pool.name] * len(pixels),
        )

    return lazy_splits({split: functools.partial(load, split) for split in members})


def tfds_data_dir(data_dir: str | os.PathLike | None) -> Path:
    """The TFDS data folder: `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


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
    """
    import tensorflow_datasets as tfds
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
