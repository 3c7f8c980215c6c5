"""Heads: what a metric-based method does with embeddings of the support set and the queries."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import PyTree


class Head(NamedTuple):
    """A head on embeddings, as pure functions of one task."""

    init: Callable[..., PyTree]  # (key, z [n, D], y [n, ways]) -> params
    fit: Callable[..., PyTree]  # (params, z [n, D], y [n, ways]) -> fitted
    predict: Callable[..., jax.Array]  # (params, fitted, z [m, D]) -> outputs [m, ways]


def prototypes(z: jax.Array, y: jax.Array) -> jax.Array:
    """Class means c_k = sum_i y_ik z_i / sum_i y_ik (Snell et al. 2017, eq. 1).

    Args:
      z: embeddings [n, D].
      y: one-hot labels [n, ways]; all-zero rows are padding.

    Returns:
      Prototypes [ways, D]; zero for a class without examples.

    Examples:
      >>> import jax.numpy as jnp
      >>> z = jnp.array([[0., 0.], [2., 2.], [1., -1.]])
      >>> y = jnp.array([[1., 0.], [1., 0.], [0., 1.]])
      >>> prototypes(z, y).tolist()
      [[1.0, 1.0], [1.0, -1.0]]
    """
    return y.T @ z / jnp.maximum(y.sum(0), 1)[:, None]


def squared_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Squared Euclidean distances [n, m] between the rows of a [n, D] and b [m, D].

    Examples:
      >>> import jax.numpy as jnp
      >>> centres = jnp.array([[0., 0.], [2., 2.], [1., -1.]])
      >>> squared_distance(jnp.array([[1., 2.]]), centres).tolist()
      [[5.0, 1.0, 9.0]]
    """
    # Differences, not the expanded square, whose cancellation costs half the digits.
    return ((a[:, None] - b) ** 2).sum(-1)


def cosine_similarity(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosines [n, m] between the rows of a [n, D] and b [m, D]; zero for a zero row.

    Examples:
      >>> import jax.numpy as jnp
      >>> cosine_similarity(jnp.array([[3., 0.]]), jnp.array([[1., 0.], [0., 2.]])).tolist()
      [[1.0, 0.0]]
    """

    def normalised(x: jax.Array) -> jax.Array:
        # The square root's gradient is infinite at zero, so the bound lies inside it.
        return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))

    return normalised(a) @ normalised(b).T


def prototype_head(similarity: Callable[[jax.Array, jax.Array], jax.Array]) -> Head:
    """Logits are similarities to the class prototypes; nothing is learned.

    Args:
      similarity: from queries [m, D] and prototypes [ways, D] to logits [m, ways].
    """

    def init(key: jax.Array, z: jax.Array, y: jax.Array) -> PyTree:
        del key, z, y
        return {}

    def fit(params: PyTree, z: jax.Array, y: jax.Array) -> jax.Array:
        del params
        return prototypes(z, y)

    def predict(params: PyTree, fitted: jax.Array, z: jax.Array) -> jax.Array:
        del params
        return similarity(z, fitted)

    return Head(init, fit, predict)
