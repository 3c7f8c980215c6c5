"""Recurrent layers that read a sequence: GRU and LSTM."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.networks.layers import check_at_least_one, init_linear, linear
from meta_jax.networks.lstm import init_lstm, lstm_gates
from meta_jax.networks.sequences.sequence_network import SequenceNetwork

CellName = Literal["gru", "lstm"]


def recurrent(hidden_size: int, cell: CellName = "gru") -> SequenceNetwork:
    """Builds one recurrent layer: a GRU (Cho et al. 2014) or an LSTM.

    Args:
      hidden_size: Units of the layer.
      cell: 'gru' or 'lstm'.

    Raises:
      UsageError: no unit.
    """
    check_at_least_one("recurrent", hidden_size=hidden_size)
    init = _init_gru if cell == "gru" else _init_lstm
    return SequenceNetwork(
        functools.partial(init, hidden_size),
        functools.partial(_start, hidden_size, cell),
        functools.partial(_step, cell),
        functools.partial(_read, hidden_size, cell),
        functools.partial(_absorb, hidden_size, cell),
    )


def _start(hidden_size: int, cell: CellName, params: PyTree, steps: int) -> PyTree:
    del steps
    zeros = jnp.zeros(hidden_size, params["recurrent"]["kernel"].dtype)
    return zeros if cell == "gru" else (zeros, zeros)


def _step(cell: CellName, params: PyTree, memory: PyTree, x: Array) -> tuple[PyTree, Array]:
    return _advance(cell, params, memory, linear(params["input"], x))


def _read(hidden_size: int, cell: CellName, params: PyTree, xs: Array, mask: Array) -> Array:
    return _scan(hidden_size, cell, params, xs, mask)[1]


def _absorb(
    hidden_size: int, cell: CellName, params: PyTree, xs: Array, mask: Array, steps: int
) -> PyTree:
    del steps
    return _scan(hidden_size, cell, params, xs, mask)[0]


def _scan(
    hidden_size: int, cell: CellName, params: PyTree, xs: Array, mask: Array
) -> tuple[PyTree, Array]:
    """The memory after a sequence, and the features of its steps."""

    def body(memory: PyTree, inputs: tuple[Array, Array]) -> tuple[PyTree, Array]:
        projected, real = inputs
        after, features = _advance(cell, params, memory, projected)
        kept = jax.tree.map(lambda new, old: jnp.where(real, new, old), after, memory)
        return kept, features

    # One product for the inputs of all steps.
    projected = linear(params["input"], xs)
    start = _start(hidden_size, cell, params, len(xs))
    return jax.lax.scan(body, start, (projected, mask))


def _advance(
    cell: CellName, params: PyTree, memory: PyTree, projected: Array
) -> tuple[PyTree, Array]:
    """The memory and the features after a step whose input is projected already."""
    if cell == "gru":
        hidden = _gru(params["recurrent"], memory, projected)
        return hidden, hidden
    hidden, c = memory
    hidden, c = lstm_gates(projected + hidden @ params["recurrent"]["kernel"], c)
    return (hidden, c), hidden


def _init_gru(hidden_size: int, key: Array, inputs: int, steps: int) -> PyTree:
    """Initial parameters of a GRU: {'input', 'recurrent'}, the gates' columns r, z, n side by side.

    The recurrent kernels are orthogonal.
    """
    del steps
    input_key, *keys = jax.random.split(key, 4)
    orthogonal = jax.nn.initializers.orthogonal()
    kernel = jnp.concatenate([orthogonal(k, (hidden_size, hidden_size)) for k in keys], 1)
    return {
        "input": init_linear(input_key, inputs, 3 * hidden_size),
        "recurrent": {"kernel": kernel, "bias": jnp.zeros(hidden_size, kernel.dtype)},
    }


def _gru(params: PyTree, h: Array, projected: Array) -> Array:
    """One step of a GRU.

    r, z = sigmoid(x + U h), n = tanh(x + r (U h + b)), h' = (1 - z) n + z h, x already projected.
    """
    size = h.shape[-1]
    back = h @ params["kernel"]
    gates = jax.nn.sigmoid(projected[: 2 * size] + back[: 2 * size])
    r, z = gates[:size], gates[size:]
    n = jnp.tanh(projected[2 * size :] + r * (back[2 * size :] + params["bias"]))
    return (1 - z) * n + z * h


def _init_lstm(hidden_size: int, key: Array, inputs: int, steps: int) -> PyTree:
    """Initial parameters of an LSTM, its input kernel apart."""
    del steps
    both = init_lstm(key, inputs, hidden_size)
    return {
        "input": {"kernel": both["kernel"][:inputs], "bias": both["bias"]},
        "recurrent": {"kernel": both["kernel"][inputs:]},
    }
