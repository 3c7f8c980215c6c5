"""A made-up archive of one-shot trials, laid out as the official all_runs.zip."""

import io
import zipfile

import numpy as np
from PIL import Image

RUNS = WAYS = 20


def drawing(run, character):
    """Black ink on white, 105x105: a pattern of the character's own, bool [105, 105]."""
    coarse = np.random.default_rng([run, character]).random((7, 7)) < 0.3
    coarse[[0, -1]] = coarse[:, [0, -1]] = False
    return ~coarse.repeat(15, 0).repeat(15, 1)


def answer(run, item, shift=0):
    """The class, from 0, of a test image."""
    return (7 * item + run + shift) % WAYS


def contents(prefix="", listed="", shift=0):
    """The files of the archive by name.

    Args:
      prefix: What their names begin with.
      listed: What the paths in class_labels.txt begin with.
      shift: By how many classes the labels of all test images are wrong.
    """
    files = {}
    for run in range(1, RUNS + 1):
        folder, lines = f"run{run:02d}", []
        for item in range(WAYS):
            shown, labelled = answer(run, item), answer(run, item, shift)
            for kind, number, character in (
                ("test/item", item, shown),
                ("training/class",) + (item,) * 2,
            ):
                name = f"{folder}/{kind}{number + 1:02d}.png"
                files[prefix + name] = png(drawing(run, character))
            lines.append(
                f"{listed}{folder}/test/item{item + 1:02d}.png "
                f"{listed}{folder}/training/class{labelled + 1:02d}.png"
            )
        files[f"{prefix}{folder}/class_labels.txt"] = ("\n".join(lines) + "\n").encode()
    return files


def png(pixels):
    """A 1-bit image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_zip(path, files):
    """Writes files into a zip."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_folder(path, files):
    """Writes files into a folder."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path
