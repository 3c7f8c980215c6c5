"""A workdir belongs to one process at a time."""

import contextlib
import fcntl
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from meta_jax.lookup import UsageError, local_path

_held: set[Path] = set()  # by this process


@contextlib.contextmanager
def lock_workdir(workdir: Path | str) -> Iterator[None]:
    """Keeps other processes from training in a workdir; makes the folder if it is not there.

    The lock is the operating system's and on the folder itself: it ends with the process, however
    that ends, and leaves no file behind. Within it the same process may take it again.

    Args:
      workdir: The folder.

    Raises:
      UsageError: another process has it, or it is a file.
    """
    folder = local_path(workdir)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file and no workdir: name another one")
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()
    if place in _held:
        yield
        return
    descriptor = os.open(place, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        _held.add(place)
        yield
    finally:
        _held.discard(place)
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"another process is training in {folder}: wait until it ends, or name another workdir"
        ) from error
    except OSError as error:
        warnings.warn(
            f"{folder} cannot be locked ({error.strerror}): let no two processes train in it",
            stacklevel=2,
        )
