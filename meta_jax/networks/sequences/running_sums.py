"""A network that remembers sums over the steps it has read, in no order."""

import functools

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.networks.layers import check_at_least_one, init_linear, linear
from meta_jax.networks.sequences.sequence_network import SequenceNetwork
from meta_jax.shapes import with_rank


def running_sums(width: int = 128) -> SequenceNetwork:
    """Builds a network whose memory is a sum (Zaheer et al. 2017, Deep Sets), read by each step.

    S_t = sum_s A x_s over the steps s up to t. With the query q_t = B x_t, an MLP of two hidden
    layers reads [asinh(S_t), q_t asinh(S_t), x_t], so that a step can choose what it wants to know.
    Where inputs are one-hot the sums are counts: what a trial tells whose order does not matter, as
    in bandits and Markov decision processes.

    Args:
      width: Number of sums, of units of each hidden layer, and of features.

    Raises:
      UsageError: no unit.
    """
    check_at_least_one("running_sums", width=width)
    return SequenceNetwork(functools.partial(_init, width), _start, _step, _read, _absorb)


def _init(width: int, key: Array, inputs: int, steps: int) -> PyTree:
    del steps
    sizes = {
        "summed": (inputs, width),
        "query": (inputs, width),
        "hidden": (2 * width + inputs, width),
        "output": (width, width),
    }
    keys = jax.random.split(key, len(sizes))
    return {n: init_linear(k, *size) for k, (n, size) in zip(keys, sizes.items(), strict=True)}


def _start(params: PyTree, steps: int) -> Array:
    del steps
    return jnp.zeros_like(params["summed"]["bias"])


def _step(params: PyTree, memory: Array, x: Array) -> tuple[Array, Array]:
    memory = memory + x @ params["summed"]["kernel"]
    return memory, _features(params, memory, x)


def _read(params: PyTree, xs: Array, mask: Array) -> Array:
    summed = jnp.where(mask[:, None], xs @ params["summed"]["kernel"], 0)
    return _features(params, jnp.cumsum(summed, 0), xs)


def _absorb(params: PyTree, xs: Array, mask: Array, steps: int) -> Array:
    del steps
    return jnp.where(mask[:, None], xs, 0).sum(0) @ params["summed"]["kernel"]


def _features(params: PyTree, sums: Array, x: Array) -> Array:
    """Features of steps x [..., inputs] by the sums up to them, [..., width]."""
    sums = jnp.arcsinh(sums + with_rank(params["summed"]["bias"], sums))
    read = jnp.concatenate([sums, linear(params["query"], x) * sums, x], -1)
    hidden = jax.nn.relu(linear(params["hidden"], read))
    return jax.nn.relu(linear(params["output"], hidden))
