"""Omniglot: 1623 handwritten characters of 50 alphabets, 20 drawers each.

Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through probabilistic program
induction", Science 2015. Read from the two official zips, or from a prepared TensorFlow Datasets
folder (without TensorFlow); both give the same pixels in the same order.
"""

import contextlib
import hashlib
import os
import re
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meta_jax.data.dataset import DataError, Splits, make_splits, open_image, resize_image
from meta_jax.data.tfds_images import open_builder, read_records, tfds_data_dir

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
SPLIT_RULES = ("vinyals", "lake")


class _Drawing(NamedTuple):
    """One image before it is decoded; sorts by alphabet, character and drawer."""

    alphabet: str
    character: int  # from 1
    drawer: int  # from 1
    png: bytes
    name: str  # where it was found, for errors


def load_omniglot(
    data_dir: str | os.PathLike | None = None,
    *,
    split_rule: str = "vinyals",
    image_size: int = 28,
    invert: bool = True,
    resample: str = "lanczos",
) -> Splits:
    """Loads Omniglot, uint8 [classes, 20, image_size, image_size, 1].

    Classes are in alphabetical order of (alphabet, character) and named like 'Greek/character01';
    example j is drawer j + 1 everywhere; groups are the 50 alphabets.

    Split rules, in characters before rotations:
      * 'vinyals': train 1028, val 172, trainval 1200, test 423 (Matching Networks, Vinyals et al.
        2016, as released with Prototypical Networks, Snell et al. 2017). trainval = the 964
        background characters and the first 236 evaluation characters.
      * 'lake': train 792, val 172, trainval 964 (background), test 659 (evaluation).
    In both, val = the characters of Armenian, Bengali, Early_Aramaic, Hebrew and Georgian.

    Published preprocessing differs by author. The drawings are made greyscale before they are
    resized, with 'lanczos' as in Relation Networks (Sung et al. 2018): Pillow resizes 1-bit images
    by 'nearest', whatever filter it is given.

    Args:
      data_dir: a folder with images_background.zip and images_evaluation.zip, or a TFDS data
        folder (or its `omniglot` folder). If empty: TFDS's own folder ($TFDS_DATA_DIR or
        ~/tensorflow_datasets) if Omniglot is prepared there, else the official zips, downloaded
        once to ~/.cache/meta_jax/omniglot.
      split_rule: 'vinyals' or 'lake'.
      image_size: side in pixels; 105 keeps the original.
      invert: True for ink 255 on 0, False for the files' ink 0 on 255.
      resample: Pillow's filter: 'nearest', 'box', 'bilinear', 'hamming', 'bicubic' or 'lanczos'.

    Raises:
      DataError: the data is missing, incomplete or corrupt, or cannot be downloaded, or an
        argument is none of those allowed.
    """
    if split_rule not in SPLIT_RULES:
        raise DataError(f"Omniglot split rule {split_rule!r} is none of {', '.join(SPLIT_RULES)}")
    folder = _find(data_dir)
    read = _read_zip if _has_zips(folder) else _read_tfds
    drawings_by_set = {name: sorted(read(folder, name)) for name in _SETS}
    for name, drawings in drawings_by_set.items():
        _check_complete(drawings, name, folder)

    drawings = sorted(d for ds in drawings_by_set.values() for d in ds)
    pixels = np.stack([_pixels(d, image_size, resample) for d in drawings])
    if invert:
        pixels = 255 - pixels
    images = pixels.reshape(-1, _DRAWERS, *pixels.shape[1:])
    classes = [(d.alphabet, d.character) for d in drawings[::_DRAWERS]]
    background, evaluation = (
        sorted({(d.alphabet, d.character) for d in drawings_by_set[name]}) for name in _SETS
    )
    alphabets = sorted({alphabet for alphabet, _ in classes})
    index = {c: i for i, c in enumerate(classes)}
    return make_splits(
        {
            split: [index[c] for c in sorted(members)]
            for split, members in _split(background, evaluation, split_rule).items()
        },
        images,
        class_names=[f"{alphabet}/character{character:02d}" for alphabet, character in classes],
        groups=[alphabets.index(alphabet) for alphabet, _ in classes],
        group_names=alphabets,
    )


def _split(
    background: list[tuple[str, int]], evaluation: list[tuple[str, int]], rule: str
) -> dict[str, list[tuple[str, int]]]:
    extra = _VINYALS_TRAINVAL_FROM_EVALUATION if rule == "vinyals" else 0
    trainval = background + evaluation[:extra]
    return {
        "train": [c for c in trainval if c[0] not in _VAL_ALPHABETS],
        "val": [c for c in trainval if c[0] in _VAL_ALPHABETS],
        "trainval": trainval,
        "test": evaluation[extra:],
    }


def _pixels(drawing: _Drawing, image_size: int, resample: str) -> np.ndarray:
    # Greyscale first: Pillow would resize a 1-bit image by nearest neighbour whatever the filter.
    return resize_image(open_image(drawing.png, drawing.name).convert("L"), image_size, resample)


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
    """The folder of the two zips, or the versioned folder of the prepared TFDS dataset."""
    if not data_dir:
        return _tfds_folder(tfds_data_dir(None)) or _downloaded()
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise DataError(f"the Omniglot folder {folder} does not exist: correct --data_dir")
    zips = [folder / f"{name}.zip" for name in _SETS]
    missing = [path.name for path in zips if not path.is_file()]
    if len(missing) == 1:
        raise DataError(f"{folder} has no {missing[0]}: get it from {_URL}/{missing[0]}")
    prepared = folder if not missing else _tfds_folder(folder)
    if prepared is None:
        raise DataError(
            f"{folder} holds neither {' and '.join(missing)} (get them from {_URL}) "
            "nor a prepared TFDS omniglot: correct --data_dir"
        )
    return prepared


def _has_zips(folder: Path) -> bool:
    return all((folder / f"{name}.zip").is_file() for name in _SETS)


def _tfds_folder(folder: Path) -> Path | None:
    infos = [
        info
        for pattern in ("omniglot/3.*", "3.*", ".")
        for info in sorted(folder.glob(f"{pattern}/dataset_info.json"))
    ]
    return infos[0].parent if infos else None


def _downloaded() -> Path:
    folder = Path(_CACHE).expanduser()
    for name, (_, sha256) in _SETS.items():
        if not (folder / f"{name}.zip").is_file():
            _download(f"{_URL}/{name}.zip", sha256, folder / f"{name}.zip")
    return folder


def _download(url: str, sha256: str, target: Path) -> None:
    """Leaves the whole, verified file at `target`, or nothing."""
    remedy = (
        "download images_background.zip and images_evaluation.zip by hand from "
        f"{_URL} and pass their folder as --data_dir"
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
    path = folder / f"{set_name}.zip"
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
