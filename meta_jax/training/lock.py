"""A workdir belongs to one run at a time."""

import contextlib
import fcntl
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from meta_jax.lookup import UsageError, local_path
from meta_jax.training import processes

_held: set[Path] = set()  # by this process


@contextlib.contextmanager
def lock_workdir(workdir: Path | str) -> Iterator[None]:
    """Keeps other processes from training in a workdir; makes the folder if it is not there.

    The lock is the operating system's and on the folder itself: it ends with the process, however
    that ends, and leaves no file behind. Within it the same process may take it again. Of several
    processes of one run, the first takes it for all.

    Args:
      workdir: The folder.

    Raises:
      UsageError: another process has it, or it is a file.
    """
    place, descriptor = processes.from_writer(functools.partial(_take, local_path(workdir)))
    try:
        yield
    finally:
        if descriptor is not None and processes.is_writer():
            _held.discard(place)
            os.close(descriptor)


def _take(folder: Path) -> tuple[Path, int | None]:
    """The folder and the descriptor that is locked; None where this process has it already."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file and no workdir: name another one")
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()
    if place in _held:
        return place, None
    descriptor = os.open(place, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
    except BaseException:
        os.close(descriptor)
        raise
    _held.add(place)
    return place, descriptor


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
