"""The long short-term memory cell."""

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.shapes import with_rank


def init_lstm(key: Array, inputs: int, hidden: int, *, recurrent: int | None = None) -> PyTree:
    """Glorot-uniform kernel [inputs + recurrent, 4 * hidden] and bias [4 * hidden].

    Args:
      key: A random key.
      inputs: Size of the input.
      hidden: Size of the cell and of its output.
      recurrent: Size of what comes back at the next step; `hidden` if None.
    """
    rows = inputs + (hidden if recurrent is None else recurrent)
    kernel = jax.nn.initializers.glorot_uniform()(key, (rows, 4 * hidden))
    # The forget gate begins open: its bias is one.
    bias = jnp.zeros((4, hidden), kernel.dtype).at[1].set(1).reshape(-1)
    return {"kernel": kernel, "bias": bias}


def lstm(params: PyTree, x: Array, h: Array, c: Array) -> tuple[Array, Array]:
    """One step: c' = s(f) c + s(i) tanh(u) and h' = s(o) tanh(c'), s the logistic function.

    The gates i, f, u, o are, in this order, the quarters of [x, h] kernel + bias.

    Args:
      params: Parameters, from `init_lstm`.
      x: Input [..., inputs].
      h: Output of the step before [..., recurrent].
      c: The cell [..., hidden].

    Returns:
      The output and the cell [..., hidden].
    """
    gates = jnp.concatenate([x, h], axis=-1) @ params["kernel"]
    return lstm_gates(gates + with_rank(params["bias"], gates), c)


def lstm_gates(gates: Array, c: Array) -> tuple[Array, Array]:
    """`lstm` from its gates on, for where their share of the input is worked out beforehand.

    Args:
      gates: I, f, u and o before their nonlinearities [..., 4 * hidden].
      c: The cell [..., hidden].

    Examples:
      >>> h, c = lstm_gates(jnp.array([0.0, 0.0, 100.0, 0.0]), jnp.array([1.0]))
      >>> float(c[0]), round(float(h[0]), 4)  # 1/2 + 1/2 and tanh(1) / 2
      (1.0, 0.3808)
    """
    i, f, u, o = jnp.split(gates, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(u)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c
