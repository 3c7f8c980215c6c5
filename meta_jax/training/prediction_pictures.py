"""Pictures of predictions: the support images that speak for each answer, and confusions."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meta_jax.data.images import open_image
from meta_jax.data.pixels import to_eight_bits
from meta_jax.training.figures import finish_figure, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SPEAKERS = 4  # support images shown beside a query
_THUMBNAIL = 128  # pixels
_MOST_CLASSES = 40  # of a confusion matrix, whose numbers can be read


def evidence_picture(
    queries: Sequence[Any],
    titles: Sequence[str],
    support: Sequence[Any],
    labels: Sequence[str],
    influence: np.ndarray,
    path: Path | str | None = None,
) -> "Figure":
    """Draws each query beside the support images that speak most for its answer.

    Args:
      queries: Paths or Pillow images.
      titles: What stands above each query, such as its class and probability.
      support: Paths or Pillow images of the support set.
      labels: Class of each support image.
      influence: How much each support image speaks for each query's answer, [queries, support].
      path: The PNG to write, in place of an older one; none by default.

    Returns:
      The figure, which a notebook shows.

    Raises:
      ValueError: there is nothing to draw.
    """
    if not len(queries):
        raise ValueError("there are no queries to draw")
    columns = 1 + min(_SPEAKERS, len(support))
    figure = new_figure(1.5 * columns + 0.4, 1.7 * len(queries))
    grid = figure.subplots(len(queries), columns, squeeze=False)
    for row, query, title, values in zip(grid, queries, titles, influence, strict=True):
        _draw(row[0], query, title, "#1f77b4")
        order = np.argsort(-values, kind="stable")
        for axes, index in zip(row[1:], order, strict=False):
            _draw(axes, support[index], f"{labels[index]}  {values[index]:+.2f}", "#c5ccd3")
    return finish_figure(figure, path)


def _draw(axes: "Axes", image: Any, title: str, colour: str) -> None:
    if isinstance(image, str | os.PathLike):
        image = open_image(os.fspath(image), os.fspath(image))
    small = to_eight_bits(image).convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    axes.imshow(np.asarray(small))
    axes.set(xticks=[], yticks=[])
    axes.set_title(_short(title), fontsize=7)
    for spine in axes.spines.values():
        spine.set(edgecolor=colour, linewidth=1.5)


def _short(text: str) -> str:
    # A dollar sign would begin mathematics.
    text = text.replace("$", r"\$")
    return text if len(text) <= 26 else text[:12] + "…" + text[-13:]


def confusion_picture(
    counts: np.ndarray, classes: Sequence[str], path: Path | str | None = None
) -> "Figure":
    """Draws a confusion matrix, true classes down and predicted ones across.

    Args:
      counts: Numbers of queries [true, predicted].
      classes: Names of the classes.
      path: The PNG to write, in place of an older one; none by default.

    Returns:
      The figure, which a notebook shows.
    """
    n = len(classes)
    figure = new_figure(1.6 + 0.45 * n, 1.4 + 0.45 * n)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks, names = range(n), [_short(name) for name in classes]
    axes.set_xticks(ticks, names, rotation=90, fontsize=8)
    axes.set_yticks(ticks, names, fontsize=8)
    axes.set(xlabel="predicted", ylabel="true")
    if n <= _MOST_CLASSES:
        for (i, j), count in np.ndenumerate(counts):
            colour = "white" if shares[i, j] > 0.6 else "black"
            axes.text(j, i, str(count), ha="center", va="center", fontsize=8, color=colour)
    return finish_figure(figure, path)
