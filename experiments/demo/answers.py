"""What the demo page does, without the page: pictures in, an answer out.

A user's mistake raises UsageError, whose one line the page shows.
"""

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import numpy as np

from experiments.demo.sketchpad import draw
from experiments.weights import load_weights
from meta_jax.core import Normalisation
from meta_jax.data.images import image_pixels, open_image
from meta_jax.data.polarity import Ink
from meta_jax.lookup import UsageError
from meta_jax.networks.normalisation import BATCH_MODES
from meta_jax.training.trained import Trained

if TYPE_CHECKING:
    from PIL.Image import Image

# The choices that stand for None.
AS_TRAINED = "as in training"
BY_IMAGE = "told by each image"
NORMALISATIONS = (AS_TRAINED, *BATCH_MODES)
POLARITIES = (BY_IMAGE, "ink_dark", "ink_light")

_LONGEST = 512  # pixels of an image that is kept: more than any network here sees
_THUMBNAIL = 128  # pixels
_SPEAKERS = 4  # examples shown beside an answer


class Picture(NamedTuple):
    """A drawing or an uploaded image."""

    image: "Image"
    name: str  # what messages call it
    drawn: bool  # whether it is a drawing, black on white
    label: str = ""  # class, of an example


class Settings(NamedTuple):
    """What one chooses on the page."""

    weights: str  # name of weights that come with meta_jax, or a folder
    normalisation: str = AS_TRAINED  # one of NORMALISATIONS
    polarity: str = BY_IMAGE  # one of POLARITIES
    checkpoint: Literal["best", "latest"] = "best"


class Answer(NamedTuple):
    """What the page shows of a picture."""

    probabilities: Mapping[str, float]  # by class
    speakers: Sequence[tuple["Image", str]]  # examples that speak for the best, and captions


# ---- Pictures.


def from_drawing(drawing: str | None) -> Picture:
    """The picture of a drawing.

    Args:
      drawing: The strokes, as `sketchpad` has them.

    Raises:
      UsageError: nothing is drawn.
    """
    image = draw(drawing)
    if image is None:
        raise UsageError("the drawing is empty: draw something first")
    return Picture(image, "the drawing", drawn=True)


def from_file(path: str) -> Picture:
    """The picture of an uploaded file.

    Raises:
      DataError: it is not an image.
    """
    name = Path(path).name
    image = open_image(path, name)
    return Picture(reduced(image, _LONGEST) if max(image.size) > _LONGEST else image, name, False)


def reduced(image: "Image", longest: int) -> "Image":
    """An image of any mode as grey or colour bytes, of at most `longest` pixels a side."""
    from PIL import Image

    side = min(longest, max(image.size))
    pixels = image_pixels(image, side)
    square = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
    scale = side / max(image.size)
    width, height = (max(1, round(scale * length)) for length in image.size)
    return square if width == height else square.resize((width, height))


def thumbnail(picture: Picture) -> "Image":
    """A small copy that any browser shows."""
    return reduced(picture.image, _THUMBNAIL)


# ---- Examples.


def add_drawing(examples: Sequence[Picture], label: str, drawing: str | None) -> list[Picture]:
    """The examples and a drawing of a class.

    Args:
      examples: Those that are there.
      label: Name of the class.
      drawing: As in `from_drawing`.

    Raises:
      UsageError: nothing is drawn, or the class has no name.
    """
    return [*examples, from_drawing(drawing)._replace(label=_class_name(label))]


def add_files(
    examples: Sequence[Picture], label: str, paths: Sequence[str]
) -> tuple[list[Picture], str]:
    """The examples and those uploaded files that are images.

    Args:
      examples: Those that are there.
      label: Name of their class.
      paths: The files.

    Returns:
      The examples, and a line on those files that are none; empty without any.

    Raises:
      UsageError: the class has no name.
    """
    label, added, mistakes = _class_name(label), [], []
    for path in paths:
        try:
            added.append(from_file(path)._replace(label=label))
        except UsageError as error:
            mistakes.append(str(error))
    return [*examples, *added], "; ".join(mistakes)


