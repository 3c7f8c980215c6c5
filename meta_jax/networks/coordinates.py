"""Small networks on every coordinate of a large vector; all coordinates share their weights.

Coordinates come last, [..., coordinates], for vectors of some 20 units fill no register; and a CPU
works on one chunk of them after another, so that their activations stay in its cache.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from meta_jax.backend import on_cpu
from meta_jax.core import Array, PyTree
from meta_jax.networks.lstm import lstm_gates
from meta_jax.shapes import with_rank

_CHUNK = 512


def split_coordinates(x: Array) -> Array:
    """[..., coordinates] -> [chunks, ..., chunk], the last one filled up with zeros.

    Examples:
      >>> split_coordinates(jnp.ones((2, 1000))).shape
      (2, 2, 512)
    """
    *rest, count = x.shape
    size = min(_CHUNK, count) if on_cpu() else count
    chunks = math.ceil(count / size)
    padded = jnp.pad(x, [(0, 0)] * len(rest) + [(0, chunks * size - count)])
    return jnp.moveaxis(padded.reshape(*rest, chunks, size), -2, 0)


def join_coordinates(x: Array, count: int) -> Array:
    """The inverse of `split_coordinates`: [chunks, ..., chunk] -> [..., count].

    Examples:
      >>> x = jnp.arange(2000.0).reshape(2, 1000)
      >>> bool((join_coordinates(split_coordinates(x), 1000) == x).all())
      True
    """
    x = jnp.moveaxis(x, 0, -2)
    return x.reshape(*x.shape[:-2], -1)[..., :count]


def map_chunks(network: Callable[..., PyTree], *arrays: PyTree) -> PyTree:
    """A network on each chunk of arrays that `split_coordinates` made.

    Activations, by far the largest arrays of all, are worked out again in the backward pass.
    """
    remade = jax.checkpoint(lambda chunk: network(*chunk), prevent_cse=False)
    return jax.lax.map(remade, arrays)


def linear_across(params: PyTree, x: Array) -> Array:
    """`linear` on columns: x [..., inputs, coordinates] -> [..., outputs, coordinates]."""
    y = jnp.einsum("io,...ic->...oc", params["kernel"], x)
    return y + with_rank(params["bias"][:, None], y)


def lstm_across(params: PyTree, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
    """`lstm` on columns: x [inputs, coordinates], h and c [hidden, coordinates]."""
    gates = linear_across(params, jnp.concatenate([x, h]))
    return jax.vmap(lstm_gates, (1, 1), (1, 1))(gates, c)
