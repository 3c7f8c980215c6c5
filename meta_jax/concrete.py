"""Checks of values that are at hand. Within `jit` there are none, and nothing is checked."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_concrete(leaf: Any) -> bool:
    """Whether a leaf is an array whose numbers this process can see."""
    if isinstance(leaf, jax.Array):
        return not isinstance(leaf, jax.core.Tracer) and leaf.is_fully_addressable
    return isinstance(leaf, np.ndarray | np.generic)


def check_finite(tree: Any, name: str, mask: Any = None) -> None:
    """Refuses real numbers that are NaN or infinite; whoever reads them would answer NaN.

    Arrays that lie on the disk (`np.memmap`) are not read.

    Args:
      tree: Arrays [n, ...], numpy's or JAX's.
      name: Their name in messages.
      mask: bool [n], False for padding, which may hold anything; None where every row is real.

    Raises:
      ValueError: a number is not finite; the message names the array and the row.

    Examples:
      >>> check_finite(np.array([[1.0], [np.nan]]), "support.x")
      Traceback (most recent call last):
      ValueError: support.x is not finite in row 1: repair the row or leave it out
    """
    if mask is not None and not is_concrete(mask):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not is_concrete(leaf) or isinstance(leaf, np.memmap):
            continue
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.size:
            continue
        array = np.asarray(leaf)
        # Two numbers say it, without an array of as many booleans.
        with np.errstate(invalid="ignore"):  # bfloat16's minimum says so of NaN
            if np.isfinite(array.min()) and np.isfinite(array.max()):
                continue
        finite = np.isfinite(array.reshape(len(array), -1) if array.ndim else array[None, None])
        bad = ~finite.all(1)
        if mask is not None and np.shape(mask) == bad.shape:
            bad &= np.asarray(mask, bool)
        if bad.any():
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise ValueError(
                f"{where} is not finite in row {bad.argmax()}: repair the row or leave it out"
            )