def _class_name(label: str) -> str:
    label = " ".join((label or "").split())
    if not label:
        raise UsageError("the class has no name: give it one, then add examples")
    return label


def summary(examples: Sequence[Picture]) -> str:
    """The number of examples of each class, in a line.

    Examples:
      >>> summary([Picture(None, "x", False, label) for label in ("a", "b", "a")])
      '3 examples of 2 classes: a (2), b (1)'
    """
    labels = [example.label for example in examples]
    classes = list(dict.fromkeys(labels))
    counts = ", ".join(f"{label} ({labels.count(label)})" for label in classes)
    return f"{len(labels)} examples of {len(classes)} classes: {counts}" if labels else ""


# ---- Answers.


def answer(examples: Sequence[Picture], query: Picture, settings: Settings) -> Iterator[Answer]:
    """Classifies a picture by the examples.

    After a change of the number of examples the learner is compiled anew, for the probabilities in
    a third of the time that the speakers take: they come first.

    Args:
      examples: Pictures with their classes, at least two different ones.
      query: The picture.
      settings: Weights, and how inputs are taken.

    Yields:
      The answer without its speakers, then with them.

    Raises:
      UsageError: too few classes, or pictures or settings that do not fit the weights.
    """
    labels = [example.label for example in examples]
    if len(set(labels)) < 2:
        raise UsageError(
            f"there are examples of {len(set(labels))} class(es): add some of at least 2"
        )
    normalisation = None if settings.normalisation == AS_TRAINED else settings.normalisation
    polarity = None if settings.polarity == BY_IMAGE else settings.polarity
    model = load_image_weights(settings.weights, settings.checkpoint)
    with _names_of(examples):
        classifier = model.adapt(
            [_as_input(example, polarity) for example in examples],
            labels,
            normalisation=cast(Normalisation | None, normalisation),
            polarity=cast(Ink | None, polarity),
        )
    inputs = [_as_input(query, polarity)]
    with _names_of([query]):
        probabilities = classifier(inputs)[0]
    by_class = dict(zip(classifier.classes, probabilities.tolist(), strict=True))
    yield Answer(by_class, [])
    best = classifier.classes[probabilities.argmax()]
    yield Answer(by_class, speakers(examples, classifier.influence(inputs)[0], best))


@functools.lru_cache(maxsize=4)
def load_image_weights(name: str, checkpoint: Literal["best", "latest"] = "best") -> Trained:
    """Loads weights, as `load_weights` does, and keeps them.

    Raises:
      UsageError: there are none, or they were not trained on images.
    """
    model = load_weights(name, checkpoint)
    if (model.preprocessing or {}).get("kind") != "image":
        raise UsageError(f"the weights {name} were not trained on images: choose others")
    return model


@contextlib.contextmanager
def _names_of(pictures: Sequence[Picture]) -> Iterator[None]:
    """Messages call the pictures by their own names instead of by their numbers."""
    try:
        yield
    except UsageError as error:
        named = re.sub(r"^image (\d+)", lambda m: pictures[int(m[1])].name, str(error))
        raise UsageError(named) from error


def _as_input(picture: Picture, polarity: str | None) -> "Image":
    """The image that the learner gets; a drawing has the polarity that all images have."""
    from PIL import ImageOps

    swapped = picture.drawn and polarity == "ink_light"
    return ImageOps.invert(picture.image) if swapped else picture.image


def speakers(
    examples: Sequence[Picture], influence: np.ndarray, best: str
) -> list[tuple["Image", str]]:
    """The examples that speak most for an answer, with their influence and class as captions.

    Args:
      examples: The pictures.
      influence: How much each speaks for it, from -1 to 1.
      best: Class of the answer. Where each of its examples would do without the others, none has
        an influence; they are shown all the same.
    """
    ranked = []
    for example, value in zip(examples, np.round(influence, 2) + 0.0, strict=True):
        if value > 0 or example.label == best:
            ranked.append((value, example.label == best, example))
    ranked.sort(key=lambda item: item[:2], reverse=True)
    return [
        (thumbnail(example), f"{value:+.2f} {example.label}")
        for value, _, example in ranked[:_SPEAKERS]
    ]
