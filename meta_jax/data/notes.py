"""What a user should know of the data: said when it is found, and again beside a result."""

from collections.abc import Iterator, Sequence

from absl import logging


class Notes:
    """Lines about the data, each logged as a warning once, and kept.

    Examples:
      >>> notes = Notes()
      >>> notes.add("2 of 9 files are left out")
      >>> notes.add("2 of 9 files are left out")
      >>> list(notes)
      ['2 of 9 files are left out']
    """

    def __init__(self) -> None:
        """Begins without lines."""
        self._lines: list[str] = []

    def add(self, line: str) -> None:
        """Logs and keeps a line that is not there yet."""
        if line not in self._lines:
            self._lines.append(line)
            logging.warning("%s", line)

    def __iter__(self) -> Iterator[str]:
        """The lines, in the order in which they were found."""
        return iter(self._lines)


def some(names: Sequence[str]) -> str:
    """Up to three names for a message, and that there are more.

    Examples:
      >>> some(["a", "b", "c", "d"])
      'a, b, c, ...'
    """
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
