"""From inputs as they come (files, arrays of any size and range) to what a learner was trained on.

The record of a run says how an input must look: size, channels, polarity. What can be told from the
inputs is converted; what cannot be told is refused.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from meta_jax.concrete import check_finite
from meta_jax.core import PyTree
from meta_jax.data.polarity import Ink, ink_of, paper
from meta_jax.lookup import UsageError

ValueRange = Literal["0..1", "0..255"]


class InputForm(NamedTuple):
    """How a learner's inputs look.

    Attributes:
      example: One input, leaves with shape and dtype.
      preprocessing: Record of how images must look; None for other inputs.
      value_range: Range of float images; told from the images if None.
      polarity: Polarity of the images that come; told from each image if None.
    """

    example: PyTree
    preprocessing: Mapping[str, Any] | None
    value_range: ValueRange | None = None
    polarity: Ink | None = None


def prepare(inputs: Any, form: InputForm) -> tuple[PyTree, InputForm]:
    """Turns inputs into arrays that the learner takes.

    Images may be paths, Pillow images or arrays [height, width] or [height, width, channels] of any
    size, in a list or as one array [n, ...]. Bytes (uint8 and other integers up to 255) and floats
    in [0, 1] or in 0 to 255 are told apart, by the largest value. Where the learner was trained on
    ink of one polarity, the border of each image tells its own. Other inputs must have the shape
    and the kind of number that the learner was trained on.

    Args:
      inputs: Images, or a pytree of arrays [n, ...].
      form: How they must look.

    Returns:
      Arrays [n, ...], and the form with the value range that was found.

    Raises:
      UsageError: inputs of another shape or kind, or images whose range or polarity cannot be told.
    """
    if (form.preprocessing or {}).get("kind") != "image":
        return _arrays(inputs, form.example), form
    return _images(inputs, form)


# ---- Images.


def _images(inputs: Any, form: InputForm) -> tuple[np.ndarray, InputForm]:
    from meta_jax.data.pixels import with_channels

    record = form.preprocessing or {}
    images = _as_list(inputs)
    names = [_name(image, index) for index, image in enumerate(images)]
    arrays = [image if _is_file(image) else np.asarray(image) for image in images]
    form = form._replace(value_range=_value_range(arrays, names, form.value_range))
    pixels = [_pixels(*pair, record, form) for pair in zip(arrays, names, strict=True)]
    stacked = np.stack([with_channels(image, record["channels"]) for image in pixels])
    x = stacked.astype(np.float32) / np.float32(255)
    wanted = record.get("polarity")
    if wanted in ("ink_light", "ink_dark"):
        given = [form.polarity or _polarity(*pair) for pair in zip(x, names, strict=True)]
        swapped = np.array([polarity != wanted for polarity in given])
        x[swapped] = 1 - x[swapped]
    return x, form


def _as_list(inputs: Any) -> list[Any]:
    if _is_file(inputs):
        raise UsageError("one image was given: give a list of images, or an array [n, ...]")
    if not isinstance(inputs, Sequence):
        inputs = np.asarray(inputs)
        if inputs.ndim not in (3, 4) or (inputs.ndim == 3 and inputs.shape[-1] in (1, 3, 4)):
            raise UsageError(
                f"images of shape {list(inputs.shape)} are no batch: give [n, height, width] or "
                "[n, height, width, channels]"
            )
    if not len(inputs):
        raise UsageError("no image was given: give at least one")
    return list(inputs)


def _is_file(image: Any) -> bool:
    """Whether an image is a path or a Pillow image, which know their own range."""
    return isinstance(image, str | os.PathLike) or hasattr(image, "getbands")


def _name(image: Any, index: int) -> str:
    return os.fspath(image) if isinstance(image, str | os.PathLike) else f"image {index}"


def _value_range(
    arrays: list[Any], names: list[str], known: ValueRange | None
) -> ValueRange | None:
    """The range of the float images, checked; None without any."""
    largest = 0.0
    for array, name in zip(arrays, names, strict=True):
        if _is_file(array) or array.dtype == bool:
            continue
        if array.dtype.kind not in "iuf" or not array.size:
            raise UsageError(f"{name} is {array.dtype}{list(array.shape)}: give pixels as numbers")
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 255):
            raise UsageError(
                f"{name} has values from {low:g} to {high:g}: give bytes, or floats in [0, 1]"
            )
        if array.dtype.kind == "f":
            largest = max(largest, high)
        elif high == 1:
            raise UsageError(
                f"{name} has integers 0 and 1 alone, which are black as bytes: give it as bools"
            )
    has_floats = any(not _is_file(array) and array.dtype.kind == "f" for array in arrays)
    if not has_floats:
        return known
    # Resampling overshoots 1 by a little.
    found: ValueRange = "0..1" if largest <= 1.001 else "0..255"
    if known is None and 1.001 < largest < 2:
        raise UsageError(
            f"floats up to {largest:g} may be meant as [0, 1] or as 0 to 255: scale them to [0, 1]"
        )
    if known == "0..1" and found != known:
        raise UsageError(
            f"floats up to {largest:g} follow a support set in [0, 1]: scale them to [0, 1] too"
        )
    return known or found


def _pixels(image: Any, name: str, record: Mapping[str, Any], form: InputForm) -> np.ndarray:
    """One image as values 0 to 255, [size, size, 1 or 3]."""
    from PIL import Image

    from meta_jax.data.images import image_pixels, open_image, resize_image

    size, resample = record["image_size"], record.get("resample", "lanczos")
    if isinstance(image, str | os.PathLike):
        image = open_image(os.fspath(image), name)
    if _is_file(image):
        return image_pixels(image, size, name)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] not in (1, 3, 4)):
        raise UsageError(
            f"{name} has shape {list(image.shape)}: give [height, width] or [height, width, "
            "channels] with 1, 3 or 4 channels"
        )
    if image.dtype == bool or (image.dtype.kind == "f" and form.value_range == "0..1"):
        image = image.astype(np.float32) * 255
    ready = image.reshape(*image.shape[:2], -1)
    if ready.shape[:2] == (size, size) and ready.shape[2] in (1, 3):
        return ready  # without rounding to bytes
    picture = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    picture = Image.fromarray(
        picture[..., 0] if ready.shape[2] == 1 and image.ndim == 3 else picture
    )
    if picture.mode == "RGBA":
        return image_pixels(picture, size, name)
    return resize_image(picture, size, resample)


def _polarity(x: np.ndarray, name: str) -> Ink:
    """Whether an image [size, size, channels] in [0, 1] has light ink on dark, by its border."""
    found = ink_of(float(paper(x[None])[0]))
    if found is None:
        raise UsageError(
            f"{name} has a grey border, so that ink and paper cannot be told apart: say "
            "polarity='ink_dark' or 'ink_light'"
        )
    return found


# ---- Other inputs.


def _arrays(inputs: PyTree, example: PyTree) -> PyTree:
    import jax

    inputs = jax.tree.map(np.asarray, inputs, is_leaf=lambda node: isinstance(node, list))
    if jax.tree.structure(inputs) != jax.tree.structure(example):
        raise UsageError(
            f"inputs have the structure {jax.tree.structure(inputs)}, and the learner was trained "
            f"on {jax.tree.structure(example)}"
        )
    made = jax.tree.map(_array, inputs, example)
    sizes = {len(leaf) for leaf in jax.tree.leaves(made)}
    if len(sizes) != 1 or 0 in sizes:
        raise UsageError(
            f"inputs have leaves of {sorted(sizes)} rows: give all the same, at least 1"
        )
    return made


def _array(array: np.ndarray, example: Any) -> np.ndarray:
    shape = tuple(example.shape)
    if array.ndim != len(shape) + 1 or array.shape[1:] != shape:
        wanted = ", ".join(["n", *map(str, shape)])
        raise UsageError(f"inputs have shape {list(array.shape)}: give [{wanted}], as in training")
    to_float = np.issubdtype(example.dtype, np.floating)
    if to_float and array.dtype == np.uint8:
        raise UsageError(
            "inputs are bytes, and the learner was trained on floats: scale them as in training"
        )
    if array.dtype.kind not in "biuf" or (array.dtype.kind == "f" and not to_float):
        raise UsageError(
            f"inputs are {array.dtype}, and the learner was trained on {example.dtype}"
        )
    try:
        check_finite(array, "the input array")
    except ValueError as error:
        raise UsageError(str(error)) from error
    return array.astype(example.dtype)
