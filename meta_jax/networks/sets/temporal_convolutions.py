"""Sets read one after another, in the order given: SNAIL, and any other sequence network."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.networks.sequences.sequence_network import SequenceNetwork
from meta_jax.networks.sequences.snail import snail
from meta_jax.networks.sets.set_network import SetNetwork, pairs


def temporal_convolutions(
    width: int = 64, filters: int = 64, key_size: int = 64, value_size: int = 64
) -> SetNetwork:
    """Builds SNAIL (Mishra et al. 2018) as a reader of sets: see `snail` and `read_in_order`.

    Args:
      width: Width of the input layer.
      filters: Channels that a dense block appends.
      key_size: Size of a key.
      value_size: Size of a value, which an attention block appends.
    """
    return read_in_order(
        snail(width=width, filters=filters, key_size=key_size, value_size=value_size)
    )


def read_in_order(network: SequenceNetwork) -> SetNetwork:
    """Builds a reader of sets from a network that reads sequences.

    The pairs are its steps, in the order given, which matters; each query, with zeros for the label
    and a one beside them, is one more step from where they end.

    Args:
      network: Sequence network, such as `snail`, `recurrent` or `causal_transformer`.
    """
    return SetNetwork(
        functools.partial(_init, network),
        functools.partial(_absorb, network),
        functools.partial(_answer, network),
    )


def _init(network: SequenceNetwork, key: Array, inputs: int, codes: int, rows: int) -> PyTree:
    return network.init(key, inputs + codes + 1, rows + 1)


class ReadSet(NamedTuple):
    """A set that a sequence network has read.

    Attributes:
      memory: The network's.
      unknown: Zeros for the label of a query, [codes].
    """

    memory: PyTree
    unknown: Array


def _absorb(
    network: SequenceNetwork, params: PyTree, z: Array, labels: Array, mask: Array | None
) -> ReadSet:
    # A last column of zeros says that these are no queries.
    steps = jnp.pad(pairs(z, labels, mask), ((0, 0), (0, 1)))
    mask = jnp.ones(len(z), bool) if mask is None else mask
    return ReadSet(
        network.absorb(params, steps, mask, len(z) + 1), jnp.zeros_like(steps[0, z.shape[1] : -1])
    )


def _answer(network: SequenceNetwork, params: PyTree, memory: ReadSet, z: Array) -> Array:
    asked = jnp.append(memory.unknown, jnp.ones((), z.dtype))
    steps = jnp.concatenate([z, jnp.broadcast_to(asked, (z.shape[0], asked.size))], 1)
    return jax.vmap(lambda x: network.step(params, memory.memory, x)[1])(steps)
