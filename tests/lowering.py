"""Quick lowering for tests, which compile thousands of small programs."""

import functools

from jax._src.interpreters import mlir


def share_the_context() -> None:
    """All programs of this process are lowered in one context.

    JAX registers every operation anew in a context for each program, which takes as long as all
    else in lowering a small one. The function is private; a JAX without it does as it does.
    """
    if hasattr(mlir, "make_ir_context"):
        mlir.make_ir_context = functools.cache(mlir.make_ir_context)
