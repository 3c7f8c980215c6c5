"""An external memory: content addressing and least-recently-used-access writes.

The primitives of Santoro et al. (2016, arXiv:1605.06065), section 3, for one task and one step.
Their order is made explicit in `access_memory`: the least used rows are found and erased, the keys
are written, the memory WITH what was just written is read, the usage is brought up to date.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_EPSILON = 1e-8  # keeps the cosine of an empty row, and its gradient, finite


class Memory(NamedTuple):
    """A memory between two steps."""

    rows: jax.Array  # [slots, width] what is remembered
    read_weights: jax.Array  # [heads, slots] where each head read last, sums to 1
    usage: jax.Array  # [slots] decayed sum of all read and write weights


def empty_memory(slots: int, width: int, heads: int, dtype: jnp.dtype | None = None) -> Memory:
    """Rows of zeros, never used; the read weights are those of reading it, uniform."""
    return Memory(
        jnp.zeros((slots, width), dtype),
        jnp.full((heads, slots), 1 / slots, dtype),
        jnp.zeros(slots, dtype),
    )


def content_address(keys: jax.Array, rows: jax.Array, *, strength: float = 1.0) -> jax.Array:
    """w(i) = softmax_i(strength cos(k, M(i))) (eqs. 2 and 3).

    Args:
      keys: [heads, width].
      rows: [slots, width].
      strength: 1 in the paper, so that no slot of many can stand out by more than e^2: reads are
        blurred. Larger ones are sharper.

    Returns:
      Weights [heads, slots], each head's summing to 1; uniform on an empty memory.

    Examples:
      >>> weights = content_address(jnp.array([[1.0, 0.0]]), jnp.array([[2.0, 0.0], [0.0, 0.0]]))
      >>> [round(float(w), 4) for w in weights[0]]  # softmax(1, 0)
      [0.7311, 0.2689]
    """

    def inverse_norm(x: jax.Array) -> jax.Array:
        return jax.lax.rsqrt((x * x).sum(-1) + _EPSILON)

    cosines = (keys * inverse_norm(keys)[:, None]) @ rows.T * inverse_norm(rows)
    return jax.nn.softmax(strength * cosines)


def least_used(usage: jax.Array, heads: int) -> jax.Array:
    """Where each head may write: head n gets the n-th least used slot, one-hot (eq. 6).

    The paper's 1[w^u(i) <= m(w^u, n)] marks n slots at once, and more where usages tie; one slot
    for each head keeps the write weights' sum at 1. No gradient passes.

    Args:
      usage: [slots].
      heads: how many slots, at most as many as there are.

    Returns:
      One-hot [heads, slots]; of tied slots, the first come first.

    Examples:
      >>> least_used(jnp.array([0.9, 0.1, 0.4]), 2).tolist()
      [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    _, slots = jax.lax.top_k(-jax.lax.stop_gradient(usage), heads)
    return jax.nn.one_hot(slots, usage.shape[0], dtype=usage.dtype)


def write_weights(gate: jax.Array, read_weights: jax.Array, least: jax.Array) -> jax.Array:
    """w^w_t = s w^r_{t-1} + (1 - s) w^lu_{t-1}, s = sigmoid(alpha) (eq. 7).

    Args:
      gate: s in (0, 1) [heads]: 1 writes to where the head read last, 0 to its least used slot.
      read_weights: w^r_{t-1} [heads, slots].
      least: w^lu_{t-1} [heads, slots].

    Returns:
      [heads, slots], each head's summing to 1.
    """
    return gate[:, None] * read_weights + (1 - gate[:, None]) * least


def write_memory(
    rows: jax.Array, weights: jax.Array, keys: jax.Array, least: jax.Array
) -> jax.Array:
    """Erases each head's least used row, then M_t(i) = M_{t-1}(i) + sum_heads w^w_t(i) k_t (eq. 8).

    Args:
      rows: M_{t-1} [slots, width].
      weights: w^w_t [heads, slots].
      keys: k_t [heads, width].
      least: w^lu_{t-1} [heads, slots], one-hot.

    Returns:
      M_t [slots, width].
    """
    return rows * (1 - least.sum(0))[:, None] + weights.T @ keys


def read_memory(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """r = sum_i w^r(i) M(i) (eq. 4): rows [slots, width], weights [heads, slots]."""
    return weights @ rows


def decay_usage(
    usage: jax.Array, read_weights: jax.Array, written: jax.Array, decay: float
) -> jax.Array:
    """w^u_t = gamma w^u_{t-1} + sum_heads (w^r_t + w^w_t) (eq. 5); no gradient passes.

    Args:
      usage: w^u_{t-1} [slots].
      read_weights: w^r_t [heads, slots].
      written: w^w_t [heads, slots].
      decay: gamma in [0, 1).

    Returns:
      w^u_t [slots]; its sum tends to 2 heads / (1 - gamma).
    """
    return decay * usage + jax.lax.stop_gradient(read_weights + written).sum(0)


def access_memory(
    memory: Memory,
    keys: jax.Array,
    gate: jax.Array,
    *,
    decay: float,
    strength: float = 1.0,
    values: jax.Array | None = None,
) -> tuple[Memory, jax.Array]:
    """One step: write, then read what is there now.

    Args:
      memory: M_{t-1}, w^r_{t-1} and w^u_{t-1}.
      keys: k_t [heads, width], written and looked up.
      gate: sigmoid(alpha) [heads]; see `write_weights`.
      decay: gamma; see `decay_usage`.
      strength: of the keys; see `content_address`.
      values: what is written instead of the keys [heads, width]. A key that has just been written
        is its own best match; public implementations therefore write values of their own.

    Returns:
      The memory M_t, w^r_t, w^u_t and what was read, r_t [heads, width].

    Examples:
      >>> memory = empty_memory(slots=3, width=2, heads=1)
      >>> key, gate = jnp.array([[3.0, 4.0]]), jnp.array([0.0])
      >>> memory, what = access_memory(memory, key, gate, decay=0.95)
      >>> memory.rows.tolist()
      [[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]]
    """
    least = least_used(memory.usage, keys.shape[0])
    weights = write_weights(gate, memory.read_weights, least)
    rows = write_memory(memory.rows, weights, keys if values is None else values, least)
    read_weights = content_address(keys, rows, strength=strength)
    usage = decay_usage(memory.usage, read_weights, weights, decay)
    return Memory(rows, read_weights, usage), read_memory(rows, read_weights)
