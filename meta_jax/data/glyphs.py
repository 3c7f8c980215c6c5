"""Glyphs: few-shot character recognition without any download.

The characters of the DejaVu fonts that come with matplotlib stand in for Omniglot: a character is
a class, a script is a group (Omniglot's alphabet), and a font face under a random affine map is a
drawer. Whole scripts are held out for validation and test. The distortion is what makes the task
one of meta-learning: at 5-way 1-shot on the test split the nearest neighbour in raw pixels is right
88 % of the time without it and 40 % with it (42 % on Omniglot's).
"""

import functools
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meta_jax import registry
from meta_jax.core import Objective
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
    split_from_array,
)
from meta_jax.data.episodes import Rotations
from meta_jax.data.images import check_image_size
from meta_jax.data.polarity import Polarity
from meta_jax.data.source import TaskSource, image_preprocessing, image_source
from meta_jax.ranges import NotNegativeInt, Positive, PositiveInt

if TYPE_CHECKING:
    from PIL.Image import Image

SCRIPTS = {
    "train": ("LATIN", "GREEK", "CYRILLIC", "CANADIAN SYLLABICS", "ARABIC", "TIFINAGH", "COPTIC"),
    "val": ("HEBREW", "LAO", "NKO"),
    "test": ("GEORGIAN", "ARMENIAN"),
}
ROTATION = 15.0  # degrees, either way
SHEAR = 0.3  # either way
SCALE = (0.75, 1.25)
SHIFT = 0.08  # of the image's side, either way

_FACES = (
    *("Sans", "Sans-Oblique", "Sans-Bold", "Sans-BoldOblique"),
    *("SansMono", "SansMono-Oblique", "SansMono-Bold", "SansMono-BoldOblique"),
    *("Serif", "Serif-Italic", "Serif-Bold", "Serif-BoldItalic"),
)
_FONT_SIZE = 64  # pixels an em, when a glyph is drawn
_SUPERSAMPLING = 3  # the distorted glyph is drawn so many times larger, then averaged down
_INK = 0.7  # the longer side of the undistorted glyph, as a share of the image's side
_SHAPE_SIZE = 20  # side of the bitmaps in which shapes are compared
# The squared distance, relative to the mean squared norm, under which two shapes are one.
_SAME_SHAPE = 0.2


@registry.tasks("glyphs")
def glyphs(
    *,
    image_size: PositiveInt = 28,
    rotations: Rotations = "none",
    within_group: bool = False,
    least_ways: PositiveInt | None = None,
    least_shots: PositiveInt | None = None,
    augment: Augment = "none",
    polarity: Polarity = "ink_light",
    objective: Objective | str = "cross_entropy",
    examples: PositiveInt = 20,
    distortion_seed: NotNegativeInt = 0,
    placement: Placement = "device",
    device_memory: Positive | None = None,
) -> TaskSource:
    """Builds the source of glyphs: characters of the fonts of matplotlib, without any download.

    Args:
      image_size: Side of the images, in pixels.
      rotations: Quarter turns: 'none'; 'classes', a turned character is a class of its own;
        'per_class', one random turn for each class of an episode; 'per_episode', one for all.
      within_group: Whether all classes of an episode are of one script; in tests all of them then
        show the same drawers.
      least_ways: Smallest number of classes in a training episode. Each episode draws its number
        between this and the ways, and pads the rest; by default all have as many classes.
      least_shots: Likewise the smallest number of support examples of each class.
      augment: Random changes of training images: 'none', or 'affine' (rotation, shear, scale,
        shift).
      polarity: Polarity of the images: 'ink_light' on dark (as_is), or 'ink_dark' on light.
      objective: Objective of the tasks: 'cross_entropy', or somebody's own as
        package.module:attribute.
      examples: Number of images of each class.
      distortion_seed: Seed of the distortions that the images are drawn with; the classes and
        splits are the same under every seed.
      placement: Where the images of a split lie: 'device', or 'host' for the machine's memory, or a
        file mapped into it, from where workers of grain send the same episodes: for sets that are
        larger than the device.
      device_memory: Megabytes of a device that images may take: all of a split, or with
        placement=host the episodes that are sent ahead; by default what the device has, or 256.
    """
    storage = Storage(placement, device_memory)
    return image_source(
        load_glyphs(
            image_size=image_size, examples=examples, seed=distortion_seed, storage=storage
        ),
        image_preprocessing(image_size, 1, polarity=polarity, resample="box"),
        rotations=rotations,
        within_group=within_group,
        least_ways=least_ways,
        least_shots=least_shots,
        augment=augment,
        objective=objective,
        ink="ink_light",
    )


