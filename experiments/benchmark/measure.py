"""Clocks and counts: alternating timings, compile time, peak memory, the matrix-product ceiling."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache

_MIB = 2**20


class Compiled(NamedTuple):
    """A program ready to run, and what it cost to get there."""

    call: Any  # the compiled function
    seconds: float  # tracing, lowering and compiling
    peak_mib: float  # arguments, results and temporaries; what is donated counts once


@contextlib.contextmanager
def compilation_cache(folder: str | None) -> Iterator[None]:
    """Compiles with the persistent cache in a folder; with none where it is None."""
    before = jax.config.values["jax_compilation_cache_dir"]
    smallest = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    _use_cache(folder, 0)
    try:
        yield
    finally:
        _use_cache(before, smallest)


def _use_cache(folder: str | None, smallest: float) -> None:
    reset_cache()
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", smallest)


def compile_timed(function: Any, *arguments: Any) -> Compiled:
    """Compiles a jitted function for its arguments."""
    start = time.perf_counter()
    call = function.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = call.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    return Compiled(call, seconds, peak / _MIB)


def alternate(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every contender in every round, one after the other within a round.

    Each runs once beforehand, unmeasured. A shared machine that slows down slows all of them, so
    ratios within one call mean more than absolute times.
    """
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    return times


def spread(values: list[float]) -> dict[str, float]:
    """Minimum, median and maximum, to four significant digits."""
    named = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in named.items()}


class Ceiling(NamedTuple):
    """A matrix product as large as is fastest, to run in alternation with what it limits."""

    run: Callable[[], None]
    flop: float


def matmul_ceiling(side: int = 2048) -> Ceiling:
    """A float32 product of matrices [side, side].

    On accelerators it is asked for the same precision that the library's networks use.
    """
    x = jnp.asarray(np.random.default_rng(0).normal(size=(side, side)), jnp.float32)
    product = jax.jit(jnp.matmul)
    return Ceiling(lambda: product(x, x).block_until_ready(), 2.0 * side**3)
