"""Networks that read a trial step by step: what a learned policy remembers."""

from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.networks.layers import init_linear, linear
from meta_jax.networks.lstm import init_lstm, lstm_gates


class InitMemory(Protocol):
    """(key, inputs) -> params."""

    def __call__(self, key: Array, inputs: int, /) -> PyTree:
        """Initial parameters for inputs [inputs]."""
        ...


class StartMemory(Protocol):
    """(params) -> memory."""

    def __call__(self, params: PyTree, /) -> PyTree:
        """The memory at the beginning of a trial."""
        ...


class ReadStep(Protocol):
    """(params, memory, x) -> (memory, features)."""

    def __call__(self, params: PyTree, memory: PyTree, x: Array, /) -> tuple[PyTree, Array]:
        """Reads one step, x [inputs]; gives features [features]."""
        ...


class ReadTrial(Protocol):
    """(params, xs, mask) -> features."""

    def __call__(self, params: PyTree, xs: Array, mask: Array, /) -> Array:
        """Reads a whole trial, xs [steps, inputs]: features [steps, features].

        Step t's are those that `step` gives after the steps before it that are not padding.
        """
        ...


class MemoryNetwork(NamedTuple):
    """A network that reads a trial.

    Attributes:
      init: Function (key, inputs) -> params.
      start: Function (params) -> the memory at the beginning of a trial.
      step: Function (params, memory, x) -> (memory, features), x [inputs].
      read: Function (params, xs, mask) -> features [steps, features] of a whole trial.
      features: Number of features.
    """

    init: InitMemory
    start: StartMemory
    step: ReadStep
    read: ReadTrial
    features: int


def recurrent(hidden_size: int, cell: Literal["gru", "lstm"] = "gru") -> MemoryNetwork:
    """Builds a recurrent memory: one GRU (Cho et al. 2014) or LSTM layer.

    Args:
      hidden_size: Units of the layer.
      cell: 'gru' or 'lstm'.
    """
    init, advance = {"gru": (init_gru, _gru), "lstm": (_init_lstm, _lstm)}[cell]

    def init_memory(key: Array, inputs: int, /) -> PyTree:
        return init(key, inputs, hidden_size)

    def start(params: PyTree, /) -> PyTree:
        zeros = jnp.zeros(hidden_size, params["recurrent"]["kernel"].dtype)
        return zeros if cell == "gru" else (zeros, zeros)

    def step(params: PyTree, memory: PyTree, x: Array, /) -> tuple[PyTree, Array]:
        memory = advance(params, memory, linear(params["input"], x))
        return memory, memory if cell == "gru" else memory[0]

    def read(params: PyTree, xs: Array, mask: Array, /) -> Array:
        def body(memory: PyTree, inputs: tuple[Array, Array]) -> tuple[PyTree, Array]:
            projected, real = inputs
            after = advance(params, memory, projected)
            kept = jax.tree.map(lambda new, old: jnp.where(real, new, old), after, memory)
            return kept, after if cell == "gru" else after[0]

        # One product for all steps.
        return jax.lax.scan(body, start(params), (linear(params["input"], xs), mask))[1]

    return MemoryNetwork(init_memory, start, step, read, hidden_size)


def init_gru(key: Array, inputs: int, hidden_size: int) -> PyTree:
    """Initial parameters of a GRU: {'input', 'recurrent'}, the gates' columns r, z, n side by side.

    The recurrent kernels are orthogonal.
    """
    input_key, *keys = jax.random.split(key, 4)
    orthogonal = jax.nn.initializers.orthogonal()
    kernels = [orthogonal(k, (hidden_size, hidden_size)) for k in keys]
    return {
        "input": init_linear(input_key, inputs, 3 * hidden_size),
        "recurrent": {
            "kernel": jnp.concatenate(kernels, 1),
            "bias": jnp.zeros(hidden_size),
        },
    }


def _gru(params: PyTree, h: Array, projected: Array) -> Array:
    """One step of a GRU.

    r, z = sigmoid(x + U h), n = tanh(x + r (U h + b)), h' = (1 - z) n + z h, x already projected.
    """
    size = h.shape[-1]
    back = h @ params["recurrent"]["kernel"]
    gates = jax.nn.sigmoid(projected[: 2 * size] + back[: 2 * size])
    r, z = gates[:size], gates[size:]
    n = jnp.tanh(projected[2 * size :] + r * (back[2 * size :] + params["recurrent"]["bias"]))
    return (1 - z) * n + z * h


def _init_lstm(key: Array, inputs: int, hidden_size: int) -> PyTree:
    """Initial parameters of an LSTM, its input kernel apart."""
    both = init_lstm(key, inputs, hidden_size)
    return {
        "input": {"kernel": both["kernel"][:inputs], "bias": both["bias"]},
        "recurrent": {"kernel": both["kernel"][inputs:]},
    }


def _lstm(params: PyTree, memory: tuple[Array, Array], projected: Array) -> tuple[Array, Array]:
    hidden, cell = memory
    return lstm_gates(projected + hidden @ params["recurrent"]["kernel"], cell)


def init_head(key: Array, inputs: int, outputs: int, scale: float) -> PyTree:
    """Initial parameters of an output layer: an orthogonal kernel of this scale, and no bias."""
    kernel = jax.nn.initializers.orthogonal(scale)(key, (inputs, outputs))
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}
