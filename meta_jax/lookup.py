"""Somebody's own things by name or path, and the error that ends a user's mistake in one line."""

import functools
import importlib
import os
import re
from pathlib import Path
from typing import Any

# A letter alone before the colon would be a drive. A Path has lost the second slash.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


class UsageError(ValueError):
    """A user's mistake; the message names the culprit and the remedy in one line."""


def load_attribute(path: str) -> Any:
    """What 'package.module:attribute' names.

    Raises:
      UsageError: the module cannot be imported, or has no such attribute.

    Examples:
      >>> load_attribute("math:pi")
      3.141592653589793
    """
    module, _, attribute = path.partition(":")
    if not module or not attribute or module.startswith("."):
        raise UsageError(f"'{path}' names no function: write package.module:function")
    try:
        found = importlib.import_module(module)
    except (ImportError, SyntaxError) as error:
        raise UsageError(
            f"{path}: module '{module}' cannot be imported ({error}): correct the name, or run "
            "where Python finds it"
        ) from error
    try:
        return functools.reduce(getattr, attribute.split("."), found)
    except AttributeError as error:
        raise UsageError(f"{path}: module '{module}' has no '{attribute}'") from error


def import_extra(module: str, extra: str, needed_by: str) -> Any:
    """Imports a module that is no core dependency.

    Args:
      module: Name of the module.
      extra: Extra of this package that installs it.
      needed_by: What needs it, as the message calls it.

    Raises:
      UsageError: it is not installed.

    Examples:
      >>> import_extra("no_such_module", "data", "tfds:mnist")
      Traceback (most recent call last):
      meta_jax.lookup.UsageError: tfds:mnist needs no_such_module, which is not installed: ...
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # it is there, and something else is not
            raise
        raise UsageError(
            f"{needed_by} needs {module}, which is not installed: pip install 'meta_jax[{extra}]'"
        ) from error


def local_path(path: str | os.PathLike) -> Path:
    """A path on this machine, with '~' replaced by the home folder.

    Args:
      path: The path as somebody gave it.

    Returns:
      The path; nothing is looked up on the disk.

    Raises:
      UsageError: the address of a remote store, which would silently become a local folder; a NUL
        character in it; or '~' where there is no home folder.

    Examples:
      >>> local_path("runs/glyphs").as_posix()
      'runs/glyphs'
      >>> local_path("gs://bucket/run")
      Traceback (most recent call last):
      meta_jax.lookup.UsageError: gs://bucket/run is no local path: mount the store, and name ...
    """
    text = os.fspath(path)
    if _SCHEME.match(text):
        raise UsageError(
            f"{text} is no local path: mount the store, and name the folder where it is mounted, "
            "or copy the files to this machine"
        )
    if "\0" in text:
        raise UsageError(f"{text!r} holds a NUL character, which no path can: name another path")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(
            f"{text} needs a home folder, and there is none: set HOME, or give the whole path"
        ) from error
