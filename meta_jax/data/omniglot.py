"""Omniglot: 1623 handwritten characters of 50 alphabets, 20 drawers each.

Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through probabilistic program
induction", Science 2015. Read from the two official zips, or from a prepared TensorFlow Datasets
folder (without TensorFlow); both give the same pixels in the same order.
"""

import contextlib
import functools
import hashlib
import os
import re
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from meta_jax import registry
from meta_jax.core import Objective
from meta_jax.data import images
from meta_jax.data.augmentation import Augment
from meta_jax.data.cache import cache_key, cached, file_hash
from meta_jax.data.dataset import (
    ON_DEVICE,
    DataError,
    Placement,
    Split,
    Splits,
    Storage,
    lazy_splits,
    split_from_classes,
)
from meta_jax.data.episodes import Rotations
from meta_jax.data.images import RESAMPLE_FILTERS, check_image_size
from meta_jax.data.polarity import Polarity
from meta_jax.data.source import TaskSource, image_preprocessing, image_source
from meta_jax.data.tfds_images import open_builder, read_records, tfds_data_dir
from meta_jax.lookup import local_path
from meta_jax.ranges import Positive, PositiveInt

# Name in the zip -> (number of characters, sha256 of the official zip as TFDS registers it).
_SETS = {
    "images_background": (964, "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640"),
    "images_evaluation": (659, "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee"),
}
_TFDS_SPLITS = {"images_background": "train", "images_evaluation": "test"}
_DRAWERS = 20
_URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
_CACHE = "~/.cache/meta_jax/omniglot"
_IMAGE_PATH = re.compile(r"images_\w+/([^/]+)/character(\d+)/\d+_(\d+)\.png")

_VINYALS_TRAINVAL_FROM_EVALUATION = 236
_VAL_ALPHABETS = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
# The two minimal background sets, and of each the smallest alphabet of at least 20 characters.
_SMALL_SETS = {
    "lake_small1": ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin"),
    "lake_small2": ("Greek", "Japanese_(katakana)", "Latin", "Sanskrit", "Tagalog"),
}
_SMALL_VAL_ALPHABETS = {"lake_small1": ("Early_Aramaic",), "lake_small2": ("Greek",)}
SplitRule = Literal["vinyals", "lake", "lake_small1", "lake_small2"]
SPLIT_RULES: tuple[str, ...] = get_args(SplitRule)
_SPLITS = ("train", "val", "trainval", "test")
# (alphabet, number from 1) -> images, uint8 [20, image_size, image_size, 1]
_Characters = dict[tuple[str, int], np.ndarray]


class _Drawing(NamedTuple):
    """One image before it is decoded; sorts by alphabet, character and drawer."""

    alphabet: str
    character: int  # from 1
    drawer: int  # from 1
    png: bytes
    name: str  # where it was found, for errors


@registry.tasks("omniglot")
def omniglot(
    *,
    data_dir: str | None = None,
    image_size: PositiveInt = 28,
    split_rule: SplitRule = "vinyals",
    rotations: Rotations = "none",
    within_group: bool = False,
    least_ways: PositiveInt | None = None,
    least_shots: PositiveInt | None = None,
    augment: Augment = "none",
    polarity: Polarity = "ink_light",
    objective: Objective | str = "cross_entropy",
    placement: Placement = "device",
    device_memory: Positive | None = None,
) -> TaskSource:
    """Builds the source of Omniglot: 1623 handwritten characters of 50 alphabets.

    Splits are train, val, trainval and test.

    Args:
      data_dir: Folder of the two official zips, or data folder of TFDS; by default TFDS's own if
        Omniglot is prepared there, else a download to ~/.cache/meta_jax/omniglot.
      image_size: Side in pixels to which the drawings are resized.
      split_rule: Rule of the class split: 'vinyals' (Vinyals et al. 2016: 1028 characters to
        train, 172 to validate, 423 to test), 'lake' (Lake et al. 2015: 792, 172, 659), or their
        minimal background sets of five alphabets, 'lake_small1' (114, 22, 659) and 'lake_small2'
        (132, 24, 659).
      rotations: Quarter turns: 'none'; 'classes', a turned character is a class of its own;
        'per_class', one random turn for each class of an episode; 'per_episode', one for all.
      within_group: Whether all classes of an episode are of one alphabet; in tests all of them
        then show the same drawers, so that with one shot and one query an episode is one drawer
        against another, as Lake et al. test.
      least_ways: Smallest number of classes in a training episode. Each episode draws its number
        between this and the ways, and pads the rest; by default all have as many classes.
      least_shots: Likewise the smallest number of support examples of each class.
      augment: Random changes of training images: 'none', or 'affine' (rotation, shear, scale,
        shift).
      polarity: Polarity of the images: 'ink_light' on dark (as_is), or 'ink_dark' on light.
      objective: Objective of the tasks: 'cross_entropy', or somebody's own as
        package.module:attribute.
      placement: Where the images of a split lie: 'device', or 'host' for the machine's memory, or a
        file mapped into it, from where workers of grain send the same episodes: for sets that are
        larger than the device.
      device_memory: Megabytes of a device that images may take: all of a split, or with
        placement=host the episodes that are sent ahead; by default what the device has, or 256.
    """
    storage = Storage(placement, device_memory)
    return image_source(
        load_omniglot(data_dir, split_rule=split_rule, image_size=image_size, storage=storage),
        image_preprocessing(image_size, 1, polarity=polarity, resample="lanczos"),
        rotations=rotations,
        within_group=within_group,
        least_ways=least_ways,
        least_shots=least_shots,
        augment=augment,
        objective=objective,
        ink="ink_light",
    )


