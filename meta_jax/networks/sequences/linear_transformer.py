"""A causal transformer with linear attention, whose memory does not grow with the sequence."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.networks.attention import (
    after_attention,
    check_heads,
    init_layer_norm,
    init_transformer_layer,
    layer_norm,
    project,
)
from meta_jax.networks.layers import check_at_least_one, init_linear, linear
from meta_jax.networks.sequences.sequence_network import SequenceNetwork


class LinearAttentionMemory(NamedTuple):
    """Sums over the steps that were read, one for each layer and head.

    Attributes:
      products: Sums of keys times values, [layers, heads, width / heads, width / heads].
      keys: Sums of keys, [layers, heads, width / heads].
    """

    products: Array
    keys: Array


def linear_transformer(width: int = 64, layers: int = 2, heads: int = 4) -> SequenceNetwork:
    """Builds a causal transformer with linear attention (Katharopoulos et al. 2020).

    A step reads sum_s (phi(q) phi(k_s)) v_s / sum_s phi(q) phi(k_s) over all steps s up to its own,
    phi(x) = elu(x) + 1, so that its memory is two sums. The logarithm of the denominator, which
    tells how much was found, is an input of the output layer besides. There are no positions: what
    is remembered does not depend on the order of the steps before.

    Args:
      width: Width of the layers, and number of features; the MLPs are four times as wide.
      layers: Number of layers.
      heads: Number of attention heads; divides the width.

    Raises:
      UsageError: a number below one, or a width that the heads do not divide.
    """
    check_heads("linear_transformer", width, heads)
    check_at_least_one("linear_transformer", layers=layers)
    return SequenceNetwork(
        functools.partial(_init, width, layers, heads),
        functools.partial(_start, heads),
        functools.partial(_step, heads),
        functools.partial(_read, heads),
        functools.partial(_absorb, heads),
    )


def _init(width: int, layers: int, heads: int, key: Array, inputs: int, steps: int) -> PyTree:
    del steps
    input_key, *layer_keys = jax.random.split(key, layers + 1)
    return {
        "input": init_linear(input_key, inputs, width),
        "layers": [_init_layer(width, heads, k) for k in layer_keys],
        "normalisation": init_layer_norm(width),
    }


def _init_layer(width: int, heads: int, key: Array) -> PyTree:
    layer_key, count_key = jax.random.split(key)
    layer = init_transformer_layer(layer_key, width, 4 * width)
    return layer | {"count": init_linear(count_key, heads, width)}


def _start(heads: int, params: PyTree, steps: int) -> LinearAttentionMemory:
    del steps
    kernel = params["input"]["kernel"]
    layers, size = len(params["layers"]), kernel.shape[1] // heads
    zeros = functools.partial(jnp.zeros, dtype=kernel.dtype)
    return LinearAttentionMemory(zeros((layers, heads, size, size)), zeros((layers, heads, size)))


def _step(
    heads: int, params: PyTree, memory: LinearAttentionMemory, x: Array
) -> tuple[LinearAttentionMemory, Array]:
    z = linear(params["input"], x)[None]
    sums = []
    for layer, products, keys in zip(params["layers"], *memory, strict=True):
        query, key, value = _project(heads, layer, z)
        products = products + key[0, :, :, None] * value[0, :, None, :]
        keys = keys + key[0]
        sums.append((products, keys))
        found = jnp.einsum("nhk,hkv->nhv", query, products)
        z = _after(layer, z, found, jnp.einsum("nhk,hk->nh", query, keys))
    products, keys = map(jnp.stack, zip(*sums, strict=True))
    return LinearAttentionMemory(products, keys), layer_norm(params["normalisation"], z)[0]


def _read(heads: int, params: PyTree, xs: Array, mask: Array) -> Array:
    return _layers(heads, params, xs, mask)[0]


def _absorb(
    heads: int, params: PyTree, xs: Array, mask: Array, steps: int
) -> LinearAttentionMemory:
    del steps
    return _layers(heads, params, xs, mask)[1]


def _layers(
    heads: int, params: PyTree, xs: Array, mask: Array
) -> tuple[Array, LinearAttentionMemory]:
    """Features of a sequence, and the memory after it."""
    z, sums = linear(params["input"], xs), []
    seen = jnp.tril(jnp.ones((len(xs), len(xs)), z.dtype))
    for layer in params["layers"]:
        query, key, value = _project(heads, layer, z)
        key = jnp.where(mask[:, None, None], key, 0)
        sums.append((jnp.einsum("nhk,nhv->hkv", key, value), key.sum(0)))
        weights = jnp.einsum("nhk,mhk->hnm", query, key) * seen[None]
        z = _after(layer, z, jnp.einsum("hnm,mhv->nhv", weights, value), weights.sum(-1).T)
    products, keys = map(jnp.stack, zip(*sums, strict=True))
    return layer_norm(params["normalisation"], z), LinearAttentionMemory(products, keys)


def _project(heads: int, layer: PyTree, z: Array) -> tuple[Array, Array, Array]:
    """phi of queries and of keys, and values, of rows z [n, width]: [n, heads, width / heads]."""
    query, key, value = project(layer, z, heads)
    return jax.nn.elu(query) + 1, jax.nn.elu(key) + 1, value


def _after(layer: PyTree, z: Array, found: Array, weight: Array) -> Array:
    """The rows after a layer, by sums of values [n, heads, d] and their weights [n, heads]."""
    # Before the first step that is no padding the sums are empty.
    weight = jnp.where(weight > 0, weight, 1)
    z = z + linear(layer["count"], jnp.log(weight))
    return after_attention(layer, z, found / weight[..., None])
