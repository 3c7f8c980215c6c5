"""How a computation is written down and run: in the form for a device, compiled when called.

A CPU has forms of its own, which `use_backend` chooses among.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import jax

F = TypeVar("F", bound=Callable[..., Any])

_BACKEND: ContextVar[str | None] = ContextVar("backend", default=None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Writes computations down in the form meant for a backend, on whatever device there is.

    It counts while a function is traced; a compiled function keeps the form that it was traced in.

    Args:
      name: 'cpu', or the name of an accelerator.

    Examples:
      >>> with use_backend("gpu"):
      ...     on_cpu()
      False
    """
    token = _BACKEND.set(name)
    try:
        yield
    finally:
        _BACKEND.reset(token)


def on_cpu() -> bool:
    """Whether computations take the form meant for a CPU: JAX's own backend, if none was chosen."""
    return (_BACKEND.get() or jax.default_backend()) == "cpu"


def compiled_when_called(
    function: F,
    *,
    static: tuple[str, ...] = (),
    check: Callable[..., None] | None = None,
) -> F:
    """Makes a pure function compile itself where it is called on arrays, outside of any trace.

    Operation by operation a method takes seconds at every call, since its loops are compiled anew.
    Within `jit`, `vmap` or `grad` the function itself is traced, as if it had not been wrapped.

    Args:
      function: The function; its arguments are pytrees of arrays.
      static: Names of keyword arguments that are no arrays, such as 'train'.
      check: Function of the same arguments that refuses some, which sees their numbers wherever
        they are not traced.

    Examples:
      >>> import jax.numpy as jnp
      >>> def double(x):
      ...     return x + x if isinstance(x, jax.core.Tracer) else None
      >>> float(compiled_when_called(double)(jnp.ones(())))
      2.0
    """

    @functools.partial(jax.jit, static_argnames=("form", *static))
    def compiled(*arguments: Any, form: str | None, **settings: Any) -> Any:
        del form  # what was compiled for one kind of device is not taken for another
        return function(*arguments, **settings)

    @functools.wraps(function)
    def call(*arguments: Any, **settings: Any) -> Any:
        if check is not None:
            check(*arguments, **settings)
        leaves = jax.tree.leaves((arguments, settings))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return function(*arguments, **settings)
        return compiled(*arguments, form=_BACKEND.get(), **settings)

    return call  # pyrefly: ignore[bad-return]