def load_omniglot(
    data_dir: str | os.PathLike | None = None,
    *,
    split_rule: SplitRule = "vinyals",
    image_size: int = 28,
    invert: bool = True,
    resample: str = "lanczos",
    storage: Storage = ON_DEVICE,
) -> Splits:
    """Loads Omniglot, uint8 [all, image_size, image_size, 1], 20 examples of each class.

    Classes are in alphabetical order of (alphabet, character) and named like 'Greek/character01';
    example j is drawer j + 1 everywhere; groups are the alphabets.

    Split rules, in characters before rotations:
      * 'vinyals': train 1028, val 172, trainval 1200, test 423 (Matching Networks, Vinyals et al.
        2016, as released with Prototypical Networks, Snell et al. 2017). trainval = the 964
        background characters and the first 236 evaluation characters.
      * 'lake': train 792, val 172, trainval 964 (background), test 659 (evaluation).
      * 'lake_small1': train 114, val 22 (Early_Aramaic), trainval 136 (Balinese, Early_Aramaic,
        Greek, Korean, Latin; the official images_background_small1), test 659.
      * 'lake_small2': train 132, val 24 (Greek), trainval 156 (Greek, Japanese_(katakana), Latin,
        Sanskrit, Tagalog; images_background_small2), test 659.

    In the first two, val = the characters of Armenian, Bengali, Early_Aramaic, Hebrew and Georgian.

    Published preprocessing differs by author. The drawings are made greyscale before they are
    resized, with 'lanczos' as in Relation Networks (Sung et al. 2018): Pillow resizes 1-bit images
    by 'nearest', whatever filter it is given.

    Args:
      data_dir: Folder with images_background.zip and images_evaluation.zip, or a TFDS data folder
        (or its `omniglot` folder). If empty: TFDS's own folder ($TFDS_DATA_DIR or
        ~/tensorflow_datasets) if Omniglot is prepared there, else the official zips, downloaded
        once to ~/.cache/meta_jax/omniglot.
      split_rule: Rule of the class split: 'vinyals', 'lake', 'lake_small1' or 'lake_small2'.
      image_size: Side in pixels; 105 keeps the original.
      invert: True for ink 255 on 0, False for the files' ink 0 on 255.
      resample: Filter of Pillow: 'nearest', 'box', 'bilinear', 'hamming', 'bicubic' or 'lanczos'.
      storage: Where the examples lie; by default on the device.

    Returns:
      The splits, each read when it is asked for; one of the two sets is enough for a split that
      needs no other.

    Raises:
      DataError: an argument is none of those allowed, or the data is missing; and when a split is
        asked for, where its data is incomplete or corrupt, or cannot be downloaded.
    """
    if split_rule not in SPLIT_RULES:
        raise DataError(f"Omniglot split rule {split_rule!r} is none of {', '.join(SPLIT_RULES)}")
    if resample not in RESAMPLE_FILTERS:
        raise DataError(f"resample {resample!r} is none of {', '.join(RESAMPLE_FILTERS)}")
    check_image_size(image_size)
    read = functools.cache(functools.partial(_read_set, _find(data_dir), image_size, resample))

    def load(split: str) -> Split:
        characters = _split_characters(split, split_rule, read)
        return split_from_classes(
            [255 - drawn if invert else drawn for drawn in characters.values()],
            class_names=[f"{alphabet}/character{number:02d}" for alphabet, number in characters],
            groups=[alphabet for alphabet, _ in characters],
            storage=storage,
        )

    return lazy_splits({split: functools.partial(load, split) for split in _SPLITS})


