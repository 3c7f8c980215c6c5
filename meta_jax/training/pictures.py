"""Pictures of a run: its learning curve, and an episode with what the learner says of it.

matplotlib is imported where it is used, and figures are made without pyplot, so nothing global
changes and no display is needed. Each function returns a figure, which a notebook shows, and writes
it only where a path is given.
"""

import functools
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from meta_jax.core import Array, Batch, Episode, Objective
from meta_jax.objectives import Gaussian, row_mask
from meta_jax.training.evaluation import MeanCI
from meta_jax.training.figures import finish_axes, finish_figure, new_figure
from meta_jax.training.writers import as_history

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"train": "#9aa5b1", "val": "#1f77b4", "test": "#d95f02"}
_RIGHT, _WRONG, _NEUTRAL = "#2a9d3f", "#d62728", "#c5ccd3"
_UNKNOWN = np.array([0.15, 0.25, 0.45], np.float32)  # pixels that are not there
_MOST_QUERIES = 12  # of one class: more do not fit a page


class _Examples(NamedTuple):
    """A batch as NumPy arrays, in float32."""

    x: np.ndarray
    y: np.ndarray
    mask: np.ndarray  # bool [n], False for padding


def learning_curve(
    metrics: Sequence[dict[str, Any]], path: Path | str | None = None, *, objective: Objective
) -> "Figure":
    """Draws a run over its outer steps: training loss, validation loss and the objective's metric.

    The training loss is the method's own and has a panel to itself: it may be of another kind than
    the loss that validation measures.

    Args:
      metrics: Lines of `read_metrics`: 'step', 'split' and scalars.
      path: The PNG to write, in place of an older one; none by default.
      objective: Says which metric is drawn, and whether in per cent.

    Returns:
      The figure, which a notebook shows.

    Raises:
      ValueError: there is nothing to draw.
    """
    panels = _panels(metrics, objective)
    if not panels:
        raise ValueError(f"there is no loss or {objective.metric} to draw in these metrics")
    figure = new_figure(5.2 * len(panels), 3.6)
    for axes, (label, curves) in zip(
        np.ravel(figure.subplots(1, len(panels))), panels.items(), strict=True
    ):
        for split, (steps, values) in curves.items():
            axes.plot(
                steps,
                values,
                color=_COLOURS[split],
                label=split,
                linewidth=1.2 if split == "train" else 2.0,
                # A single point would draw no line.
                marker="o" if len(steps) == 1 else None,
            )
        axes.set(xlabel="outer step", ylabel=label)
        finish_axes(axes)
    return finish_figure(figure, path)


# Split -> (steps, values).
_Curves = dict[str, tuple[np.ndarray, np.ndarray]]


def _panels(metrics: Sequence[dict[str, Any]], objective: Objective) -> dict[str, _Curves]:
    """What a learning curve shows: the label of each panel, and its curves."""
    history = as_history(metrics)

    def curves(name: str, splits: Sequence[str], scale: float = 1.0) -> _Curves:
        found = {split: history[split] for split in splits if name in history.get(split, {})}
        return {split: (each["step"], scale * each[name]) for split, each in found.items()}

    percent = objective.unit == "%"
    label = f"{objective.metric.replace('_', ' ')}{' (%)' if percent else ''}"
    panels = {
        "training loss": curves("loss", ("train",)),
        "validation loss": curves("loss", ("val", "test")),
        label: curves(objective.metric, tuple(_COLOURS), 100.0 if percent else 1.0),
    }
    validation = history.get("val", {})
    if objective.metric in validation and "loss" in validation:
        # Where the metric is the loss, as in regression, one panel shows both.
        same = np.array_equal(validation["loss"], validation[objective.metric], equal_nan=True)
        if same and objective.metric != "loss":
            del panels["validation loss"]
    return {label: curves for label, curves in panels.items() if curves}


