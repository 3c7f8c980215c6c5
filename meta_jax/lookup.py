"""Somebody's own things by name, and the error that ends a user's mistake in one line."""

import functools
import importlib
from typing import Any


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
