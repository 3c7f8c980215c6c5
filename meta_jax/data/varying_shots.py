"""Support sets of random size, in arrays of one size."""

import jax
import jax.numpy as jnp

from meta_jax.core import Array, Batch


def with_random_shots(key: Array, support: Batch, least: int) -> Batch:
    """A support set of which a random number of rows is real, and the others are padding.

    Args:
      key: A random key.
      support: The rows.
      least: Smallest number of real rows; where there are no more, all are real, without a mask.
    """
    rows = len(support.y)
    if least >= rows:
        return support
    return support._replace(mask=jnp.arange(rows) < jax.random.randint(key, (), least, rows + 1))
