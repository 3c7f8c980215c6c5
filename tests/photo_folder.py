"""Makes a folder of photos as people have them: of all formats, sizes and habits.

python tests/photo_folder.py FOLDER [CLASSES [PHOTOS [FIRST_CLASS]]]
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

NAMES = (
    *("Äpfel rot", "bicycle", "chess piece", "dandelion", "église", "fern", "glove", "hat", "igel"),
    *("jug", "kite", "lamp", "mug", "nut", "owl", "pear", "quill", "rake", "shoe", "tie"),
)
# Mode, ending and what else is special.
KINDS = (
    ("RGB", ".png", {}),
    ("RGB", ".jpg", {}),
    ("RGB", ".JPEG", {"orientation": 6}),
    ("RGB", ".webp", {}),
    ("RGB", ".tif", {}),
    ("RGB", ".gif", {}),
    ("RGBA", ".png", {}),
    ("CMYK", ".jpg", {}),
    ("I;16", ".png", {}),
    ("P", ".PNG", {}),
    ("L", ".bmp", {}),
)
SIDES = (20, 45, 90, 160, 300, 640, 2000)


def draw(kind: int, rng: np.random.Generator, side: int) -> Image.Image:
    """A coloured shape of a class on a noisy background."""
    colour = np.random.default_rng(kind).integers(0, 256, 3)
    background = rng.integers(150, 256, 3)
    image = Image.new("RGB", (side, int(side * rng.uniform(0.7, 1.3)) + 1), tuple(background))
    pen, (width, height) = ImageDraw.Draw(image), image.size
    centre = rng.uniform(0.4, 0.6, 2)
    points = 3 + kind % 6
    radii = np.random.default_rng(100 + kind).uniform(0.12, 0.4, points)
    turn = rng.uniform(0, 0.6)
    angles = 2 * np.pi * np.arange(points) / points + turn
    corners = [
        ((centre[0] + r * np.cos(a)) * width, (centre[1] + r * np.sin(a)) * height)
        for r, a in zip(radii, angles, strict=True)
    ]
    pen.polygon(corners, fill=tuple(int(c) for c in colour))
    return image


def save(image: Image.Image, mode: str, path: Path, orientation: int | None = None) -> None:
    """Writes an image in a mode; with an EXIF orientation, lying on its side."""
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    elif mode == "P":
        image = image.quantize(32)
    elif image.mode != mode:
        image = image.convert(mode)
    if orientation is None:
        image.save(path)
        return
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def make_photos(folder: Path, classes: int = 12, photos: int = 25, first: int = 0) -> None:
    """Makes `classes` class folders with `photos` each; the first has three, and there is rubbish.

    Args:
      folder: Where to make them.
      classes: Number of class folders.
      photos: Photos in each; all but the first class has them.
      first: Number of the first class.
    """
    rng = np.random.default_rng(first)
    for kind in range(first, first + classes):
        own = folder / NAMES[kind]
        own.mkdir(parents=True)
        for j in range(3 if kind == 0 and photos > 3 else photos):
            mode, ending, settings = KINDS[(kind + j) % len(KINDS)]
            side = SIDES[(j + 3 * kind) % (len(SIDES) - (j > 0 or kind > 2))]
            save(draw(kind, rng, side), mode, own / f"photo {j}{ending}", **settings)
    if first == 0:
        (folder / NAMES[1] / "notes.txt").write_text("not a photo")
        nested = folder / NAMES[2] / "more"
        nested.mkdir()
        save(draw(2, rng, 45), "RGB", nested / "hidden away.png")


if __name__ == "__main__":
    make_photos(Path(sys.argv[1]), *map(int, sys.argv[2:]))
