"""Images on the device, grouped by class, and the named splits of a dataset."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

RESAMPLE_FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


class DataError(ValueError):
    """The data at hand cannot serve the request; the message names the culprit and the remedy."""


class ImageDataset(NamedTuple):
    """One split, as arrays only, so that it is passed as an ARGUMENT of a jitted function.

    Closed over instead, the images would be compiled into the program as a constant.
    """

    images: jax.Array  # uint8 [classes, examples, height, width, channels], zeros where padded
    counts: jax.Array  # int32 [classes], how many examples of each class are real
    groups: (
        jax.Array
    )  # int32 [classes], the class's group (alphabet, script), 0 where there is none


class Splits(NamedTuple):
    """A dataset by split, with the names that the arrays cannot hold."""

    datasets: dict[str, ImageDataset]  # 'train', 'val', 'test' (and 'trainval' where defined)
    class_names: dict[str, tuple[str, ...]]  # by split, one name for each class, unique
    group_names: tuple[str, ...]  # indexed by `ImageDataset.groups`


def stack_classes(
    images: Sequence[np.ndarray], groups: Sequence[int] | None = None
) -> ImageDataset:
    """Stacks classes of unequal sizes, padding the smaller ones with zero images at their end.

    Args:
      images: one uint8 array [n_i, height, width, channels] for each class, n_i >= 1, all of one
        image shape.
      groups: the group of each class; all 0 if None.

    Returns:
      The dataset, [classes, max n_i, height, width, channels], with `counts` = n_i.

    Raises:
      DataError: there is no class, a class is empty, or image shapes or types differ.
    """
    if not images:
        raise DataError("a dataset needs at least one class, but none was given")
    shape = images[0].shape[1:]
    for index, array in enumerate(images):
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != shape:
            raise DataError(
                f"class {index} has {array.dtype} images of shape {array.shape}, "
                f"but the first class fixes uint8 [n, {', '.join(map(str, shape))}]"
            )
        if not len(array):
            raise DataError(f"class {index} has no images: leave it out")
    groups = [0] * len(images) if groups is None else groups
    if len(groups) != len(images):
        raise DataError(f"{len(groups)} groups were given for {len(images)} classes")
    counts = np.array([len(array) for array in images], np.int32)
    stacked = np.zeros((len(images), counts.max(), *shape), np.uint8)
    for row, array in zip(stacked, images, strict=True):
        row[: len(array)] = array
    return ImageDataset(
        jnp.asarray(stacked), jnp.asarray(counts), jnp.asarray(np.asarray(groups, np.int32))
    )


def make_splits(
    members: Mapping[str, Sequence[int]],
    images: Sequence[np.ndarray],
    class_names: Sequence[str],
    groups: Sequence[int],
    group_names: Sequence[str],
) -> Splits:
    """Builds `Splits` from all classes of a dataset and the indices of each split's classes.

    Args:
      members: by split name, indices into the other arguments, in the order wanted.
      images: one uint8 array [n_i, height, width, channels] for each class.
      class_names: one unique name for each class.
      groups: one index into `group_names` for each class.
      group_names: the names of the groups.

    Raises:
      DataError: as `stack_classes` does.
    """
    return Splits(
        datasets={
            split: stack_classes([images[i] for i in rows], [groups[i] for i in rows])
            for split, rows in members.items()
        },
        class_names={split: tuple(class_names[i] for i in rows) for split, rows in members.items()},
        group_names=tuple(group_names),
    )


def random_class_split(
    n_classes: int, seed: int, fractions: tuple[float, float, float] = (0.64, 0.16, 0.20)
) -> dict[str, np.ndarray]:
    """Splits class indices at random into disjoint 'train', 'val' and 'test' that cover them all.

    The default fractions are those of miniImageNet's 64/16/20 classes (Ravi and Larochelle 2017).

    Args:
      n_classes: how many classes there are, at least 3.
      seed: the same seed always gives the same split.
      fractions: the shares of train, val and test, positive, summing to 1; every split gets at
        least one class.

    Returns:
      By split, the sorted indices, int [classes of the split].

    Raises:
      DataError: fewer than 3 classes, or fractions that are no shares of 1.
    """
    if n_classes < 3:
        raise DataError(
            f"{n_classes} class(es) cannot be split into train, val and test: at least 3 are needed"
        )
    if len(fractions) != 3 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise DataError(f"split fractions must be three positive numbers of sum 1: {fractions}")
    n_val, n_test = (max(1, round(f * n_classes)) for f in fractions[1:])
    # Small sets round up to more than all classes; train, then val, is served first.
    n_test = min(n_test, n_classes - 2)
    n_val = min(n_val, n_classes - n_test - 1)
    order = np.random.default_rng(seed).permutation(n_classes)
    test, val, train = np.split(order, [n_test, n_test + n_val])
    return {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}


def open_image(source: bytes | str, name: str) -> "Image":
    """Opens and fully decodes an image.

    Args:
      source: the bytes of an image file, or its path.
      name: what to call the image in an error.

    Raises:
      DataError: the image does not decode.
    """
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        image.load()
    # PIL reports a broken file as any of these, by format and by where it is broken.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{name} does not decode as an image ({error}): replace it or remove it"
        ) from error
    return image


def resize_image(image: "Image", image_size: int, resample: str = "lanczos") -> np.ndarray:
    """Resizes a greyscale ('L') or colour ('RGB') image to uint8 [image_size, image_size, C].

    Raises:
      DataError: `image_size` is not positive, or `resample` is not in `RESAMPLE_FILTERS`.
    """
    from PIL import Image

    check_image_size(image_size)
    if resample not in RESAMPLE_FILTERS:
        raise DataError(f"resample {resample!r} is none of {', '.join(RESAMPLE_FILTERS)}")
    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling[resample.upper()])
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def image_pixels(image: "Image", image_size: int) -> np.ndarray:
    """Turns an image of any mode into uint8 [image_size, image_size, 1 (grey) or 3 (colour)].

    Transparency is laid on white; 1-bit images become 0 and 255, and 16-bit ones lose 8 bits.

    Raises:
      DataError: `image_size` is not positive.
    """
    from PIL import Image

    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    elif image.mode.startswith("I"):
        # Pillow would clip 16-bit values at 255 instead.
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    else:
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    return resize_image(image, image_size)


def unify_channels(
    classes: Sequence[Sequence[np.ndarray]], grey: bool | None = None
) -> list[np.ndarray]:
    """Stacks the images of each class, giving all of them the same number of channels.

    Args:
      classes: for each class its images, uint8 [height, width, 1 or 3].
      grey: True for 1 channel (the luma of ITU-R 601-2), False for 3; if None, 1 unless some image
        has a colour.

    Returns:
      One uint8 array [n_i, height, width, 1 or 3] for each class.
    """
    if grey is None:
        grey = not any(_has_colour(image) for images in classes for image in images)
    convert = _to_grey if grey else _to_colour
    return [np.stack([convert(image) for image in images]) for images in classes]


def _has_colour(image: np.ndarray) -> bool:
    return bool((image != image[..., :1]).any())


def _to_colour(image: np.ndarray) -> np.ndarray:
    return np.broadcast_to(image, (*image.shape[:2], 3))


def _to_grey(image: np.ndarray) -> np.ndarray:
    if not _has_colour(image):
        return image[..., :1]
    luma = image @ np.array([0.299, 0.587, 0.114])
    return luma.round().astype(np.uint8)[..., None]


def check_image_size(image_size: int) -> None:
    """Raises DataError unless `image_size` (pixels a side) is positive."""
    if image_size < 1:
        raise DataError(f"image_size must be at least 1 pixel, not {image_size}")
