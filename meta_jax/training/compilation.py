"""How whole programs are compiled: what the compiler is asked for on each backend."""

from collections.abc import Callable
from typing import Any

import jax

# Measured on training steps (python -m experiments.benchmark), a fifth faster together on a CPU:
# - vectors as wide as the CPU has them, where the compiler would stop at half of 512 bits;
# - instructions in the order that needs least memory: the other one is for running several at a
#   time, but our devices are kept busy by tasks, and what one instruction leaves in the cache the
#   next one needs.
_CPU_OPTIONS = {
    "xla_cpu_prefer_vector_width": 512,
    "xla_cpu_enable_concurrency_optimized_scheduler": False,
}


def compiled(function: Callable, **settings: Any) -> Callable:
    """`jax.jit` of a whole program, not to be called inside another one.

    Args:
      function: a pure function of arrays.
      settings: others of `jax.jit`.
    """
    options = _CPU_OPTIONS if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options, **settings)
