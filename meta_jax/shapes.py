"""Trees by their shapes: rows of all leaves, and differences in words."""

from typing import Any

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree


def shape_difference(first: PyTree, second: PyTree) -> str:
    """The first leaf at which two trees differ in shape or dtype, in words; '' where none does.

    Args:
      first, second: Trees of arrays or of `jax.ShapeDtypeStruct`s.

    Examples:
      >>> import jax.numpy as jnp
      >>> shape_difference({"w": jnp.zeros(2)}, {"w": jnp.zeros(3)})
      'float32[2] and float32[3] at w'
    """
    sides = [
        {
            jax.tree_util.keystr(
                path, simple=True, separator="/"
            ): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (first, second)
    ]
    for path in {**sides[0], **sides[1]}:
        there, here = (side.get(path, "nothing") for side in sides)
        if there != here:
            return f"{there} and {here} at {path}"
    return ""


def with_rank(v: Array, x: Array) -> Array:
    """v with axes of length one in front, as many as x has more: to broadcast in plain sight.

    So `jax_numpy_rank_promotion='raise'`, which finds what broadcasts by mistake, finds nothing.

    Args:
      v: Array of the last axes of x, such as a bias [features].
      x: Array [..., features].

    Examples:
      >>> import jax.numpy as jnp
      >>> with_rank(jnp.zeros(3), jnp.zeros((5, 2, 3))).shape
      (1, 1, 3)
    """
    return jnp.expand_dims(v, tuple(range(x.ndim - v.ndim)))


def take_rows(tree: PyTree, rows: Any) -> PyTree:
    """Some rows of a pytree whose leaves are [n, ...].

    Args:
      tree: The pytree.
      rows: Indices, a mask or a slice.

    Examples:
      >>> import numpy as np
      >>> take_rows({"x": np.arange(4)}, slice(1, 3))["x"].tolist()
      [1, 2]
    """
    return jax.tree.map(lambda leaf: leaf[rows], tree)