def _split_characters(
    split: str, rule: SplitRule, read: Callable[[str], _Characters]
) -> _Characters:
    """The characters of one split, in alphabetical order."""
    extra = _VINYALS_TRAINVAL_FROM_EVALUATION if rule == "vinyals" else 0
    if split == "test":
        return dict(list(read("images_evaluation").items())[extra:])
    alphabets, val_alphabets = _SMALL_SETS.get(rule), _SMALL_VAL_ALPHABETS.get(rule, _VAL_ALPHABETS)
    members = {
        c: drawn
        for c, drawn in read("images_background").items()
        if alphabets is None or c[0] in alphabets
    }
    if split == "val":
        return {c: drawn for c, drawn in members.items() if c[0] in val_alphabets}
    if extra:
        members |= dict(list(read("images_evaluation").items())[:extra])
    return {
        c: members[c] for c in sorted(members) if split == "trainval" or c[0] not in val_alphabets
    }


def seen_characters(trained_by: SplitRule, tested_by: SplitRule) -> int:
    """The number of characters of one rule's test split that another rule's training split has.

    Examples:
      >>> seen_characters("vinyals", "lake"), seen_characters("lake", "vinyals")
      (236, 0)
    """
    mixed = trained_by == "vinyals" and tested_by != "vinyals"
    return _VINYALS_TRAINVAL_FROM_EVALUATION if mixed else 0


def _read_set(folder: Path, image_size: int, resample: str, set_name: str) -> _Characters:
    """The characters of one set, in alphabetical order; what was decoded is kept for later runs."""
    import PIL

    read = _read_tfds if (folder / "dataset_info.json").is_file() else _read_zip
    drawings = sorted(read(folder, set_name))
    _check_complete(drawings, set_name, folder)
    check_image_size(image_size, len(drawings))
    content = hashlib.blake2b(b"".join(drawing.png for drawing in drawings)).digest()
    code = PIL.__version__, file_hash(images.__file__)
    pixels = cached(
        cache_key("omniglot", *code, image_size, resample, content),
        lambda: np.stack([character_pixels(d.png, d.name, image_size, resample) for d in drawings]),
    )
    characters = [(drawing.alphabet, drawing.character) for drawing in drawings[::_DRAWERS]]
    return dict(zip(characters, np.split(pixels, len(characters)), strict=True))


def character_pixels(
    png: bytes, name: str, image_size: int, resample: str = "lanczos"
) -> np.ndarray:
    """Decodes and resizes a drawing, uint8 [image_size, image_size, 1], ink as the file has it.

    Args:
      png: Content of the file.
      name: Name of the file in an error.
      image_size: Side in pixels.
      resample: Filter of Pillow.

    Raises:
      DataError: the image does not decode.
    """
    # Greyscale first: Pillow would resize a 1-bit image by nearest neighbour whatever the filter.
    grey = images.open_image(png, name).convert("L")
    return images.resize_image(grey, image_size, resample)


def _check_complete(drawings: list[_Drawing], set_name: str, folder: Path) -> None:
    n_classes, _ = _SETS[set_name]
    by_class = Counter((d.alphabet, d.character) for d in drawings)
    for (alphabet, character), n in by_class.items():
        if n != _DRAWERS:
            raise DataError(
                f"{set_name} in {folder} has {n} images of {alphabet}/character{character:02d}, "
                f"not {_DRAWERS}: get it again from {_URL}"
            )
    if len(by_class) != n_classes:
        raise DataError(
            f"{set_name} in {folder} has {len(by_class)} characters, not {n_classes}: "
            f"get it again from {_URL}"
        )


