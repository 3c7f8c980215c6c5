"""The kind of device that a computation is written down for, where a CPU has a form of its own."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

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
