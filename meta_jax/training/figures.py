"""What all pictures are drawn on: figures of one look, which are written where a path is given."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(
    width: float, height: float, layout: Literal["constrained"] | None = "constrained"
) -> "Figure":
    """A figure of a size in inches, without pyplot; a notebook shows it."""
    from meta_jax.training.notebook_figure import NotebookFigure

    return NotebookFigure(figsize=(width, height), dpi=120, layout=layout)


def finish_axes(axes: "Axes") -> None:
    """Gives axes a grid, a legend, and no frame."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def finish_figure(figure: "Figure", path: Path | str | None) -> "Figure":
    """Writes a figure as PNG, whole or not at all, where a path is given; returns the figure."""
    if path is None:
        return figure
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".new")
    try:
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return figure
