"""Images from files: decoding, resizing, channels."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from meta_jax.data import pixels
from meta_jax.data.dataset import DataError
from meta_jax.host import check_memory

if TYPE_CHECKING:
    from PIL.Image import Image

RESAMPLE_FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def is_image_file(path: Path | str) -> bool:
    """Whether a file's name ends as those of images do, in either case.

    Examples:
      >>> is_image_file("cats/1.JPG"), is_image_file("cats/notes.txt")
      (True, False)
    """
    return str(path).lower().endswith(EXTENSIONS)


def open_image(source: bytes | str, name: str) -> "Image":
    """Opens and fully decodes an image, upright as its EXIF orientation says.

    Args:
      source: Bytes of an image file, or its path.
      name: Name of the image in an error.

    Raises:
      DataError: the file is absent or a folder, or the image does not decode.
    """
    try:
        return pixels.decode(source)
    except pixels.ImageError as error:
        if isinstance(source, str) and Path(source).is_dir():
            raise DataError(f"{name} is a folder: give the images in it") from error
        if isinstance(source, str) and not Path(source).exists():
            raise DataError(f"{name} does not exist: correct its name") from error
        raise broken_image(name, str(error)) from error


def broken_image(name: str, reason: str) -> DataError:
    """The error that names an image that does not decode.

    Args:
      name: Name of the image.
      reason: What is wrong with it.
    """
    reason = " ".join(reason.split())
    return DataError(f"{name} does not decode as an image ({reason}): replace it or remove it")


def resize_image(image: "Image", image_size: int, resample: str = "lanczos") -> np.ndarray:
    """Resizes a greyscale ('L') or colour ('RGB') image to uint8 [image_size, image_size, C].

    Raises:
      DataError: `image_size` is not positive, or `resample` is not in `RESAMPLE_FILTERS`.
    """
    check_image_size(image_size)
    if resample not in RESAMPLE_FILTERS:
        raise DataError(f"resample {resample!r} is none of {', '.join(RESAMPLE_FILTERS)}")
    return pixels.resized(image, image_size, resample)


def image_pixels(image: "Image", image_size: int, name: str = "the image") -> np.ndarray:
    """Turns an image of any mode into uint8 [image_size, image_size, 1 (grey) or 3 (colour)].

    Transparency is laid on white, and 1-bit images become 0 and 255. Grey of more than 8 bits has
    the smallest depth of 8, 12 and 16 bits that holds the image's largest value: a 16-bit file
    whose values fill 12 bits keeps the upper 8 of these. Real numbers in [0, 1] are shares of
    white.

    Args:
      image: Decoded image.
      image_size: Side in pixels after resizing.
      name: Name of the image in an error.

    Raises:
      DataError: `image_size` is not positive, or values are negative, not a number or above 16
        bits.
    """
    try:
        return resize_image(pixels.to_eight_bits(image), image_size)
    except pixels.ImageError as error:
        raise broken_image(name, str(error)) from error


def check_image_size(image_size: int, images: int = 1) -> None:
    """Refuses a size that is none, or whose images would not fit the memory.

    Args:
      image_size: Side in pixels.
      images: Number of images that are kept at least, of one byte a pixel.

    Raises:
      DataError: the size is not positive.
      UsageError: the images need more memory than there is.
    """
    if image_size < 1:
        raise DataError(f"image_size must be at least 1 pixel, not {image_size}")
    check_memory(
        f"image_size={image_size} of {images} images",
        images * image_size**2,
        "choose a smaller one",
    )
