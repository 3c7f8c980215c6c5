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
    padding_behind,
    with_room,
    write_row,
)


class SnailMemory(NamedTuple):
    """What SNAIL remembers of the steps it has read.

    Attributes:
      rows: For each block, the inputs of a dense one [steps, channels], or the keys and values of
        attention, [steps, size] each.
      count: Number of steps read, an int32 scalar.
    """

    rows: list[PyTree]
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
    _, rows = _blocks(key_size, params, padding_behind(xs, mask)[0])
    rows = jax.tree.map(functools.partial(with_room, steps=steps), rows)
    return SnailMemory(rows, mask.sum(dtype=jnp.int32))


def _blocks(key_size: int, params: PyTree, xs: Array) -> tuple[Array, list[PyTree]]:
    """Features of a sequence without padding, and what each block remembers of it."""
    x, rows = linear(params["input"], xs), []
    steps = jnp.arange(len(x))
    for block, dilation in zip(params["blocks"], _dilations(params), strict=True):
        if dilation:
            rows.append([x])
            x = _dense(block, jnp.pad(x, ((dilation, 0), (0, 0)))[: len(x)], x)
        else:
            query, keys, values = _projections(key_size, block, x)
            rows.append([keys, values])
            x = _attend(x, query, keys, values, steps[:, None] >= steps[None])
    return x, rows


def _start(key_size: int, params: PyTree, steps: int) -> SnailMemory:
    rows = []
    for block in params["blocks"]:
        (kind, weights), *_ = block.items()
        height, columns = weights["kernel"].shape
        sizes = (height // 2,) if kind == "dense" else (key_size, columns - 2 * key_size)
        rows.append([jnp.zeros((steps, size), weights["kernel"].dtype) for size in sizes])
    return SnailMemory(rows, jnp.int32(0))


def _step(
    key_size: int, params: PyTree, memory: SnailMemory, x: Array
) -> tuple[SnailMemory, Array]:
    count, rows = memory.count, []
    x = linear(params["input"], x[None])
    for block, dilation, kept in zip(
        params["blocks"], _dilations(params), memory.rows, strict=True
    ):
        if dilation:
            (inputs,) = kept
            earlier = inputs[jnp.maximum(count - dilation, 0)][None]
            rows.append([write_row(inputs, x[0], count)])
            x = _dense(block, jnp.where(count >= dilation, earlier, 0), x)
        else:
            query, key, value = _projections(key_size, block, x)
            keys, values = write_row(kept[0], key[0], count), write_row(kept[1], value[0], count)
            rows.append([keys, values])
            x = _attend(x, query, keys, values, (jnp.arange(len(keys)) <= count)[None])
    return SnailMemory(rows, count + 1), x[0]
