"""The checkers of JAX that tests turn on."""

import contextlib
import gc
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def key_and_leak_checks() -> Iterator[None]:
    """Fails where a random key is used twice, a tracer outlives its trace, or ranks are promoted.

    For every trace that is over, the checker of leaks looks through all objects of the process:
    those that were there before, seconds' worth each time, are put aside, garbage among them: to
    collect it first would look through all of them once more.
    """
    gc.freeze()
    try:
        with (
            jax.debug_key_reuse(True),
            jax.checking_leaks(),
            jax.numpy_rank_promotion("raise"),
        ):
            yield
    finally:
        gc.unfreeze()