# --- Finding the data -----------------------------------------------------------------------------


def _find(data_dir: str | os.PathLike | None) -> Path:
    """The folder of the zips, or the versioned folder of the prepared TFDS dataset."""
    if not data_dir:
        return _tfds_folder(tfds_data_dir(None)) or local_path(_CACHE)
    folder = local_path(data_dir)
    if not folder.is_dir():
        raise DataError(f"the Omniglot folder {folder} does not exist: correct data_dir")
    if any((folder / f"{name}.zip").is_file() for name in _SETS):
        return folder
    prepared = _tfds_folder(folder)
    if prepared is None:
        zips = " and ".join(f"{name}.zip" for name in _SETS)
        raise DataError(
            f"{folder} holds neither {zips} (get them from {_URL}) "
            "nor a prepared TFDS omniglot: correct data_dir"
        )
    return prepared


def _tfds_folder(folder: Path) -> Path | None:
    infos = [
        info
        for pattern in ("omniglot/3.*", "3.*", ".")
        for info in sorted(folder.glob(f"{pattern}/dataset_info.json"))
    ]
    return infos[0].parent if infos else None


def _zip_path(folder: Path, set_name: str) -> Path:
    """The zip of one set, downloaded first where the folder is the cache."""
    path = folder / f"{set_name}.zip"
    if not path.is_file():
        if folder != local_path(_CACHE):
            raise DataError(f"{folder} has no {path.name}: get it from {_URL}/{path.name}")
        _download(f"{_URL}/{path.name}", _SETS[set_name][1], path)
    return path


def _download(url: str, sha256: str, target: Path) -> None:
    """Leaves the whole, verified file at `target`, or nothing."""
    remedy = (
        "download images_background.zip and images_evaluation.zip by hand from "
        f"{_URL} and pass their folder as data_dir"
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
    except (urllib.error.URLError, OSError) as error:
        raise DataError(f"{url} cannot be downloaded ({error}): {remedy}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DataError(f"{url} came with {len(content)} bytes of the wrong sha256: {remedy}")
    partial = None
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as partial:
            partial.write(content)
        os.replace(partial.name, target)
    except OSError as error:
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial.name)
        raise DataError(f"{target} cannot be written ({error}): {remedy}") from error


# --- Reading it -----------------------------------------------------------------------------------


def _read_zip(folder: Path, set_name: str) -> list[_Drawing]:
    path = _zip_path(folder, set_name)
    try:
        with zipfile.ZipFile(path) as archive:
            return [
                _Drawing(m[1], int(m[2]), int(m[3]), archive.read(name), f"{path}/{name}")
                for name in archive.namelist()
                if (m := _IMAGE_PATH.fullmatch(name))
            ]
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise DataError(
            f"{path} is truncated or corrupt ({error}): replace it from {_URL}/{set_name}.zip"
        ) from error


def _read_tfds(folder: Path, set_name: str) -> list[_Drawing]:
    """Reads one split of the prepared dataset, and works out who drew what.

    The records do not name the drawer. TFDS writes them in the order of the md5 of split name and
    key, an order it promises to keep, and its keys end in the drawer; so the sorted keys tell.
    """
    split = _TFDS_SPLITS[set_name]
    builder = open_builder(folder)
    alphabets = builder.info.features["alphabet"].names
    records = [
        (alphabets[r["alphabet"]], int(r["alphabet_char_id"]), int(r["label"]), r["image"])
        for r in read_records(builder, split)
    ]
    keys = [
        (alphabet, character, drawer, f"{alphabet}_{character}_{label + 1:04d}_{drawer:02d}.png")
        for alphabet, character, label in sorted({record[:3] for record in records})
        for drawer in range(1, _DRAWERS + 1)
    ]
    keys.sort(key=lambda key: hashlib.md5(f"{split}{key[-1]}".encode()).digest())
    if [key[:2] for key in keys] != [record[:2] for record in records]:
        raise DataError(
            f"split {split!r} of {folder} is incomplete or out of TFDS's order: "
            "prepare it again, or use the two zips"
        )
    return [
        _Drawing(alphabet, character + 1, drawer, png, f"{folder}, split {split!r}, {key}")
        for (alphabet, character, drawer, key), (_, _, _, png) in zip(keys, records, strict=True)
    ]
