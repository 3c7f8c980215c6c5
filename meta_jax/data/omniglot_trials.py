"""The official one-shot trials of Omniglot: 20 runs of 20-way classification within an alphabet.

Lake, Salakhutdinov and Tenenbaum, Science 2015; `all_runs.zip` of the Omniglot repository. Each
of the folders run01 to run20 has a file class_labels.txt with a line for each of the 400 trials,
'run01/test/item01.png run01/training/class09.png': a test image, and the training image of its
class. All training images of a run are by one drawer, all test images by another.
"""

import os
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from meta_jax.core import Batch, Episode
from meta_jax.data.dataset import DataError
from meta_jax.data.omniglot import character_pixels
from meta_jax.data.polarity import Ink, ink_of, paper
from meta_jax.lookup import local_path

RUNS = 20
_WAYS = 20
_LABELS = re.compile(r"(?:(?!__MACOSX)[^/]+/)?run\d\d/class_labels\.txt")
_REMEDY = "get all_runs.zip of the Omniglot repository, python/one-shot-classification, again"


class _Files(NamedTuple):
    names: Sequence[str]  # of the files class_labels.txt, relative to the archive
    read: Callable[[str], bytes]


def load_trials(
    path: str | os.PathLike, *, image_size: int = 28, polarity: Ink = "ink_light"
) -> Episode:
    """Loads the official trials as one episode for each run.

    Args:
      path: all_runs.zip, or the folder of its run01 to run20.
      image_size: Side in pixels to which the drawings are resized, as `load_omniglot` does.
      polarity: 'ink_light' for ink 1 on 0, 'ink_dark' for ink 0 on 1.

    Returns:
      The episodes, stacked: support and query have x float32 [20, 20, image_size, image_size, 1]
      and y one-hot [20, 20, 20]. Classes and queries are in the order of their files' names.

    Raises:
      DataError: there is no such file or folder, or it does not hold the trials.

    Examples:
      >>> trials = load_trials("all_runs.zip")  # doctest: +SKIP
      >>> trials.query.y.shape  # doctest: +SKIP
      (20, 20, 20)
    """
    root = local_path(path)
    if root.is_dir():
        return _load(_folder_files(root), root, image_size, polarity)
    if not root.is_file():
        raise DataError(f"{root} is neither a folder nor a zip of runs: correct it")
    try:
        with zipfile.ZipFile(root) as archive:
            return _load(_Files(archive.namelist(), archive.read), root, image_size, polarity)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{root} is truncated or corrupt ({error}): {_REMEDY}") from error


def _folder_files(root: Path) -> _Files:
    found = [*root.glob("run*/class_labels.txt"), *root.glob("*/run*/class_labels.txt")]
    names = [path.relative_to(root).as_posix() for path in found]
    return _Files(names, lambda name: (root / name).read_bytes())


def _load(files: _Files, root: Path, image_size: int, polarity: Ink) -> Episode:
    labels = sorted(name for name in files.names if _LABELS.fullmatch(name))
    if len(labels) != RUNS:
        raise DataError(
            f"{root} has {len(labels)} folders run01, run02, ... with a class_labels.txt, not "
            f"{RUNS}: {_REMEDY}"
        )
    runs = [_run(files, name, root, image_size) for name in labels]
    train, test, y = (np.stack(parts) for parts in zip(*runs, strict=True))
    if ink_of(float(np.median(paper(np.concatenate([*train, *test]) / 255)))) != polarity:
        train, test = 255 - train, 255 - test
    one_each = np.broadcast_to(np.eye(_WAYS, dtype=np.float32), y.shape)
    return Episode(Batch(_scaled(train), one_each), Batch(_scaled(test), y))


def _run(
    files: _Files, labels: str, root: Path, image_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training images, test images and the latter's one-hot classes of one run."""
    # Where the archive was unpacked, paths may begin with other folders than here.
    lines = _read(files, labels, root).decode().split("\n")
    pairs = [[name.split("/")[-2:] for name in line.split()] for line in lines if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise DataError(f"{root}/{labels} has lines that are no pairs of paths: {_REMEDY}")
    answers = {"/".join(test): "/".join(train) for test, train in pairs}
    tests, classes = sorted(answers), sorted(set(answers.values()))
    if not len(pairs) == len(tests) == len(classes) == _WAYS:
        raise DataError(
            f"{root}/{labels} pairs {len(tests)} test images with {len(classes)} classes, not "
            f"{_WAYS} with {_WAYS}: {_REMEDY}"
        )
    folder = labels.rpartition("/")[0]

    def images(names: Sequence[str]) -> np.ndarray:
        paths = [f"{folder}/{name}" for name in names]
        return np.stack(
            [character_pixels(_read(files, p, root), f"{root}/{p}", image_size) for p in paths]
        )

    answered = np.array([classes.index(answers[name]) for name in tests])
    return images(classes), images(tests), np.eye(_WAYS, dtype=np.float32)[answered]


def _read(files: _Files, name: str, root: Path) -> bytes:
    try:
        return files.read(name)
    except (KeyError, OSError) as error:
        raise DataError(f"{root} has no readable {name}: {_REMEDY}") from error


def _scaled(images: np.ndarray) -> np.ndarray:
    return images.astype(np.float32) / 255