def episode_picture(
    episode: Episode, predictions: Array | Gaussian | None, path: Path | str | None = None
) -> "Figure":
    """Draws one episode, beside what a learner predicts of its queries.

    Images (support.x [n, H, W, C], C 1 or 3): one row for each class, its support set on the
    left and its queries on the right, each query framed green and titled with a tick if it was
    predicted right, or framed red and titled with the class it was taken for. Numbers (support.x
    [n, 1], support.y [n, 1]): the support points, the queried curve and the predicted one. Pixels
    (support.x [n, 2] rows and columns, support.y [n, 1 or 3]): the image, the pixels that are
    known, those that are predicted, and how sure the prediction is of each.

    Args:
      episode: The task; rows of padding are left out.
      predictions: What the learner says of the queries, in their order: logits or probabilities
        [q, ways], means [q, 1], or a `Gaussian`, of which a band of two scales is drawn; None draws
        the task alone.
      path: The PNG to write, in place of an older one; none by default.

    Returns:
      The figure, which a notebook shows.

    Raises:
      ValueError: the inputs are neither images nor single numbers nor pixels.
    """
    shape = getattr(episode.support.x, "shape", ())
    if _is_function(episode):
        function = DrawnFunction(episode, predictions)
        return functions_picture([function], path)
    if _is_completion(episode):
        return finish_figure(_draw_completion(episode, predictions), path)
    if len(shape) != 4 or shape[-1] not in (1, 3):
        raise ValueError(f"an episode with inputs of shape {shape} cannot be drawn")
    predicted = None if predictions is None else np.asarray(predictions, np.float32)
    support, query = _examples(episode.support), _examples(episode.query)
    return finish_figure(_draw_images(support, query, predicted), path)


def _is_function(episode: Episode) -> bool:
    shape = getattr(episode.support.x, "shape", ())
    return len(shape) == 2 and shape[-1] == 1 and episode.support.y.shape[-1] == 1


def _is_completion(episode: Episode) -> bool:
    shape = getattr(episode.support.x, "shape", ())
    return len(shape) == 2 and shape[-1] == 2 and episode.support.y.shape[-1] in (1, 3)


def _draw_completion(episode: Episode, predictions: Array | Gaussian | None) -> "Figure":
    support, query = map(_examples, episode)
    grids = [np.unique(query.x[query.mask, axis]) for axis in range(2)]
    panels = {
        "image": _as_image(query.x[query.mask], query.y[query.mask], grids),
        f"known ({support.mask.sum()} pixels)": _as_image(
            support.x[support.mask], support.y[support.mask], grids
        ),
    }
    if isinstance(predictions, Gaussian):
        mean, scale = (np.asarray(leaf, np.float32)[query.mask] for leaf in predictions)
        panels["prediction"] = _as_image(query.x[query.mask], mean.clip(0, 1), grids)
        # Bright where it is not sure.
        panels["scale"] = _as_image(query.x[query.mask], scale / max(scale.max(), 1e-6), grids)
    elif predictions is not None:
        mean = np.asarray(predictions, np.float32)[query.mask]
        panels["prediction"] = _as_image(query.x[query.mask], mean.clip(0, 1), grids)
    figure = new_figure(2.6 * len(panels), 2.9)
    for axes, (title, image) in zip(
        np.ravel(figure.subplots(1, len(panels))), panels.items(), strict=True
    ):
        axes.imshow(image, vmin=0, vmax=1)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    return figure


def _as_image(x: np.ndarray, colours: np.ndarray, grids: Sequence[np.ndarray]) -> np.ndarray:
    """Colours [n, 1 or 3] at places x [n, 2] of a grid, as an image; blue where there is none."""
    image = np.tile(_UNKNOWN, (len(grids[0]), len(grids[1]), 1))
    # The nearest place of the grid: the places of the support set are rounded alike, or nearly.
    rows, columns = (abs(x[:, i, None] - grids[i]).argmin(1) for i in range(2))
    image[rows, columns] = colours  # one number stands for all three
    return image


class DrawnFunction(NamedTuple):
    """A task of regression and what is said of it.

    Attributes:
      episode: The task, with x [n, 1] and y [n, 1]; rows of padding are left out.
      predictions: Means [q, 1] of the queries, or a `Gaussian`; None for the task alone.
      exact: The best predictions that there are, likewise; None where they are not known.
    """

    episode: Episode
    predictions: Array | Gaussian | None = None
    exact: Array | Gaussian | None = None


def functions_picture(
    functions: Sequence[DrawnFunction], path: Path | str | None = None
) -> "Figure":
    """Draws functions side by side: support points, the queried curve, the predicted one.

    Where a prediction says how sure it is, a band shows two scales on either side of its mean; two
    thin lines bound that of the exact prediction.

    Args:
      functions: The functions.
      path: The PNG to write, in place of an older one; none by default.

    Returns:
      The figure, which a notebook shows.

    Raises:
      ValueError: there is nothing to draw, or inputs or targets are not single numbers.
    """
    if not functions:
        raise ValueError("there are no functions to draw")
    for function in functions:
        if not _is_function(function.episode):
            shape = getattr(function.episode.support.x, "shape", ())
            raise ValueError(f"a function with inputs of shape {shape} cannot be drawn")
    figure = new_figure(6.4 if len(functions) == 1 else 4.6 * len(functions), 3.8)
    panels = np.ravel(figure.subplots(1, len(functions)))
    for axes, function in zip(panels, functions, strict=True):
        _draw_function(axes, function)
    # Numbers of points are those of the panel, and so are errors.
    if len(functions) == 1:
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
    else:
        handles, labels = panels[0].get_legend_handles_labels()
        labels = [label.partition(" (")[0] for label in labels]
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    return finish_figure(figure, path)