def load_glyphs(
    *,
    image_size: int = 28,
    examples: int = 20,
    seed: int = 0,
    storage: Storage = ON_DEVICE,
) -> Splits:
    """Draws the glyphs, uint8 [all, image_size, image_size, 1], ink 255 on 0.

    Each glyph is scaled to one size and centred, then rotated by up to 15 degrees, sheared by up
    to 0.3, scaled by 0.75 to 1.25 and shifted by up to 8 % of the side, all drawn uniformly.
    Example j shows face j modulo the number of faces that have the character (2 to 12).

    Letters that Unicode composes of others (accents, ligatures, presentation forms) are left out.
    Of letters that look alike in any face, one is kept: that of the test split before that of the
    validation split before that of the training split, so that no shape is in two splits.

    They are drawn once: what was drawn is kept in a folder that may be deleted at any time (see
    `meta_jax.data.cache`).

    Args:
      image_size: Side in pixels.
      examples: Number of images of each class.
      seed: Seed of the distortions; the classes and splits are the same under every seed.
      storage: Where the examples lie; by default on the device.

    Returns:
      'train', 'val' and 'test', each drawn when it is asked for; its scripts (groups) are those of
      `SCRIPTS`, its class names are Unicode names, like 'GEORGIAN LETTER AN'.

    Raises:
      DataError: `image_size` or `examples` is not positive, or matplotlib's fonts are not there.
    """
    check_image_size(image_size)
    if examples < 1:
        raise DataError(f"glyphs need at least 1 example of each class, not {examples}")

    prepare = functools.cache(_drawings_and_members)

    def draw(split: str) -> Split:
        state = _state()
        codes = cached(
            cache_key("letters", split, state),
            lambda: np.array([ord(letter) for letter in prepare()[1][split]]),
        )
        letters = [chr(code) for code in codes]
        check_image_size(image_size, len(letters) * examples)
        images = cached(
            cache_key("glyphs", split, image_size, examples, seed, state),
            lambda: np.concatenate(
                [_distort(c, prepare()[0][c], image_size, examples, seed) for c in letters]
            ),
            mapped=storage.placement == "host",
        )
        return split_from_array(
            images,
            [examples] * len(letters),
            class_names=[unicodedata.name(letter) for letter in letters],
            groups=[str(_script(letter)) for letter in letters],
            storage=storage,
        )

    return lazy_splits({split: functools.partial(draw, split) for split in SCRIPTS})


def _state() -> tuple[Any, ...]:
    """What the images depend on, beside the settings: this file, the fonts and the libraries."""
    from PIL import features

    distortions = (ROTATION, SHEAR, SCALE, SHIFT)
    versions = (np.__version__, *(features.version(name) for name in ("pil", "freetype2")))
    hashes = [file_hash(path) for path in (__file__, *_font_files().values())]
    return distortions, versions, unicodedata.unidata_version, hashes


def _font_files() -> dict[str, Path]:
    """The font of each face."""
    import matplotlib

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    files = {face: folder / f"DejaVu{face}.ttf" for face in _FACES}
    for path in files.values():
        if not path.is_file():
            raise DataError(f"the font {path} is missing: install matplotlib from PyPI again")
    return files


def _drawings_and_members() -> tuple[dict[str, dict[str, "Image"]], dict[str, list[str]]]:
    """All letters as they are drawn, and those of each split."""
    drawings = _draw_letters()
    return drawings, _distinct({split: _letters(drawings, split) for split in SCRIPTS}, drawings)


def _script(letter: str) -> str | None:
    name = unicodedata.name(letter, "")
    scripts = (script for names in SCRIPTS.values() for script in names)
    return next((script for script in scripts if name.startswith(f"{script} ")), None)


