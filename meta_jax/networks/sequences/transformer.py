"""A causal transformer that reads a sequence, with a cache of keys and values."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.lookup import UsageError
from meta_jax.networks.attention import (
    after_attention,
    attend,
    check_heads,
    init_layer_norm,
    init_transformer_layer,
    layer_norm,
    project,
)
from meta_jax.networks.layers import check_at_least_one, init_linear, linear
from meta_jax.networks.sequences.sequence_network import (
    SequenceNetwork,
    keep_count,
    padding_behind,
    with_room,
    write_row,
)


class AttentionCache(NamedTuple):
    """What a causal transformer remembers of the steps it has read.

    Attributes:
      keys, values: Those of each layer, [steps, heads, width / heads].
      count: Number of steps read, an int32 scalar.
    """

    keys: list[Array]
    values: list[Array]
    count: Array


def causal_transformer(width: int = 64, layers: int = 2, heads: int = 4) -> SequenceNetwork:
    """Builds a causal transformer: layers of attention and an MLP, normalised before each.

    Positions enter as sines and cosines (Vaswani et al. 2017, section 3.5), so that a sequence may
    have any length.

    Args:
      width: Width of the layers, and number of features; the MLPs are four times as wide.
      layers: Number of layers.
      heads: Number of attention heads; divides the width.

    Raises:
      UsageError: a number below one, a width that the heads do not divide, or an odd one.
    """
    check_heads("causal_transformer", width, heads)
    check_at_least_one("causal_transformer", layers=layers)
    if width % 2:
        raise UsageError(f"the width of causal_transformer must be even, not {width}")
    return SequenceNetwork(
        functools.partial(_init, width, layers),
        functools.partial(_start, heads),
        functools.partial(_step, heads),
        functools.partial(_read, heads),
        functools.partial(_absorb, heads),
        keep_count,
    )


def _init(width: int, layers: int, key: Array, inputs: int, steps: int) -> PyTree:
    del steps
    input_key, *layer_keys = jax.random.split(key, layers + 1)
    return {
        "input": init_linear(input_key, inputs, width),
        "layers": [init_transformer_layer(k, width, 4 * width) for k in layer_keys],
        "normalisation": init_layer_norm(width),
    }


def positions(steps: Array, width: int) -> Array:
    """Sines and cosines of positions [n], in wavelengths from 2 pi to 20,000 pi: [n, width].

    Examples:
      >>> positions(jnp.array([0]), 4).tolist()
      [[0.0, 0.0, 1.0, 1.0]]
    """
    frequencies = 10_000.0 ** (-jnp.arange(width // 2) / (width // 2))
    angles = steps[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1)


def _embed(params: PyTree, xs: Array, steps: Array) -> Array:
    z = linear(params["input"], xs)
    return z + positions(steps, z.shape[-1]).astype(z.dtype)


def _read(heads: int, params: PyTree, xs: Array, mask: Array) -> Array:
    xs, place = padding_behind(xs, mask)
    return _layers(heads, params, xs)[0][place]


def _absorb(heads: int, params: PyTree, xs: Array, mask: Array, steps: int) -> AttentionCache:
    _, caches = _layers(heads, params, padding_behind(xs, mask)[0])
    keys, values = ([with_room(rows, steps) for rows in each] for each in zip(*caches, strict=True))
    return AttentionCache(keys, values, mask.sum(dtype=jnp.int32))


def _layers(heads: int, params: PyTree, xs: Array) -> tuple[Array, list[tuple[Array, Array]]]:
    """Features of a sequence without padding, and the keys and values of each layer."""
    steps, caches = jnp.arange(len(xs)), []
    z = _embed(params, xs, steps)
    seen = steps[:, None] >= steps[None]
    for layer in params["layers"]:
        query, keys, values = project(layer, z, heads)
        caches.append((keys, values))
        z = after_attention(layer, z, attend(query, keys, values, seen))
    return layer_norm(params["normalisation"], z), caches


def _start(heads: int, params: PyTree, steps: int) -> AttentionCache:
    kernel = params["input"]["kernel"]
    empty = jnp.zeros((steps, heads, kernel.shape[1] // heads), kernel.dtype)
    layers = len(params["layers"])
    return AttentionCache([empty] * layers, [empty] * layers, jnp.int32(0))


def _step(
    heads: int, params: PyTree, cache: AttentionCache, x: Array
) -> tuple[AttentionCache, Array]:
    count = cache.count
    z = _embed(params, x[None], count[None])
    seen = (jnp.arange(len(cache.keys[0])) <= count)[None]
    caches = []
    for layer, keys, values in zip(params["layers"], cache.keys, cache.values, strict=True):
        query, key, value = project(layer, z, heads)
        keys, values = write_row(keys, key[0], count), write_row(values, value[0], count)
        caches.append((keys, values))
        z = after_attention(layer, z, attend(query, keys, values, seen))
    keys, values = map(list, zip(*caches, strict=True))
    return AttentionCache(keys, values, count + 1), layer_norm(params["normalisation"], z)[0]