def _draw_function(axes: "Axes", function: DrawnFunction) -> None:
    support, query = map(_examples, function.episode)
    rows = np.flatnonzero(query.mask)
    rows = rows[query.x[rows, 0].argsort()]
    x, y = query.x[rows, 0], query.y[rows, 0]
    axes.plot(x, y, color=_COLOURS["train"], linewidth=2, label="task")
    if function.exact is not None:
        mean, scale = _mean_and_scale(function.exact, rows)
        style: dict[str, Any] = {"color": "black", "linewidth": 0.9}
        axes.plot(x, mean, **style, label="exact")
        if scale is not None:
            axes.plot(x, mean - 2 * scale, **style, linestyle=":")
            axes.plot(x, mean + 2 * scale, **style, linestyle=":")
    if function.predictions is not None:
        mean, scale = _mean_and_scale(function.predictions, rows)
        label = f"prediction (mse {np.mean((mean - y) ** 2):.3g})"
        colour = _COLOURS["val"]
        axes.plot(x, mean, color=colour, linewidth=2, linestyle="--", label=label)
        if scale is not None:
            low, high = mean - 2 * scale, mean + 2 * scale
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    points = support.x[support.mask, 0], support.y[support.mask, 0]
    axes.plot(*points, "o", color=_COLOURS["test"], label=f"support ({len(points[0])})")
    axes.set(xlabel="x", ylabel="y")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _mean_and_scale(
    outputs: Array | Gaussian, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """Means of some rows, and their scales where there are such."""
    if isinstance(outputs, Gaussian):
        mean, scale = (np.asarray(leaf, np.float32)[rows, 0] for leaf in outputs)
        return mean, scale
    return np.asarray(outputs, np.float32)[rows, 0], None


def _examples(batch: Batch) -> _Examples:
    x, y = (np.asarray(array, np.float32) for array in (batch.x, batch.y))
    return _Examples(x, y, np.asarray(row_mask(batch)))


def instance_curve(
    curves: Mapping[str, Sequence[MeanCI]], path: Path | str | None = None
) -> "Figure":
    """Draws the accuracy at the 1st, 2nd, ... instance of a class, one curve for each name.

    Args:
      curves: By name, accuracies in per cent at the first instance, at the second, and so on.
      path: The PNG to write, in place of an older one; none by default.

    Returns:
      The figure, which a notebook shows.

    Raises:
      ValueError: there is nothing to draw.
    """
    if not any(curves.values()):
        raise ValueError("there are no instances to draw")
    figure = new_figure(5.2, 3.6)
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
    axes.set(xlabel="instance of a class", ylabel="accuracy (%)", ylim=(0, 100))
    finish_axes(axes)
    return finish_figure(figure, path)


class Curve(NamedTuple):
    """A metric over the outer steps of one run.

    Attributes:
      steps: Outer steps, [n], ascending.
      values: Values of the metric, [n].
    """

    steps: np.ndarray
    values: np.ndarray


def validation_curves(
    panels: Mapping[str, Mapping[str, Sequence[Curve]]], path: Path | str | None = None
) -> "Figure":
    """Draws the validations of several runs, one panel for each metric.

    Args:
      panels: By the label of a metric, and by the name of a run, the curve of each of its seeds:
        their mean is drawn, and a band from the lowest to the highest. Names without a curve are
        left out.
      path: The PNG to write, in place of an older one; none by default.

    Returns:
      The figure, which a notebook shows.

    Raises:
      ValueError: there is nothing to draw.
    """
    drawn = {
        label: {name: curves for name, curves in runs.items() if curves}
        for label, runs in panels.items()
    }
    drawn = {label: runs for label, runs in drawn.items() if runs}
    if not drawn:
        raise ValueError("there are no validations to draw")
    figure = new_figure(6.4 * len(drawn), 4.2)
    for axes, (label, runs) in zip(
        np.ravel(figure.subplots(1, len(drawn))), drawn.items(), strict=True
    ):
        for name, curves in runs.items():
            steps, values = _at_common_steps(curves)
            marker = "o" if len(steps) == 1 else None
            (line,) = axes.plot(steps, values.mean(0), label=name, linewidth=1.6, marker=marker)
            if len(values) > 1:
                low, high = values.min(0), values.max(0)
                colour = line.get_color()
                axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set(xlabel="outer step", ylabel=f"validation {label}")
        finish_axes(axes)
    return finish_figure(figure, path)


def _at_common_steps(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all curves have, and the values of each there, [curves, steps].

    A seed that has just begun shares no step with the others; the longest then stands alone.
    """
    common = functools.reduce(np.intersect1d, [curve.steps for curve in curves])
    if not common.size:
        longest = max(curves, key=lambda curve: len(curve.steps))
        return longest.steps, longest.values[None]
    return common, np.stack([curve.values[np.isin(curve.steps, common)] for curve in curves])


def loss_curves(curves: Mapping[str, Sequence[MeanCI]], path: Path | str | None = None) -> "Figure":
    """Draws losses of optimizers over their steps, each with its interval as a band.

    Args:
      curves: By name, losses after the first step, after the second, and so on.
      path: The PNG to write, in place of an older one; none by default.

    Returns:
      The figure, which a notebook shows.

    Raises:
      ValueError: there is nothing to draw.
    """
    if not any(curves.values()):
        raise ValueError("there are no losses to draw")
    figure = new_figure(5.8, 4.0)
    axes = figure.subplots()
    for name, scores in curves.items():
        steps = range(1, len(scores) + 1)
        mean, ci95 = np.array(scores).T
        (line,) = axes.plot(steps, mean, label=name, linewidth=1.6)
        # On a logarithmic axis a band cannot reach zero.
        low = np.maximum(mean - ci95, mean / 100)
        axes.fill_between(steps, low, mean + ci95, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    finish_axes(axes)
    return finish_figure(figure, path)


def _draw_images(support: _Examples, query: _Examples, predicted: np.ndarray | None) -> "Figure":
    low = min(support.x.min(), query.x.min())
    # One scale for all, so that equal brightness looks equal; a blank set divides by one.
    scale = (max(support.x.max(), query.x.max()) - low) or 1.0
    shots, queries = _rows_by_class(support), _rows_by_class(query)
    queries = [rows[:_MOST_QUERIES] for rows in queries]
    ways, most_shots = len(shots), max(map(len, shots))
    columns = most_shots + max(2, *map(len, queries))  # two at least: the title needs them

    # One pair of axes for all: 300 of them would take matplotlib ten seconds.
    gap, pitch = 0.4, 1.2
    figure = new_figure(0.85 * (columns + gap + 1), 0.85 * (pitch * ways + 0.5), layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.text(0, -0.35, "support", va="center", fontsize=11)
    axes.text(most_shots + gap, -0.35, _title(query, predicted), va="center", fontsize=11)
    for label in range(ways):
        top = pitch * label
        axes.text(-0.1, top + 0.5, f"class {label}", ha="right", va="center", fontsize=9)
        for column, row in enumerate(shots[label]):
            _draw_image(axes, (support.x[row] - low) / scale, (column, top), _NEUTRAL)
        for column, row in enumerate(queries[label], start=most_shots):
            corner = (column + gap, top)
            guess = None if predicted is None else int(predicted[row].argmax())
            colour = _draw_guess(axes, corner, guess, label)
            _draw_image(axes, (query.x[row] - low) / scale, corner, colour)
    # Last, for `imshow` moves the limits.
    axes.set(xlim=(-1, columns + gap), ylim=(pitch * ways - 0.1, -0.6), aspect="equal")
    return figure


def _rows_by_class(examples: _Examples) -> list[np.ndarray]:
    """For each class the rows that are of it and not padding."""
    return [np.flatnonzero((column > 0) & examples.mask) for column in examples.y.T]


def _title(query: _Examples, predicted: np.ndarray | None) -> str:
    if predicted is None:
        return "queries"
    correct = (predicted.argmax(-1) == query.y.argmax(-1)) & query.mask
    return f"queries: {correct.sum()} of {query.mask.sum()} right"


def _draw_guess(axes: "Axes", corner: tuple[float, float], guess: int | None, label: int) -> str:
    """Writes above a query what it was taken for; gives the colour of its frame."""
    if guess is None:
        return _NEUTRAL
    colour = _RIGHT if guess == label else _WRONG
    mark = "\N{CHECK MARK}" if guess == label else f"as {guess}"
    axes.text(corner[0] + 0.45, corner[1] - 0.02, mark, color=colour, ha="center", fontsize=8)
    return colour


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
