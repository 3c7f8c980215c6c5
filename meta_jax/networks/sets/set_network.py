"""The interface of a network that reads a set of pairs, and layers that its kinds share."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.networks.layers import init_linear, linear
from meta_jax.objectives import without_padding


class InitSet(Protocol):
    """(key, inputs, codes, rows) -> params."""

    def __call__(self, key: Array, inputs: int, codes: int, rows: int, /) -> PyTree:
        """Initial parameters for inputs [inputs] with labels [codes], in sets of up to `rows`."""
        ...


class AbsorbSet(Protocol):
    """(params, z, labels, mask) -> memory."""

    def __call__(self, params: PyTree, z: Array, labels: Array, mask: Array | None, /) -> PyTree:
        """What is kept of inputs z [n, inputs] and labels [n, codes]; padding has mask False."""
        ...


class AnswerQueries(Protocol):
    """(params, memory, z) -> features."""

    def __call__(self, params: PyTree, memory: PyTree, z: Array, /) -> Array:
        """Features [m, features] of queries z [m, inputs], each of which is alone with the set."""
        ...


class SetNetwork(NamedTuple):
    """A network that reads a set of labelled inputs, and answers queries.

    Attributes:
      init: Function (key, inputs, codes, rows) -> params, for sets of up to `rows` inputs [inputs]
        with labels [codes].
      absorb: Function (params, z, labels, mask) -> what is kept of a set.
      answer: Function (params, memory, z) -> features [m, features] of queries z [m, inputs].
    """

    init: InitSet
    absorb: AbsorbSet
    answer: AnswerQueries


def pairs(z: Array, labels: Array, mask: Array | None) -> Array:
    """Inputs and labels side by side, [n, inputs + codes]; padding is zero.

    Raises:
      ValueError: they are not vectors of as many rows.
    """
    if z.ndim != 2 or labels.ndim != 2 or len(z) != len(labels):
        raise ValueError(
            f"a set needs inputs [n, inputs] and labels [n, codes], not {list(z.shape)} and "
            f"{list(labels.shape)}"
        )
    return without_padding(jnp.concatenate([z, labels.astype(z.dtype)], 1), mask)


def init_feedforward(key: Array, sizes: Sequence[int]) -> list[PyTree]:
    """Linear layers from size to size; none where there is one size."""
    layers = list(itertools.pairwise(sizes))
    keys = jax.random.split(key, len(layers))
    return [init_linear(k, *size) for k, size in zip(keys, layers, strict=True)]


def feedforward(layers: Sequence[PyTree], x: Array) -> Array:
    """Linear layers with a ReLU between them; x [n, inputs] itself where there is none."""
    for i, layer in enumerate(layers):
        x = linear(layer, jax.nn.relu(x) if i else x)
    return x
