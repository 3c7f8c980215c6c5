"""An external memory: content addressing and least-recently-used-access writes.

The primitives of Santoro et al. (2016, arXiv:1605.06065), section 3, for one task and one step.
Their order is made explicit in `access_memory`: the least used rows are found and erased, the keys
are written, the memory WITH what was just written is read, the usage is brought up to date.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import Array
from meta_jax.networks.layers import check_at_least_one

_EPSILON = 1e-8  # keeps the cosine of an empty row, and its gradient, finite


def _check(**arrays: tuple[Array, tuple[str, ...]]) -> None:
    """Refuses arrays whose axes are not those that are named, or differ where names agree."""
    sizes: dict[str, int] = {}
    for name, (array, axes) in arrays.items():
        shape = jnp.shape(array)
        if len(shape) != len(axes):
            raise ValueError(f"{name} must be [{', '.join(axes)}], not {list(shape)}")
        for axis, size in zip(axes, shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(
                    f"{name} {list(shape)} must be [{', '.join(axes)}] with {axis} {sizes[axis]}, "
                    "as the arguments before it have"
                )


class Memory(NamedTuple):
    """A memory between two steps.

    Attributes:
      rows: What is remembered, [slots, slot_size].
      read_weights: Where each head read last, [heads, slots]; rows sum to 1.
      usage: Decayed sum of all read and write weights, [slots].
    """

    rows: Array
    read_weights: Array
    usage: Array


def empty_memory(
    num_slots: int, slot_size: int, num_heads: int, dtype: jnp.dtype | None = None
) -> Memory:
    """A memory of zeros, never used; its read weights are those of reading it, uniform.

    Raises:
      UsageError: a size is below one.
    """
    check_at_least_one("a memory", num_slots=num_slots, slot_size=slot_size, num_heads=num_heads)
    return Memory(
        jnp.zeros((num_slots, slot_size), dtype),
        jnp.full((num_heads, num_slots), 1 / num_slots, dtype),
        jnp.zeros(num_slots, dtype),
    )


def content_address(
    keys: Array, rows: Array, *, key_strength: float = 1.0, mask: Array | None = None
) -> Array:
    """Weights of reading by likeness to a key (eqs. 2 and 3).

    w(i) = softmax_i(key_strength cos(k, M(i))).

    Args:
      keys: Keys to look up [heads, slot_size].
      rows: Rows of the memory [slots, slot_size].
      key_strength: Factor of the cosines; 1 in the paper, so that no slot of many can
        stand out by more than e^2: reads are blurred. Larger ones are sharper.
      mask: bool [slots], False for rows that are padding.

    Returns:
      Weights [heads, slots], each head's summing to 1; uniform on an empty memory.

    Raises:
      ValueError: the shapes do not fit.

    Examples:
      >>> weights = content_address(jnp.array([[1.0, 0.0]]), jnp.array([[2.0, 0.0], [0.0, 0.0]]))
      >>> [round(float(w), 4) for w in weights[0]]  # softmax(1, 0)
      [0.7311, 0.2689]
    """
    _check(keys=(keys, ("heads", "slot_size")), rows=(rows, ("slots", "slot_size")))
    if mask is not None:
        _check(rows=(rows, ("slots", "slot_size")), mask=(mask, ("slots",)))
    cosines = (keys * _inverse_norm(keys)[:, None]) @ rows.T * _inverse_norm(rows)[None]
    if mask is not None:
        cosines = jnp.where(mask[None], cosines, jnp.finfo(cosines.dtype).min / (2 * key_strength))
    return jax.nn.softmax(key_strength * cosines)


def _inverse_norm(x: Array) -> Array:
    epsilon = max(_EPSILON, float(jnp.finfo(x.dtype).tiny))
    return jax.lax.rsqrt((x * x).sum(-1) + epsilon)


def least_used(usage: Array, num_heads: int) -> Array:
    """Where each head may write: head n gets the n-th least used slot, one-hot (eq. 6).

    The paper's 1[w^u(i) <= m(w^u, n)] marks n slots at once, and more where usages tie; one slot
    for each head keeps the write weights' sum at 1. No gradient passes.

    Args:
      usage: [slots].
      num_heads: Number of slots to choose, at most as many as there are.

    Returns:
      One-hot [num_heads, slots]; of tied slots, the first come first.

    Raises:
      ValueError: usage is not of rank 1.

    Examples:
      >>> least_used(jnp.array([0.9, 0.1, 0.4]), 2).tolist()
      [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    _check(usage=(usage, ("slots",)))
    _, slots = jax.lax.top_k(-jax.lax.stop_gradient(usage), num_heads)
    return jax.nn.one_hot(slots, usage.shape[0], dtype=usage.dtype)


def write_weights(gate: Array, read_weights: Array, least: Array) -> Array:
    """Where each head writes: between where it read last and its least used slot (eq. 7).

    w^w_t = s w^r_{t-1} + (1 - s) w^lu_{t-1}, s = sigmoid(alpha).

    Args:
      gate: S in (0, 1) [heads]: 1 writes to where the head read last, 0 to its least used slot.
      read_weights: W^r_{t-1} [heads, slots].
      least: W^lu_{t-1} [heads, slots].

    Returns:
      [heads, slots], each head's summing to 1.

    Raises:
      ValueError: the shapes do not fit.
    """
    of_heads = ("heads", "slots")
    _check(gate=(gate, ("heads",)), read_weights=(read_weights, of_heads), least=(least, of_heads))
    return gate[:, None] * read_weights + (1 - gate[:, None]) * least


def write_memory(rows: Array, weights: Array, keys: Array, least: Array) -> Array:
    """Erases each head's least used row, then adds what the heads write (eq. 8).

    M_t(i) = M_{t-1}(i) + sum_heads w^w_t(i) k_t.

    Args:
      rows: M_{t-1} [slots, slot_size].
      weights: W^w_t [heads, slots].
      keys: K_t [heads, slot_size].
      least: W^lu_{t-1} [heads, slots], one-hot.

    Returns:
      M_t [slots, slot_size].

    Raises:
      ValueError: the shapes do not fit.
    """
    of_heads = ("heads", "slots")
    _check(
        rows=(rows, ("slots", "slot_size")),
        weights=(weights, of_heads),
        keys=(keys, ("heads", "slot_size")),
        least=(least, of_heads),
    )
    return rows * (1 - least.sum(0))[:, None] + weights.T @ keys


def read_memory(rows: Array, weights: Array) -> Array:
    """Reads r = sum_i w^r(i) M(i) (eq. 4).

    Args:
      rows: M [slots, slot_size].
      weights: W^r [heads, slots].

    Returns:
      [heads, slot_size].

    Raises:
      ValueError: the shapes do not fit.
    """
    _check(rows=(rows, ("slots", "slot_size")), weights=(weights, ("heads", "slots")))
    return weights @ rows


def decay_usage(
    usage: Array, read_weights: Array, write_weights: Array, usage_decay: float
) -> Array:
    """Brings the usage of the slots up to date (eq. 5); no gradient passes.

    w^u_t = gamma w^u_{t-1} + sum_heads (w^r_t + w^w_t).

    Args:
      usage: W^u_{t-1} [slots].
      read_weights: W^r_t [heads, slots].
      write_weights: W^w_t [heads, slots].
      usage_decay: Gamma in [0, 1).

    Returns:
      w^u_t [slots]; its sum tends to 2 heads / (1 - gamma).

    Raises:
      ValueError: the shapes do not fit.
    """
    of_heads = ("heads", "slots")
    _check(
        usage=(usage, ("slots",)),
        read_weights=(read_weights, of_heads),
        write_weights=(write_weights, of_heads),
    )
    return usage_decay * usage + jax.lax.stop_gradient(read_weights + write_weights).sum(0)


def access_memory(
    memory: Memory,
    keys: Array,
    gate: Array,
    *,
    usage_decay: float,
    key_strength: float = 1.0,
    values: Array | None = None,
) -> tuple[Memory, Array]:
    """One step: write, then read what is there now.

    Args:
      memory: M_{t-1}, w^r_{t-1} and w^u_{t-1}.
      keys: K_t [heads, slot_size], written and looked up.
      gate: Sigmoid(alpha) [heads]; see `write_weights`.
      usage_decay: Gamma; see `decay_usage`.
      key_strength: Factor of the cosines; see `content_address`.
      values: Vectors to write in place of the keys, [heads, slot_size]. A key that has just been
        written is its own best match; public implementations therefore write values of their own.

    Returns:
      The memory M_t, w^r_t, w^u_t and what was read, r_t [heads, slot_size].

    Examples:
      >>> memory = empty_memory(num_slots=3, slot_size=2, num_heads=1)
      >>> key, gate = jnp.array([[3.0, 4.0]]), jnp.array([0.0])
      >>> memory, read_vectors = access_memory(memory, key, gate, usage_decay=0.95)
      >>> memory.rows.tolist()
      [[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]]
    """
    least = least_used(memory.usage, keys.shape[0])
    weights = write_weights(gate, memory.read_weights, least)
    rows = write_memory(memory.rows, weights, keys if values is None else values, least)
    read_weights = content_address(keys, rows, key_strength=key_strength)
    usage = decay_usage(memory.usage, read_weights, weights, usage_decay)
    return Memory(rows, read_weights, usage), read_memory(rows, read_weights)
