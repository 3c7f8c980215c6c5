"""Images some at a time, so that what is made of them stays in a core's cache."""

import math

import jax.numpy as jnp

from meta_jax.core import Array


def is_known(count: int) -> bool:
    """Whether a number of images is known; under `jax.export` it may be a symbol."""
    return isinstance(count, int)


def chunks_within(images: int, image_bytes: int, budget: int) -> int:
    """In how many chunks images must go through to stay within a budget of bytes.

    A symbolic number of images goes through whole.

    Examples:
      >>> chunks_within(7, 100, 300)
      3
    """
    if not is_known(images):
        return 1
    return math.ceil(images / max(1, budget // image_bytes))


def in_chunks(x: Array, chunks: int) -> Array:
    """Images [n, ...] -> [chunks, ceil(n / chunks), ...], the last ones of zeros."""
    size = math.ceil(x.shape[0] / chunks)
    x = jnp.pad(x, ((0, chunks * size - x.shape[0]), *[(0, 0)] * (x.ndim - 1)))
    return x.reshape(chunks, size, *x.shape[1:])
