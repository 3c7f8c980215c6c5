"""Images from files: decoding, resizing, channels."""

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from meta_jax.data.dataset import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

RESAMPLE_FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


def open_image(source: bytes | str, name: str) -> "Image":
    """Opens and fully decodes an image.

    Args:
      source: Bytes of an image file, or its path.
      name: Name of the image in an error.

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


def any_colour(images: Iterable[tuple[bytes | str, str]], image_size: int) -> bool:
    """Whether some image has a colour; images that do not decode are passed over.

    Args:
      images: Images as `open_image` takes them.
      image_size: Side in pixels at which they are looked at.
    """
    from PIL import Image

    for source, name in images:
        try:
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            # The modes of grey images are known without decoding them.
            if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
                continue
            image = open_image(source, name)
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
            continue
        if _has_colour(image_pixels(image, image_size)):
            return True
    return False


def unify_channels(classes: Sequence[Sequence[np.ndarray]], channels: int) -> list[np.ndarray]:
    """Stacks the images of each class, giving all of them the same number of channels.

    Args:
      classes: Images of each class, uint8 [height, width, 1 or 3].
      channels: Number of channels: 1 (of colours, the luma of ITU-R 601-2) or 3.

    Returns:
      One uint8 array [n_i, height, width, channels] for each class.
    """
    convert = _to_grey if channels == 1 else _to_colour
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
