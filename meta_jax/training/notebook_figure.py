"""A figure that a notebook shows without pyplot."""

import io

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure that is shown where it is the last value of a notebook's cell."""

    def _repr_png_(self) -> bytes:
        """The figure as PNG, which IPython asks for."""
        written = io.BytesIO()
        self.savefig(written, format="png")
        return written.getvalue()
