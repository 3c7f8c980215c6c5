"""Convolutions that stay fast when every task has its own kernel.

Nothing else in the library knows how a convolution is computed. Three facts shape this file:

- Under `vmap` over tasks with per-task kernels, `lax.conv` becomes a grouped convolution, an order
  of magnitude slower on a CPU. Patches and one matrix product batch cleanly, to every order of
  differentiation.
- All patches of a large batch do not fit the cache (nine times the activations), so on a CPU the
  images go through in chunks, and the backward pass rebuilds a chunk's patches instead of keeping
  them: only the convolution's output is saved.
- Max-pooling commutes with batch norm and ReLU up to the sign of the scale, so a chunk leaves the
  cache already pooled, a quarter of the data, with the moments that batch norm needs.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

_CHUNK_BYTES = 4 << 20  # patches of one chunk; about the share of the last-level cache of a core


class Moments(NamedTuple):
    """Mean and biased variance of a convolution's output over images and places."""

    mean: jax.Array  # [channels]
    var: jax.Array  # [channels]


def patches(x: jax.Array, window: int, stride: int, padding: str) -> jax.Array:
    """Unfolds images into the patches that a convolution sees.

    Args:
      x: images [n, height, width, channels].
      window: side of the square window, in pixels.
      stride: step between windows, in pixels.
      padding: 'SAME' or 'VALID', as in `jax.lax`.

    Returns:
      Patches [n, out_height, out_width, window * window * channels], row by row in the order of a
      kernel [window, window, channels, features] reshaped to [-1, features].
    """
    size = x.shape[1:3]
    pads = lax.padtype_to_pads(size, (window, window), (stride, stride), padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, cols = ((s - window) // stride + 1 for s in x.shape[1:3])
    return jnp.concatenate(
        [
            x[:, i : i + stride * (rows - 1) + 1 : stride, j : j + stride * (cols - 1) + 1 : stride]
            for i in range(window)
            for j in range(window)
        ],
        axis=-1,
    )


def convolve(x: jax.Array, kernel: jax.Array, *, stride: int = 1) -> jax.Array:
    """Two-dimensional SAME convolution (cross-correlation) as patches times a matrix.

    Args:
      x: images [n, height, width, channels].
      kernel: [window, window, channels, features], window odd.
      stride: step between windows, in pixels.

    Returns:
      [n, ceil(height / stride), ceil(width / stride), features]. Reverse-mode differentiable to
      any order.
    """
    return _convolve_unit_stride(x, kernel) if stride == 1 else _unfold_multiply(x, kernel, stride)


def _unfold_multiply(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return patches(x, kernel.shape[0], stride, "SAME") @ kernel.reshape(-1, kernel.shape[-1])


@jax.custom_vjp
def _convolve_unit_stride(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _unfold_multiply(x, kernel, 1)


def _convolve_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple]:
    return _unfold_multiply(x, kernel, 1), (x, kernel)


def _convolve_backward(residuals: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The input's gradient as a convolution (not nine shifted sums), the kernel's narrow first."""
    x, kernel = residuals
    dx = _convolve_unit_stride(dy, kernel[::-1, ::-1].swapaxes(2, 3))
    unfolded = patches(x, kernel.shape[0], 1, "SAME")
    dk = dy.reshape(-1, dy.shape[-1]).T @ unfolded.reshape(-1, unfolded.shape[-1])
    return dx, dk.T.reshape(kernel.shape)


_convolve_unit_stride.defvjp(_convolve_forward, _convolve_backward)


def max_pool(x: jax.Array) -> jax.Array:
    """2x2 max-pooling with stride 2, odd borders dropped; tied maxima share their gradient.

    Args:
      x: [n, height, width, channels].

    Returns:
      [n, height // 2, width // 2, channels].
    """
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))


def convolve_pool_moments(
    x: jax.Array,
    kernel: jax.Array,
    sign: jax.Array,
    *,
    stride: int,
    pool: bool,
) -> tuple[jax.Array, Moments]:
    """SAME convolution, then 2x2 max-pooling where `sign` > 0 and min-pooling where it is < 0.

    Args:
      x: images [n, height, width, channels].
      kernel: [window, window, channels, features].
      sign: +1 or -1 for each feature, [features]; the sign of the batch-norm scale that follows.
      stride: step between windows, in pixels.
      pool: whether to pool at all.

    Returns:
      The pooled output [n, out_height, out_width, features] and the moments of the unpooled one.
    """

    def chunk(x: jax.Array, weight: jax.Array | None) -> tuple[jax.Array, Moments]:
        y = checkpoint_name(convolve(x, kernel, stride=stride), "convolution")
        moments = _moments(y, weight)
        return (sign * max_pool(sign * y) if pool else y), moments

    chunks = _chunks(x, kernel, stride)
    if chunks == 1:
        return chunk(x, None)
    n = x.shape[0]
    size = math.ceil(n / chunks)
    chunks = math.ceil(n / size)  # no chunk is all filling
    fill = chunks * size - n
    xs = jnp.pad(x, ((0, fill), *[(0, 0)] * 3)).reshape(chunks, size, *x.shape[1:])
    weight = (jnp.arange(chunks * size) < n).astype(x.dtype).reshape(chunks, size, 1, 1, 1)
    body = jax.checkpoint(
        lambda c: chunk(c[0], c[1] if fill else None),
        policy=jax.checkpoint_policies.save_only_these_names("convolution"),
        prevent_cse=False,
    )
    y, parts = lax.map(body, (xs, weight))
    share = weight.mean((1, 2, 3, 4))[:, None] * (chunks * size / n) / chunks
    # Chan's formula: E[y^2] - mean^2 would cancel in float32.
    mean = (share * parts.mean).sum(0)
    var = (share * (parts.var + (parts.mean - mean) ** 2)).sum(0)
    return y.reshape(chunks * size, *y.shape[2:])[:n], Moments(mean, var)


def _moments(y: jax.Array, weight: jax.Array | None) -> Moments:
    """Mean and biased variance over all axes but the last; images weighted by [n, 1, 1, 1]."""
    # One pass over y, forwards and backwards, around a rough mean: E[y^2] - E[y]^2 alone would
    # cancel in float32. The result does not depend on the centre, so its gradient is exactly zero.
    centre = jax.lax.stop_gradient(y[0].mean((0, 1)))
    y = y - centre
    if weight is None:
        first, second = y.mean((0, 1, 2)), (y * y).mean((0, 1, 2))
    else:
        count = weight.sum() * y.shape[1] * y.shape[2]
        first = (weight * y).sum((0, 1, 2)) / count
        second = (weight * y * y).sum((0, 1, 2)) / count
    return Moments(centre + first, second - first**2)


def _chunks(x: jax.Array, kernel: jax.Array, stride: int) -> int:
    """How many chunks of images keep a chunk's patches in the cache; 1 on an accelerator."""
    if jax.default_backend() != "cpu":
        return 1
    places = math.ceil(x.shape[1] / stride) * math.ceil(x.shape[2] / stride)
    width = max(math.prod(kernel.shape[:3]), kernel.shape[3])
    return math.ceil(x.shape[0] * places * width * x.dtype.itemsize / _CHUNK_BYTES)
