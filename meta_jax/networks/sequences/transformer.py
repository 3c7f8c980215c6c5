"""A causal transformer that reads a sequence, with a cache of keys and values."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.lookup import UsageError
from meta_jax.networks.layers import check_at_least_one, init_linear, linear
from meta_jax.networks.sequences.sequence_network import (
    SequenceNetwork,
    padding_behind,
    write_row,
)


class AttentionCache(NamedTuple):
    """What a causal transformer remembers of the steps it has read.

    Attributes:
      keys, values: Those of each layer, [layers, steps, heads, width / heads].
      count: Number of steps read, an int32 scalar.
    """

    keys: Array
    values: Array
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
    check_at_least_one("causal_transformer", width=width, layers=layers, heads=heads)
    if width % heads or width % 2:
        raise UsageError(
            f"the width of a transformer must be even and a multiple of its heads: width={width}, "
            f"heads={heads}"
        )
    return SequenceNetwork(
        functools.partial(_init, width, layers),
        functools.partial(_start, heads),
        functools.partial(_step, heads),
        functools.partial(_read, heads),
    )


def _init(width: int, layers: int, key: Array, inputs: int, steps: int) -> PyTree:
    del steps
    input_key, *layer_keys = jax.random.split(key, layers + 1)
    return {
        "input": init_linear(input_key, inputs, width),
        "layers": [_init_layer(width, k) for k in layer_keys],
        "normalisation": _init_normalisation(width),
    }


def _init_layer(width: int, key: Array) -> PyTree:
    sizes = {
        "query_key_value": (width, 3 * width),
        "attention_output": (width, width),
        "hidden": (width, 4 * width),
        "output": (4 * width, width),
    }
    keys = jax.random.split(key, len(sizes))
    linears = {n: init_linear(k, *size) for k, (n, size) in zip(keys, sizes.items(), strict=True)}
    names = ("attention_normalisation", "mlp_normalisation")
    return linears | {name: _init_normalisation(width) for name in names}


def _init_normalisation(width: int) -> PyTree:
    return {"scale": jnp.ones(width), "offset": jnp.zeros(width)}


def layer_norm(params: PyTree, x: Array) -> Array:
    """Layer normalisation over the last axis (Ba et al. 2016)."""
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * params["scale"] + params["offset"]


def positions(steps: Array, width: int) -> Array:
    """Sines and cosines of positions [n], in wavelengths from 2 pi to 20,000 pi: [n, width].

    Examples:
      >>> positions(jnp.array([0]), 4).tolist()
      [[0.0, 0.0, 1.0, 1.0]]
    """
    frequencies = 10_000.0 ** (-jnp.arange(width // 2) / (width // 2))
    angles = steps[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], 1)


def _embed(params: PyTree, xs: Array, steps: Array) -> Array:
    z = linear(params["input"], xs)
    return z + positions(steps, z.shape[-1]).astype(z.dtype)


def _heads(heads: int, layer: PyTree, z: Array) -> tuple[Array, Array, Array]:
    """Queries, keys and values of steps z [n, width]: each [n, heads, width / heads]."""
    projected = linear(layer["query_key_value"], layer_norm(layer["attention_normalisation"], z))
    query, key, value = jnp.split(projected.reshape(len(z), heads, -1), 3, axis=-1)
    return query, key, value


def _attend(query: Array, keys: Array, values: Array, seen: Array) -> Array:
    """Attention of queries [n, heads, d] to keys and values [m, heads, d], where seen [n, m]."""
    scores = jnp.einsum("nhd,mhd->hnm", query, keys) / jnp.sqrt(query.shape[-1]).astype(query.dtype)
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("hnm,mhd->nhd", weights, values).reshape(len(query), -1)


def _after_attention(layer: PyTree, z: Array, attended: Array) -> Array:
    z = z + linear(layer["attention_output"], attended)
    hidden = jax.nn.gelu(linear(layer["hidden"], layer_norm(layer["mlp_normalisation"], z)))
    return z + linear(layer["output"], hidden)


def _read(heads: int, params: PyTree, xs: Array, mask: Array) -> Array:
    xs, place = padding_behind(xs, mask)
    steps = jnp.arange(len(xs))
    z = _embed(params, xs, steps)
    seen = steps[:, None] >= steps
    for layer in params["layers"]:
        z = _after_attention(layer, z, _attend(*_heads(heads, layer, z), seen))
    return layer_norm(params["normalisation"], z)[place]


def _start(heads: int, params: PyTree, steps: int) -> AttentionCache:
    kernel = params["input"]["kernel"]
    shape = (len(params["layers"]), steps, heads, kernel.shape[1] // heads)
    empty = jnp.zeros(shape, kernel.dtype)
    return AttentionCache(empty, empty, jnp.int32(0))


def _step(
    heads: int, params: PyTree, cache: AttentionCache, x: Array
) -> tuple[AttentionCache, Array]:
    count = cache.count
    z = _embed(params, x[None], count[None])
    seen = (jnp.arange(cache.keys.shape[1]) <= count)[None]
    caches = []
    for layer, keys, values in zip(params["layers"], cache.keys, cache.values, strict=True):
        query, key, value = _heads(heads, layer, z)
        keys, values = write_row(keys, key[0], count), write_row(values, value[0], count)
        caches.append((keys, values))
        z = _after_attention(layer, z, _attend(query, keys, values, seen))
    keys, values = map(jnp.stack, zip(*caches, strict=True))
    return AttentionCache(keys, values, count + 1), layer_norm(params["normalisation"], z)[0]
