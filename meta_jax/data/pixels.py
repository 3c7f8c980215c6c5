"""Decoding of images, with Pillow and NumPy alone.

Decoding processes run this file by its path (see `meta_jax.data.decoding`), so it imports nothing
of meta_jax: JAX would take seconds to start in each of them.
"""

import contextlib
import io
import os
import pickle
import signal
import struct
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_DEPTHS = (8, 12, 16)  # bits that a sample of a grey image may have
_EXIF_ORIENTATION = 0x0112


class ImageError(ValueError):
    """An image that does not decode; the message says why, not which."""


def decode(source: bytes | str) -> "Image":
    """Opens and fully decodes an image, its first frame or page, upright as EXIF says.

    Args:
      source: Bytes of an image file, or its path.

    Raises:
      ImageError: the image does not decode.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()  # which leaves a file of several frames open
            turned = upright(image)
    # PIL reports a broken file as any of these, by format and by where it is broken.
    except (
        *(OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error),
        Image.DecompressionBombError,
    ) as error:
        raise ImageError(f"{error}") from error
    return turned


def upright(image: "Image") -> "Image":
    """Turns an image as its EXIF orientation says; as it is where that is absent or damaged."""
    from PIL import ImageOps

    orientation = None
    # EXIF of any damage: it says nothing then.
    with contextlib.suppress(OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    if orientation in range(2, 9):
        return ImageOps.exif_transpose(image)
    return image


def to_eight_bits(image: "Image") -> "Image":
    """Turns an image of any mode into one of mode 'L' (grey) or 'RGB'.

    Transparency is laid on white. Grey of more than 8 bits has the smallest depth of 8, 12 and 16
    bits that holds the image's largest value, and real numbers in [0, 1] are shares of white.

    Raises:
      ImageError: values that are negative, not a number or above 16 bits, or a mode that Pillow
        cannot convert.
    """
    from PIL import Image

    # First of all: Pillow converts these by clipping at 255, transparent or not.
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_scaled(np.asarray(image)))
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image).convert("RGB")
        return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except ValueError as error:
        raise ImageError(f"mode {image.mode} of the image: {error}") from error


def _scaled(values: np.ndarray) -> np.ndarray:
    """Grey values of any depth as uint8."""
    low, high = values.min(), values.max()
    if not np.isfinite(high) or not low >= 0:  # NaN compares as False
        raise ImageError("its values are negative or not finite, so what is black is unknown")
    if np.issubdtype(values.dtype, np.floating) and high <= 1:
        white = 1
    else:
        white = next((2**bits - 1 for bits in _DEPTHS if high < 2**bits), 0)
    if not white:
        raise ImageError(f"its values go up to {high}, beyond 16 bits")
    return np.rint(values * (255 / white)).astype(np.uint8)


def resized(image: "Image", image_size: int, resample: str) -> np.ndarray:
    """Resizes an image of mode 'L' or 'RGB' to uint8 [image_size, image_size, 1 or 3]."""
    from PIL import Image

    if image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling[resample.upper()])
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def has_colour(pixels: np.ndarray) -> bool:
    """Whether pixels [..., channels] differ between channels."""
    return bool((pixels != pixels[..., :1]).any())


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Gives pixels [..., 1 or 3] 1 channel (of colours, the luma of ITU-R 601-2) or 3."""
    if channels == 3:
        return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))
    if not has_colour(pixels):
        return pixels[..., :1]
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    return luma.round().astype(np.uint8)[..., None]


def read(source: bytes | str, image_size: int, resample: str = "lanczos") -> np.ndarray:
    """Reads an image of any kind as uint8 [image_size, image_size, 1 (grey) or 3 (colour)].

    Raises:
      ImageError: the image does not decode, or its values cannot be understood.
    """
    return resized(to_eight_bits(decode(source)), image_size, resample)


class Chunk(NamedTuple):
    """Some images of one size, decoded."""

    pixels: np.ndarray  # uint8 [n, image_size, image_size, channels], 0 where one is broken
    colour: bool  # whether any of them had a colour before it got its one channel
    broken: list[tuple[int, str]]  # index and reason of each that does not decode


def read_chunk(sources: Sequence[bytes | str], image_size: int, channels: int) -> Chunk:
    """Reads images, all with the same number of channels.

    Args:
      sources: Bytes of an image file, or its path, for each.
      image_size: Side in pixels after resizing.
      channels: Number of channels, 1 or 3.
    """
    pixels = np.zeros((len(sources), image_size, image_size, channels), np.uint8)
    colour, broken = False, []
    for index, source in enumerate(sources):
        try:
            image = read(source, image_size)
        except ImageError as error:
            broken.append((index, str(error)))
            continue
        colour = colour or (channels == 1 and has_colour(image))
        pixels[index] = with_channels(image, channels)
    return Chunk(pixels, colour, broken)


def serve() -> None:
    """Reads chunks that standard input asks for, until it ends; what is found goes to the output.

    A question is the pickled arguments of `read_chunk`; an answer is the pickled `colour` and
    `broken` of its chunk, and then the bytes of its pixels.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the asking process ends this one
    questions = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    while True:
        try:
            question = pickle.load(questions)
        except EOFError:
            return
        chunk = read_chunk(*question)
        pickle.dump((chunk.colour, chunk.broken), answers)
        answers.write(chunk.pixels.data)
        answers.flush()


if __name__ == "__main__":
    serve()
