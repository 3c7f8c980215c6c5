"""Decoding of many images, by several processes where they are many, into one array.

Threads were measured first: for 84 x 84 JPEGs two of them are slower than one (0.85), for PNGs a
little faster (1.2), because most of the work on a small image holds Python's lock. The processes
run `pixels.py` by its path: they import neither JAX nor the user's script, which needs no guard.
"""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from meta_jax.data import pixels
from meta_jax.data.dataset import DataError, aligned_empty

_FEW = 500  # so many images are decoded sooner than processes start
_CHUNK = 64  # images that a process is asked for at a time
_MOST_PROCESSES = 16


class Encoded(NamedTuple):
    """An image before it is decoded."""

    source: bytes | str  # content of the file, or its path
    name: str  # name in an error


_Answer = tuple[bool, list[tuple[int, str]]]  # `colour` and `broken` of a chunk


class Decoded(NamedTuple):
    """Images of one size."""

    pixels: np.ndarray  # uint8 [n, image_size, image_size, channels], 0 where one is broken
    colour: bool  # whether any of them had a colour before it got its one channel
    broken: list[tuple[int, str]]  # index and reason of each that does not decode, in order


class _Here:
    """Reads chunks in this process."""

    def ask(self, sources: Sequence[bytes | str], out: np.ndarray) -> _Answer:
        """Reads a chunk into `out`."""
        chunk = pixels.read_chunk(sources, *out.shape[2:])
        out[:] = chunk.pixels
        return chunk.colour, chunk.broken

    def close(self) -> None:
        """Leaves everything as it is."""


class _Process:
    """Reads chunks in a process of its own."""

    def __init__(self) -> None:
        if not sys.executable:
            raise OSError("this Python has no executable")
        # Pillow is found where this process found it; -P keeps our modules out of the import path.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-P", pixels.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._questions: Any = self._process.stdin
        self._answers: Any = self._process.stdout

    def ask(self, sources: Sequence[bytes | str], out: np.ndarray) -> _Answer:
        """Reads a chunk into `out`.

        Raises:
          DataError: the process has ended.
        """
        arrived, answer = 0, (False, [])
        with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):
            pickle.dump((sources, *out.shape[2:]), self._questions)
            self._questions.flush()
            answer = pickle.load(self._answers)
            arrived = self._answers.readinto(out.data)
        if arrived < out.nbytes:
            raise DataError(
                f"a process that decodes images ended (exit status {self._process.wait()}): free "
                "some memory, and start again"
            )
        return answer

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):  # it has ended
            self._questions.close()
        self._answers.close()
        self._process.wait()


def decode_images(images: Sequence[Encoded], image_size: int, channels: int) -> Decoded:
    """Decodes images of any size and kind, and resizes them to squares.

    Args:
      images: Images to decode.
      image_size: Side in pixels after resizing.
      channels: Number of channels of all: 1 (of colours, the luma of ITU-R 601-2) or 3.

    Raises:
      DataError: a decoding process was ended from outside.
    """
    out = aligned_empty((len(images), image_size, image_size, channels), np.uint8)
    starts = range(0, len(images), _CHUNK)
    count = min(_cores(), _MOST_PROCESSES, len(starts)) if len(images) > _FEW else 1
    colour, broken = False, []
    with _readers(count) as readers, _progress(len(images)) as progress:
        free: queue.SimpleQueue[_Here | _Process] = queue.SimpleQueue()
        for reader in readers:
            free.put(reader)

        def read(start: int) -> tuple[int, _Answer]:
            reader = free.get()
            try:
                stop = start + _CHUNK
                return start, reader.ask([i.source for i in images[start:stop]], out[start:stop])
            finally:
                free.put(reader)

        for start, (any_colour, errors) in _each(read, starts, len(readers)):
            colour = colour or any_colour
            broken += [(start + index, reason) for index, reason in errors]
            progress(min(_CHUNK, len(images) - start))
    return Decoded(out, colour, broken)


def _cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _each(read: Callable, starts: Sequence[int], threads: int) -> Iterator:
    """The results of all calls, in order; threads wait for the processes that do the work."""
    if threads == 1:
        yield from map(read, starts)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(read, starts)


@contextlib.contextmanager
def _readers(count: int) -> Iterator[Sequence[_Here | _Process]]:
    """Readers, each a process of its own; or one that reads here, where few or none can start."""
    processes: list[_Process] = []
    if count > 1:
        with contextlib.suppress(OSError):
            for _ in range(count):
                processes.append(_Process())
    try:
        yield processes or [_Here()]
    finally:
        for process in processes:
            process.close()


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on a terminal, where there is enough to wait for."""
    if total <= _FEW or not sys.stderr.isatty():
        yield lambda done: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="image", desc="decoding", dynamic_ncols=True, leave=False) as bar:
        yield bar.update
