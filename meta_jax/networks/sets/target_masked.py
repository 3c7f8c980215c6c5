"""A transformer whose rows all look at the set, and at no query: TNP-D, PFN and CAML."""

import functools

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.networks.attention import (
    after_attention,
    attend,
    check_heads,
    init_layer_norm,
    init_transformer_layer,
    layer_norm,
    project,
)
from meta_jax.networks.layers import check_at_least_one
from meta_jax.networks.sets.cross_attention import KeysAndValues
from meta_jax.networks.sets.set_network import SetNetwork, feedforward, init_feedforward, pairs


def target_masked_transformer(
    width: int = 64, layers: int = 4, heads: int = 4, *, hidden: int | None = None
) -> SetNetwork:
    """Builds a transformer over a set and queries with the mask of TNP-D (Nguyen and Grover 2022).

    The rows of the set look at each other, and each query at them, in every layer; nothing looks at
    a query. A query thus gets the same answer alone and among others, and the set is read once:
    what is kept of it are the keys and values of each layer. On tasks drawn from a prior it is a
    Prior-Fitted Network (Müller et al. 2022); with images and `equiangular_codes` of labels it is
    that of CAML (Fifty et al. 2024), in which the set looks at the query too.

    Args:
      width: Width of the layers.
      layers: Number of layers.
      heads: Number of attention heads; divides the width.
      hidden: Units of the MLPs, by default twice the width.

    Raises:
      UsageError: a number below one, or a width that the heads do not divide.
    """
    check_heads("target_masked_transformer", width, heads)
    hidden = 2 * width if hidden is None else hidden
    check_at_least_one("target_masked_transformer", layers=layers, hidden=hidden)
    return SetNetwork(
        functools.partial(_init, width, layers, hidden),
        functools.partial(_absorb, heads),
        functools.partial(_answer, heads),
    )


def _init(
    width: int, layers: int, hidden: int, key: Array, inputs: int, codes: int, rows: int
) -> PyTree:
    del rows
    input_key, *keys = jax.random.split(key, layers + 1)
    return {
        "input": init_feedforward(input_key, [inputs + codes + 1, width, width]),
        "layers": [init_transformer_layer(k, width, hidden) for k in keys],
        "normalisation": init_layer_norm(width),
    }


def _absorb(
    heads: int, params: PyTree, z: Array, labels: Array, mask: Array | None
) -> list[KeysAndValues]:
    seen = None if mask is None else mask[None]
    # A last column of zeros says that these are no queries.
    rows = feedforward(params["input"], jnp.pad(pairs(z, labels, mask), ((0, 0), (0, 1))))
    memory = []
    for layer in params["layers"][:-1]:
        query, keys, values = project(layer, rows, heads)
        memory.append(KeysAndValues(keys, values, seen))
        rows = after_attention(layer, rows, attend(query, keys, values, seen))
    # Nobody asks for the rows after the last layer, but for their keys and values in it.
    keys, values = project(params["layers"][-1], rows, heads, slice(1, 3))
    return [*memory, KeysAndValues(keys, values, seen)]


def _answer(heads: int, params: PyTree, memory: list[KeysAndValues], z: Array) -> Array:
    inputs = params["input"][0]["kernel"].shape[0]
    unknown = jnp.zeros((z.shape[0], inputs - z.shape[1] - 1), z.dtype)
    asked = jnp.ones((z.shape[0], 1), z.dtype)
    rows = feedforward(params["input"], jnp.concatenate([z, unknown, asked], 1))
    for layer, (keys, values, seen) in zip(params["layers"], memory, strict=True):
        (query,) = project(layer, rows, heads, slice(0, 1))
        rows = after_attention(layer, rows, attend(query, keys, values, seen))
    return layer_norm(params["normalisation"], rows)