def _is_wanted(letter: str) -> bool:
    return (
        unicodedata.category(letter).startswith("L")
        and not unicodedata.decomposition(letter)
        and _script(letter) is not None
    )


def _letters(drawings: dict[str, dict[str, "Image"]], split: str) -> list[str]:
    return [letter for letter in sorted(drawings) if _script(letter) in SCRIPTS[split]]


def _draw_letters() -> dict[str, dict[str, "Image"]]:
    """By letter and face, the letter in white on black, cropped to its ink."""
    from matplotlib.ft2font import FT2Font
    from PIL import Image, ImageDraw, ImageFont

    drawings: dict[str, dict[str, Image.Image]] = {}
    for face, path in _font_files().items():
        # The basic layout draws the same everywhere; the other needs an optional library.
        font = ImageFont.truetype(path, _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
        for letter in filter(_is_wanted, map(chr, FT2Font(str(path)).get_charmap())):
            canvas = Image.new("L", (4 * _FONT_SIZE, 3 * _FONT_SIZE))
            ImageDraw.Draw(canvas).text((_FONT_SIZE, _FONT_SIZE), letter, fill=255, font=font)
            if ink := canvas.getbbox():
                drawings.setdefault(letter, {})[face] = canvas.crop(ink)
    return drawings


def _distinct(
    candidates: dict[str, list[str]], drawings: dict[str, dict[str, "Image"]]
) -> dict[str, list[str]]:
    """Keeps, of letters that look alike in any face, the first: of test, then val, then train."""
    letters = [letter for split in ("test", "val", "train") for letter in candidates[split]]
    alike = np.zeros((len(letters), len(letters)), bool)
    for face in _FACES:
        rows = [i for i, letter in enumerate(letters) if face in drawings[letter]]
        shapes = np.stack([_shape(drawings[letters[i]][face]) for i in rows])
        norms = (shapes**2).sum(1)
        mean_norms = (norms[:, None] + norms) / 2
        distances = 2 * (mean_norms - shapes @ shapes.T) / mean_norms
        alike[np.ix_(rows, rows)] |= distances < _SAME_SHAPE
    kept: list[int] = []
    for i in range(len(letters)):
        if not alike[i, kept].any():
            kept.append(i)
    distinct = {letters[i] for i in kept}
    return {split: [c for c in candidates[split] if c in distinct] for split in candidates}


def _shape(drawing: "Image") -> np.ndarray:
    """What remains of a drawing without its size and position, [_SHAPE_SIZE^2] in 0 to 1."""
    from PIL import ImageOps

    shape = ImageOps.pad(drawing, (_SHAPE_SIZE, _SHAPE_SIZE))
    return np.asarray(shape, np.float32).ravel() / 255


def _distort(
    letter: str, faces: dict[str, "Image"], image_size: int, examples: int, seed: int
) -> np.ndarray:
    """Draws the examples of one letter, uint8 [examples, image_size, image_size, 1]."""
    from PIL import Image

    # Its own stream for each letter: its images do not depend on which other letters there are.
    rng = np.random.default_rng([seed, ord(letter)])
    side = image_size * _SUPERSAMPLING
    drawings = list(faces.values())
    images = []
    for j in range(examples):
        drawing = drawings[j % len(drawings)]
        angle = np.deg2rad(rng.uniform(-ROTATION, ROTATION))
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        shear = np.array([[1.0, rng.uniform(-SHEAR, SHEAR)], [0.0, 1.0]])
        scale = rng.uniform(*SCALE) * _INK * side / max(drawing.size)
        shift = rng.uniform(-SHIFT, SHIFT, 2) * side
        # Pillow wants the map from the image's coordinates back to those of the drawing.
        back = np.linalg.inv(scale * rotation @ shear)
        offset = np.array(drawing.size) / 2 - back @ (side / 2 + shift)
        image = drawing.transform(
            (side, side),
            Image.Transform.AFFINE,
            np.column_stack([back, offset]).ravel().tolist(),
            resample=Image.Resampling.BILINEAR,
        )
        images.append(np.asarray(image.reduce(_SUPERSAMPLING)))
    return np.stack(images)[..., None]
