"""SNAIL: temporal convolutions and causal attention (Mishra et al. 2018)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.networks.attention import attend
from meta_jax.networks.layers import check_at_least_one, init_linear, linear
from meta_jax.networks.sequences.sequence_network import (
    SequenceNetwork,
    keep_count,
    padding_behind,
    with_room,
    write_row,
)


class SnailMemory(NamedTuple):
    """What SNAIL remembers of the steps it has read.

    Attributes:
      features: Features after the last block, [steps, channels]. Every block appends to its input,
        so that they begin with the input of each.
      keys, values: Those of each attention block, [steps, size].
      count: Number of steps read, an int32 scalar.
    """

    features: Array
    keys: list[Array]
    values: list[Array]
    count: Array


def snail(
    *, width: int = 32, filters: int = 32, key_size: int = 16, value_size: int = 16
) -> SequenceNetwork:
    """Builds SNAIL: twice a temporal convolution over the whole sequence and an attention block.

    A dense block of dilation d gives tanh(f) sigmoid(g), f and g causal convolutions of width two
    that look at steps t and t - d; its output is appended to its input (Mishra et al. 2018,
    algorithm 1). A temporal convolution has dilations 1, 2, 4, ... up to the length of the longest
    sequence (algorithm 2). An attention block appends what it reads (algorithm 3).

    Args:
      width: Width of the input layer.
      filters: Channels that a dense block appends.
      key_size: Size of a key.
      value_size: Size of a value, which an attention block appends.

    Raises:
      UsageError: a number below one.
    """
    check_at_least_one(
        "snail", width=width, filters=filters, key_size=key_size, value_size=value_size
    )
    return SequenceNetwork(
        functools.partial(_init, width, filters, key_size, value_size),
        functools.partial(_start, key_size),
        functools.partial(_step, key_size),
        functools.partial(_read, key_size),
        functools.partial(_absorb, key_size),
        keep_count,
    )


def _init(
    width: int,
    filters: int,
    key_size: int,
    value_size: int,
    key: Array,
    inputs: int,
    steps: int,
) -> PyTree:
    convolutions = ["dense"] * max(1, (steps - 1).bit_length())
    kinds = [*convolutions, "attention"] * 2
    input_key, *keys = jax.random.split(key, len(kinds) + 1)
    blocks, channels = [], width
    for kind, block_key in zip(kinds, keys, strict=True):
        if kind == "dense":
            blocks.append({kind: init_linear(block_key, 2 * channels, 2 * filters)})
            channels += filters
        else:
            blocks.append({kind: init_linear(block_key, channels, 2 * key_size + value_size)})
            channels += value_size
    return {"input": init_linear(input_key, inputs, width), "blocks": blocks}


def _dilations(params: PyTree) -> list[int]:
    """The dilation of each block: 1, 2, 4, ... within a temporal convolution; 0 for attention."""
    dilations, following = [], 1
    for block in params["blocks"]:
        dilations.append(following if "dense" in block else 0)
        following = 2 * following if "dense" in block else 1
    return dilations


def _dense(block: PyTree, before: Array, x: Array) -> Array:
    """x [n, channels] with the block's output beside it; `before` is x of `dilation` steps ago."""
    f, g = jnp.split(linear(block["dense"], jnp.concatenate([before, x], 1)), 2, axis=1)
    return jnp.concatenate([x, jnp.tanh(f) * jax.nn.sigmoid(g)], 1)


def _projections(key_size: int, block: PyTree, x: Array) -> list[Array]:
    """Queries, keys and values of x [n, channels]."""
    return jnp.split(linear(block["attention"], x), (key_size, 2 * key_size), axis=1)


def _attend(x: Array, query: Array, keys: Array, values: Array, seen: Array) -> Array:
    """x [n, channels] with what its queries read beside it; seen [n, m] says of which steps."""
    read = attend(query[:, None], keys[:, None], values[:, None], seen)
    return jnp.concatenate([x, read[:, 0]], 1)


def _read(key_size: int, params: PyTree, xs: Array, mask: Array) -> Array:
    xs, place = padding_behind(xs, mask)
    return _blocks(key_size, params, xs)[0][place]


def _absorb(key_size: int, params: PyTree, xs: Array, mask: Array, steps: int) -> SnailMemory:
    kept = _blocks(key_size, params, padding_behind(xs, mask)[0])
    features, keys, values = jax.tree.map(functools.partial(with_room, steps=steps), kept)
    return SnailMemory(features, keys, values, mask.sum(dtype=jnp.int32))


def _blocks(key_size: int, params: PyTree, xs: Array) -> tuple[Array, list[Array], list[Array]]:
    """Features of a sequence without padding, and keys and values of each attention block."""
    x, all_keys, all_values = linear(params["input"], xs), [], []
    steps = jnp.arange(len(x))
    for block, dilation in zip(params["blocks"], _dilations(params), strict=True):
        if dilation:
            x = _dense(block, jnp.pad(x, ((dilation, 0), (0, 0)))[: len(x)], x)
        else:
            query, keys, values = _projections(key_size, block, x)
            all_keys.append(keys)
            all_values.append(values)
            x = _attend(x, query, keys, values, steps[:, None] >= steps[None])
    return x, all_keys, all_values


def _start(key_size: int, params: PyTree, steps: int) -> SnailMemory:
    x = jnp.zeros((0, params["input"]["kernel"].shape[0]), params["input"]["kernel"].dtype)
    return _absorb(key_size, params, x, jnp.zeros(0, bool), steps)


def _step(
    key_size: int, params: PyTree, memory: SnailMemory, x: Array
) -> tuple[SnailMemory, Array]:
    count, all_keys, all_values = memory.count, [], []
    x = linear(params["input"], x[None])
    for block, dilation in zip(params["blocks"], _dilations(params), strict=True):
        if dilation:
            earlier = memory.features[jnp.maximum(count - dilation, 0)][None, : x.shape[1]]
            x = _dense(block, jnp.where(count >= dilation, earlier, 0), x)
        else:
            query, key, value = _projections(key_size, block, x)
            keys = write_row(memory.keys[len(all_keys)], key[0], count)
            values = write_row(memory.values[len(all_values)], value[0], count)
            all_keys.append(keys)
            all_values.append(values)
            x = _attend(x, query, keys, values, (jnp.arange(len(keys)) <= count)[None])
    features = write_row(memory.features, x[0], count)
    return SnailMemory(features, all_keys, all_values, count + 1), x[0]
