"""Several processes of one run: they share the tasks, one of them writes, and all hear of it.

All processes call the same functions in the same order. With one process, which is the usual case,
everything here is the plain call.
"""

import functools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from meta_jax.core import PyTree

T = TypeVar("T")


class _Sent(NamedTuple):
    """An array on its way to other processes."""

    data: np.ndarray
    key_impl: str | None  # None where it holds no random keys


def is_writer() -> bool:
    """Whether this process writes files and talks to the user: the first one does."""
    return jax.process_index() == 0


def from_writer(function: Callable[[], T]) -> T:
    """Calls a function in the writing process alone; its result or its error is that of all.

    So a workdir need not be on a file system that all processes see.

    Args:
      function: Function that reads or writes files. It gives a pytree of arrays and of what
        `pickle` takes.

    Returns:
      What the function gave, with arrays on the default device of each process.

    Examples:
      >>> from_writer(lambda: {"steps": 3})
      {'steps': 3}
    """
    if jax.process_count() == 1:
        return function()
    outcome, error = None, None
    if is_writer():
        try:
            outcome = function()
        except Exception as raised:
            error = raised
    outcome, raised = unpack(_broadcast(pack((outcome, sendable(error)))))
    if raised is not None:
        raise raised if error is None else error
    return outcome


def sendable(error: Exception | None) -> Exception | None:
    """An error as other processes can read it: not every exception survives `pickle`."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def pack(tree: PyTree) -> bytes:
    """A pytree of arrays, random keys and of what `pickle` takes, as a message."""
    return pickle.dumps(jax.tree.map(_to_send, tree))


def unpack(message: bytes) -> PyTree:
    """What `pack` packed, with arrays on the default device."""
    sent = pickle.loads(message)
    return jax.tree.map(_received, sent, is_leaf=lambda leaf: isinstance(leaf, _Sent))


def _broadcast(message: bytes) -> bytes:
    """The writer's message, in all processes."""
    from jax.experimental import multihost_utils

    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(message))))
    # Rounded up, so that few programs are compiled.
    padded = np.zeros(1 << max(length - 1, 1).bit_length(), np.uint8)
    if is_writer():
        padded[:length] = np.frombuffer(message, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded))[:length].tobytes()


def _to_send(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return _Sent(np.asarray(jax.random.key_data(leaf)), str(jax.random.key_impl(leaf)))
    return _Sent(np.asarray(leaf), None)


def _received(leaf: Any) -> Any:
    if not isinstance(leaf, _Sent):
        return leaf
    array = jnp.asarray(leaf.data)
    if leaf.key_impl is None:
        return array
    return jax.random.wrap_key_data(array, impl=leaf.key_impl)


def largest(*values: float) -> tuple[float, ...]:
    """The largest of each value over all processes.

    Examples:
      >>> largest(2.5, True)
      (2.5, 1.0)
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        gathered = multihost_utils.process_allgather(np.asarray(values, np.float32))
        values = tuple(np.max(gathered, axis=0))
    return tuple(map(float, values))


# ---- Arrays on the devices of several processes.


def put(tree: PyTree, sharding: Sharding, *, may_alias: bool | None = None) -> PyTree:
    """Puts arrays, which all processes have, onto devices of one process or of all.

    Args:
      tree: Arrays; those on devices of several processes are gathered.
      sharding: Where they go.
      may_alias: Whether the result may share memory with them; None where it does not matter.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(local(tree), sharding, may_alias=may_alias)
    return jax.tree.map(functools.partial(_put_leaf, sharding=sharding), tree)


def _put_leaf(leaf: Any, sharding: Sharding) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put_leaf(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = gathered(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def local(tree: PyTree) -> PyTree:
    """This process's own copy of arrays that all processes share; other leaves stay as they are.

    Args:
      tree: Arrays that are replicated wherever they are on devices of several processes.
    """
    return jax.tree.map(_local_leaf, tree)


def _local_leaf(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _local_leaf(jax.random.key_data(leaf))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return leaf.addressable_data(0)


def gathered(array: Any) -> np.ndarray:
    """The whole of an array on the host, whichever processes hold its parts.

    All processes must call it.
    """
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        from jax.experimental import multihost_utils

        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
