"""Pictures of a run: its learning curve, and an episode with what the learner says of it.

matplotlib is imported where it is used, and figures are made without pyplot, so nothing global
changes and no display is needed.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meta_jax.core import Array, Episode
from meta_jax.training.evaluation import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"train": "#9aa5b1", "val": "#1f77b4", "test": "#d95f02"}
_LABELS = {"loss": "loss", "accuracy": "accuracy (%)", "mse": "mean squared error"}
_RIGHT, _WRONG, _NEUTRAL = "#2a9d3f", "#d62728", "#c5ccd3"
_MOST_QUERIES = 12  # of one class: more do not fit a page


def learning_curve(metrics: Sequence[dict[str, Any]], path: Path | str) -> None:
    """Draws loss, and accuracy or mean squared error, of each split over outer steps.

    Args:
      metrics: lines of `read_metrics`: 'step', 'split' and scalars, of which 'loss', 'accuracy'
        (a fraction, drawn in per cent) and 'mse' are drawn.
      path: the PNG to write, in place of an older one.

    Raises:
      ValueError: `metrics` has none of the three.
    """
    names = [name for name in _LABELS if any(name in line for line in metrics)]
    if not names:
        raise ValueError("there is no loss, accuracy or mse to draw in these metrics")
    figure = _figure(5.2 * len(names), 3.6)
    for axes, name in zip(np.ravel(figure.subplots(1, len(names))), names, strict=True):
        for split, colour in _COLOURS.items():
            lines = [line for line in metrics if line["split"] == split and name in line]
            if lines:
                values = np.array([line[name] for line in lines])
                axes.plot(
                    [line["step"] for line in lines],
                    100 * values if name == "accuracy" else values,
                    color=colour,
                    label=split,
                    linewidth=1.2 if split == "train" else 2.0,
                    # A single point would draw no line.
                    marker="o" if len(lines) == 1 else None,
                )
        axes.set(xlabel="outer step", ylabel=_LABELS[name])
        _finish(axes)
    _write(figure, path)


def episode_picture(episode: Episode, predictions: Array | None, path: Path | str) -> None:
    """Draws one episode, beside what a learner predicts of its queries.

    Images (support.x [n, H, W, C], C of 1 or 3): one row for each class, its support set on the
    left and its queries on the right, each query framed green and titled with a tick if it was
    predicted right, or framed red and titled with the class it was taken for. Numbers (support.x
    [n, 1], support.y [n, 1]): the support points, the queried curve and the predicted one.

    Args:
      episode: the task; rows of one-hot labels that are all zero are padding and left out.
      predictions: what the learner says of the queries, in their order: logits or probabilities
        [q, ways] or means [q, 1]; None draws the task alone.
      path: the PNG to write, in place of an older one.

    Raises:
      ValueError: the inputs are neither images nor single numbers.
    """
    support, query = (
        (np.asarray(batch.x, np.float32), np.asarray(batch.y, np.float32)) for batch in episode
    )
    predicted = None if predictions is None else np.asarray(predictions, np.float32)
    shape = support[0].shape
    if len(shape) == 4 and shape[-1] in (1, 3):
        figure = _draw_images(support, query, predicted)
    elif len(shape) == 2 and shape[-1] == 1 and support[1].shape[-1] == 1:
        figure = _draw_curve(support, query, predicted)
    else:
        raise ValueError(f"an episode with inputs of shape {shape} cannot be drawn")
    _write(figure, path)


def instance_curve(curves: Mapping[str, Sequence[Score]], path: Path | str) -> None:
    """Draws the accuracy at the 1st, 2nd, ... instance of a class, one curve for each name.

    Args:
      curves: by name, scores in per cent, of the first instance, of the second, and so on.
      path: the PNG to write, in place of an older one.

    Raises:
      ValueError: there is nothing to draw.
    """
    if not any(curves.values()):
        raise ValueError("there are no instances to draw")
    figure = _figure(5.2, 3.6)
    axes = figure.subplots()
    for (name, scores), colour in zip(curves.items(), cycle(_COLOURS.values()), strict=False):
        axes.errorbar(
            range(1, len(scores) + 1),
            [score.mean for score in scores],
            [score.ci95 for score in scores],
            color=colour,
            label=name,
            marker="o",
            capsize=2,
        )
    axes.set(xlabel="instance of a class", ylabel=_LABELS["accuracy"], ylim=(0, 100))
    _finish(axes)
    _write(figure, path)


def loss_curves(curves: Mapping[str, Sequence[Score]], path: Path | str) -> None:
    """Draws losses of optimizers over their steps, each with its interval as a band.

    Args:
      curves: by name, scores of the loss after the first step, after the second, and so on.
      path: the PNG to write, in place of an older one.

    Raises:
      ValueError: there is nothing to draw.
    """
    if not any(curves.values()):
        raise ValueError("there are no losses to draw")
    figure = _figure(5.8, 4.0)
    axes = figure.subplots()
    for name, scores in curves.items():
        steps = range(1, len(scores) + 1)
        mean, ci95 = np.array(scores).T
        (line,) = axes.plot(steps, mean, label=name, linewidth=1.6)
        # On a logarithmic axis a band cannot reach zero.
        low = np.maximum(mean - ci95, mean / 100)
        axes.fill_between(steps, low, mean + ci95, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    _finish(axes)
    _write(figure, path)


def _draw_images(
    support: tuple[np.ndarray, np.ndarray],
    query: tuple[np.ndarray, np.ndarray],
    predicted: np.ndarray | None,
) -> "Figure":
    (xs, ys), (xq, yq) = support, query
    low = min(xs.min(), xq.min())
    # One scale for all, so that equal brightness looks equal; a blank set divides by one.
    scale = (max(xs.max(), xq.max()) - low) or 1.0
    shots = [np.flatnonzero(column) for column in ys.T]
    queries = [np.flatnonzero(column)[:_MOST_QUERIES] for column in yq.T]
    ways, most_shots = len(shots), max(map(len, shots))
    columns = most_shots + max(2, *map(len, queries))  # two at least: the title needs them

    # One pair of axes for all: 300 of them would take matplotlib ten seconds.
    gap, pitch = 0.4, 1.2
    figure = _figure(0.85 * (columns + gap + 1), 0.85 * (pitch * ways + 0.5), layout="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()

    title = "queries"
    if predicted is not None:
        real = yq.any(-1)
        correct = predicted.argmax(-1) == yq.argmax(-1)
        title += f": {correct[real].sum()} of {real.sum()} right"
    axes.text(0, -0.35, "support", va="center", fontsize=11)
    axes.text(most_shots + gap, -0.35, title, va="center", fontsize=11)
    for label in range(ways):
        top = pitch * label
        axes.text(-0.1, top + 0.5, f"class {label}", ha="right", va="center", fontsize=9)
        for column, index in enumerate(shots[label]):
            _draw_image(axes, (xs[index] - low) / scale, (column, top), _NEUTRAL)
        for column, index in enumerate(queries[label], start=most_shots):
            corner, colour = (column + gap, top), _NEUTRAL
            if predicted is not None:
                guess = predicted[index].argmax()
                colour = _RIGHT if guess == label else _WRONG
                mark = "\N{CHECK MARK}" if guess == label else f"as {guess}"
                axes.text(corner[0] + 0.45, top - 0.02, mark, color=colour, ha="center", fontsize=8)
            _draw_image(axes, (xq[index] - low) / scale, corner, colour)
    # Last, for `imshow` moves the limits.
    axes.set(xlim=(-1, columns + gap), ylim=(pitch * ways - 0.1, -0.6), aspect="equal")
    return figure


def _draw_image(axes: "Axes", image: np.ndarray, corner: tuple[float, float], colour: str) -> None:
    from matplotlib.patches import Rectangle

    side = 0.9
    left, top = corner[0], corner[1] + 0.05
    axes.imshow(
        image[..., 0] if image.shape[-1] == 1 else image,
        cmap="gray",
        vmin=0,
        vmax=1,
        extent=(left, left + side, top + side, top),
    )
    width = 1.0 if colour == _NEUTRAL else 2.5
    axes.add_patch(
        Rectangle((left, top), side, side, fill=False, edgecolor=colour, linewidth=width)
    )


def _draw_curve(
    support: tuple[np.ndarray, np.ndarray],
    query: tuple[np.ndarray, np.ndarray],
    predicted: np.ndarray | None,
) -> "Figure":
    (xs, ys), (xq, yq) = support, query
    order = xq[:, 0].argsort()
    figure = _figure(6.4, 3.8)
    axes = figure.subplots()
    axes.plot(xq[order, 0], yq[order, 0], color=_COLOURS["train"], linewidth=2, label="task")
    if predicted is not None:
        axes.plot(
            xq[order, 0],
            predicted[order, 0],
            color=_COLOURS["val"],
            linewidth=2,
            linestyle="--",
            label=f"prediction (mse {np.mean((predicted - yq) ** 2):.3g})",
        )
    axes.plot(xs[:, 0], ys[:, 0], "o", color=_COLOURS["test"], label=f"support ({len(xs)})")
    axes.set(xlabel="x", ylabel="y")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def _finish(axes: "Axes") -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _figure(width: float, height: float, layout: str = "constrained") -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout=layout)


def _write(figure: "Figure", path: Path | str) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
