"""Codes by which labels enter a network."""

import jax.numpy as jnp

from meta_jax.core import Array
from meta_jax.lookup import UsageError


def equiangular_codes(ways: int) -> Array:
    """Vectors of length one, any two of which have the same and the largest possible angle.

    They are the corners of a regular simplex, sqrt(n / (n - 1)) (I - 1 / n) for n ways, which
    Fifty et al. (2024) show to be the best codes of labels (ELMES).

    Args:
      ways: Number of labels, at least two.

    Returns:
      [ways, ways], one code in a row.

    Raises:
      UsageError: less than two ways.

    Examples:
      >>> (equiangular_codes(3) @ equiangular_codes(3).T).round(3).tolist()
      [[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]]
    """
    if ways < 2:
        raise UsageError(f"equiangular codes need at least 2 ways, not {ways}")
    return jnp.sqrt(ways / (ways - 1)) * (jnp.eye(ways) - 1 / ways)
