"""The interface of a network that reads a sequence."""

import functools
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree


class InitSequence(Protocol):
    """(key, inputs, steps) -> params."""

    def __call__(self, key: Array, inputs: int, steps: int, /) -> PyTree:
        """Initial parameters for sequences of up to `steps` inputs [inputs]."""
        ...


class StartSequence(Protocol):
    """(params, steps) -> memory."""

    def __call__(self, params: PyTree, steps: int, /) -> PyTree:
        """The memory before the first of at most `steps` steps."""
        ...


class ReadStep(Protocol):
    """(params, memory, x) -> (memory, features)."""

    def __call__(self, params: PyTree, memory: PyTree, x: Array, /) -> tuple[PyTree, Array]:
        """Reads one step, x [inputs]; gives features [features]."""
        ...


class ReadSequence(Protocol):
    """(params, xs, mask) -> features."""

    def __call__(self, params: PyTree, xs: Array, mask: Array, /) -> Array:
        """Reads a whole sequence, xs [steps, inputs]: features [steps, features].

        The features of a step are those that `step` gives after the steps before it; steps of
        padding (mask False) are passed over, and theirs mean nothing.
        """
        ...


class AbsorbSequence(Protocol):
    """(params, xs, mask, steps) -> memory."""

    def __call__(self, params: PyTree, xs: Array, mask: Array, steps: int, /) -> PyTree:
        """The memory after a whole sequence, xs [n, inputs], with room for `steps` steps in all.

        It is what `step` leaves after the steps that are not padding, read at once.
        """
        ...


class KeepMemory(Protocol):
    """(reads, after, before) -> memory."""

    def __call__(self, reads: Array, after: PyTree, before: PyTree, /) -> PyTree:
        """The memory `after` a step that is read, or `before` one of padding (reads False)."""
        ...


def keep_leaves(reads: Array, after: PyTree, before: PyTree) -> PyTree:
    """Chooses each leaf of one memory or the other."""
    return jax.tree.map(functools.partial(jnp.where, reads), after, before)


class Counted(Protocol):
    """A memory of rows and the number of steps read, which are the rows that mean something."""

    count: Array

    def _replace(self, **kwargs: Any) -> Self: ...


def keep_count(reads: Array, after: Counted, before: Counted) -> Counted:
    """As `keep_leaves` for a memory of rows, of which a step of padding leaves one too many.

    Only the count is chosen, so that no row is copied: the next step writes over the row.
    """
    return after._replace(count=jnp.where(reads, after.count, before.count))


class SequenceNetwork(NamedTuple):
    """A causal network that reads a sequence.

    Attributes:
      init: Function (key, inputs, steps) -> params, for sequences of up to `steps` inputs [inputs].
      start: Function (params, steps) -> the memory before the first of at most `steps` steps.
      step: Function (params, memory, x) -> (memory, features), x [inputs].
      read: Function (params, xs, mask) -> features [steps, features] of a whole sequence.
      absorb: Function (params, xs, mask, steps) -> the memory after a whole sequence, with room for
        `steps` steps in all.
      keep: Function (reads, after, before) -> the memory after a step, or before one of padding.
    """

    init: InitSequence
    start: StartSequence
    step: ReadStep
    read: ReadSequence
    absorb: AbsorbSequence
    keep: KeepMemory = keep_leaves


def padding_behind(xs: Array, mask: Array) -> tuple[Array, Array]:
    """Moves steps of padding behind the others, where a causal network does not see them.

    Args:
      xs: Inputs [steps, inputs].
      mask: bool [steps], False for padding.

    Returns:
      The inputs in the new order, and the place of each step in it, [steps].

    Examples:
      >>> xs, place = padding_behind(jnp.array([[1.0], [9.0], [2.0]]), jnp.array([1, 0, 1], bool))
      >>> xs[:, 0].tolist(), place.tolist()
      ([1.0, 2.0, 9.0], [0, 2, 1])
    """
    order = jnp.argsort(~mask, stable=True)
    return xs[order], jnp.argsort(order)


def with_room(rows: Array, steps: int) -> Array:
    """Rows [n, ...] with zeros behind them, [steps, ...]."""
    return jnp.pad(rows, [(0, steps - len(rows)), *[(0, 0)] * (rows.ndim - 1)])


def write_row(rows: Array, row: Array, at: Array) -> Array:
    """Rows [steps, ...] with one of them replaced."""
    return jax.lax.dynamic_update_index_in_dim(rows, row, at, 0)
