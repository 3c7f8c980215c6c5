"""Arrays kept between runs, in a folder that may be deleted at any time.

The folder is $META_JAX_CACHE, else $XDG_CACHE_HOME/meta_jax, else ~/.cache/meta_jax. An entry is
one .npy file, followed by the hash of its content; one that is damaged counts as absent. Without a
folder that can be written, nothing is kept and all the rest works.
"""

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any

import numpy as np
from absl import logging

from meta_jax.data.dataset import aligned_empty

_DIGEST_SIZE = 32
_warned: set[str] = set()  # folders that cannot be used, each named once
_writer = ThreadPoolExecutor(1)  # Python waits for it at the end
_writing: dict[str, Future] = {}


def cache_folder() -> Path | None:
    """The folder of the cache; None where there is no home folder to put it in."""
    if own := os.environ.get("META_JAX_CACHE"):
        return Path(own)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches, "meta_jax")
    try:
        return Path.home() / ".cache" / "meta_jax"
    except RuntimeError:  # no HOME, and a user whom the system does not know
        return None


def cache_key(*parts: Any) -> str:
    """The name of an entry: a hash of everything that its content depends on.

    Args:
      *parts: Values whose `repr` says all of them.

    Examples:
      >>> cache_key("glyphs", 28) == cache_key("glyphs", 28) != cache_key("glyphs", 32)
      True
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(repr(part).encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


def load_cached(key: str, *, mapped: bool = False) -> np.ndarray | None:
    """Reads an entry.

    Args:
      key: Name of the entry, from `cache_key`.
      mapped: Whether the file is mapped into memory, which is not taken before it is needed; the
        content is checked once all the same.

    Returns:
      The array; None where there is none, or where it is damaged.
    """
    folder = cache_folder()
    if folder is None:
        return None
    finish_writing(key)
    try:
        with open(_path(folder, key), "rb") as file:
            return _read(file, mapped)
    except (OSError, ValueError, EOFError, MemoryError):
        return None


def store_cached(key: str, array: np.ndarray, *, mapped: bool = False) -> np.ndarray:
    """Writes an entry in the background, whole or not at all; a warning says where it cannot.

    Args:
      key: Name of the entry, from `cache_key`.
      array: Content, of numbers; not to be changed afterwards.
      mapped: Whether to wait, and to give the mapped file, as `load_cached` does.

    Returns:
      The array, or the mapped file where it could be written.
    """
    folder = cache_folder()
    if folder is None:
        _warn("there is no home folder")
    else:
        _writing[key] = _writer.submit(_store, folder, key, array)
    kept = load_cached(key, mapped=True) if mapped else None
    return array if kept is None else kept


def finish_writing(key: str) -> None:
    """Waits until an entry that is being written is there."""
    if key in _writing:
        wait([_writing.pop(key)])


def _store(folder: Path, key: str, array: np.ndarray) -> None:
    partial = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as partial:
            _write(partial.file, np.ascontiguousarray(array))
        os.replace(partial.name, _path(folder, key))
    except OSError as error:
        _warn(f"{folder} cannot be written ({error.strerror})")
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial.name)


def cached(key: str, make: Callable[[], np.ndarray], *, mapped: bool = False) -> np.ndarray:
    """Reads an entry, or makes and writes it.

    Args:
      key: Name of the entry, from `cache_key`.
      make: Function that makes the array where there is none.
      mapped: Whether the entry is mapped into memory, as in `load_cached`.
    """
    array = load_cached(key, mapped=mapped)
    return store_cached(key, make(), mapped=mapped) if array is None else array


def file_hash(path: str | Path) -> str:
    """A hash of a file's content, for `cache_key`."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.npy"


def _warn(reason: str) -> None:
    if reason not in _warned:
        _warned.add(reason)
        logging.warning(
            "Nothing is kept for the next start, because %s: name a folder in META_JAX_CACHE",
            reason,
        )


def _write(file: IO[bytes], array: np.ndarray) -> None:
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(file, header)
    file.write(array.data)
    file.write(_digest(header, array))


def _read(file: io.BufferedReader, mapped: bool) -> np.ndarray:
    """The array of a file, checked.

    Raises:
      ValueError, OSError, EOFError: it is damaged.
    """
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("the file is of another version than was written")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    start, size = file.tell(), dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    # Before so much memory is asked for.
    if os.fstat(file.fileno()).st_size - start != size + _DIGEST_SIZE:
        raise ValueError("the file has another length than its header says")
    if mapped and size:
        array = np.memmap(file, dtype, "r", start, shape)
        file.seek(start + size)
    else:
        array = aligned_empty(shape, dtype)
        file.readinto(array.data)
    header = {"descr": dtype.str, "fortran_order": fortran_order, "shape": shape}
    if file.read() != _digest(header, array):
        raise ValueError("the file has another content than was written")
    return array


def _digest(header: dict[str, Any], array: np.ndarray) -> bytes:
    digest = hashlib.sha256(repr(sorted(header.items())).encode())
    digest.update(array.data)
    return digest.digest()
