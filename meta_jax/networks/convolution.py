"""Convolutions that stay fast when every task has its own kernel.

Nothing else in the library knows how a convolution is computed. Five facts shape this file:

- A convolution, its input's gradient and its kernel's gradient are three bilinear maps, and each
  one's derivatives are the other two. Written so, every order of reverse differentiation runs
  through the three forms that libraries have fast code for; JAX's own second derivatives are
  convolutions of a kind that a CPU walks through one number at a time.
- Under `vmap` over tasks with per-task kernels, a convolution becomes a grouped one, an order of
  magnitude slower on a CPU. There, tasks go through one by one; elsewhere as patches and one
  batched matrix product.
- With one to four input channels, patches are small, and patches times a matrix are faster.
  Batch-norm moments then follow from the mean and covariance of the patches, nine numbers wide,
  without a look at the output.
- Those moments are known before the output is. A first block can thus be worked out, normalised,
  for a few images at a time, just before the second convolution needs them, and again in the
  backward pass: its large, cheap output never leaves a core's cache.
- Max-pooling commutes with batch norm and ReLU up to the sign of the scale, so a chunk of images
  leaves the cache already pooled, a quarter of the data, with the moments that batch norm needs.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
_SMALL_PATCH = 36  # numbers; 3x3 windows of up to four channels
_PATCHES_BYTES = 2 << 20  # patches of one chunk of images, where a kernel's gradient needs them
_PREPARED_BYTES = 1 << 18  # inputs of one chunk; they stay in a core's own cache
_CHUNK_BYTES = 4 << 20  # convolution output of one chunk; about a core's share of the cache


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


def convolve(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: str = "SAME"
) -> jax.Array:
    """Two-dimensional convolution (cross-correlation).

    Args:
      x: images [n, height, width, channels].
      kernel: [window, window, channels, features].
      stride: step between windows, in pixels.
      padding: 'SAME', or 'VALID' for none.

    Returns:
      [n, ceil(height / stride), ceil(width / stride), features] with 'SAME'; with 'VALID' the
      height and width are first less by window - 1. Reverse-mode differentiable to any order.
    """
    if _small_patches(kernel):
        return _patches_times(patches(x, kernel.shape[0], stride, padding), kernel)
    return _bilinear_maps(stride, padding, x.shape[1:3], kernel.shape[0])[0](x, kernel)


def _small_patches(kernel: jax.Array) -> bool:
    return math.prod(kernel.shape[:3]) <= _SMALL_PATCH


def _patches_times(unfolded: jax.Array, kernel: jax.Array) -> jax.Array:
    flat = _product(unfolded.reshape(-1, unfolded.shape[-1]), kernel.reshape(-1, kernel.shape[-1]))
    return flat.reshape(*unfolded.shape[:-1], -1)


# ---- Matrix products, differentiated by means of each other.


@jax.custom_vjp
def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b; a is [n, k], b is [k, m]."""
    return a @ b


@jax.custom_vjp
def _gram(a: jax.Array, b: jax.Array) -> jax.Array:
    """a' b; a is [n, k], b is [n, m]."""
    if a.shape[1] <= b.shape[1]:
        return lax.dot_general(a, b, (((0,), (0,)), ((), ())))
    # The narrow operand first is twice as fast on a CPU. Without the barrier, the compiler would
    # merge the transposition into the product and turn the operands round again.
    return lax.optimization_barrier(lax.dot_general(b, a, (((0,), (0,)), ((), ())))).T


_product.defvjp(
    lambda a, b: (_product(a, b), (a, b)), lambda ab, d: (_product(d, ab[1].T), _gram(ab[0], d))
)
_gram.defvjp(
    lambda a, b: (_gram(a, b), (a, b)), lambda ab, d: (_product(ab[1], d.T), _product(ab[0], d))
)


# ---- The three maps: y = f(x, k), dx = t(dy, k), dk = w(x, dy).


def _bilinear_maps(
    stride: int, padding: str, size: tuple[int, int], window: int
) -> tuple[Callable, ...]:
    """f, t and w for images of one size, each differentiated by means of the others."""
    pads = lax.padtype_to_pads(size, (window, window), (stride, stride), padding)

    def native(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), pads, dimension_numbers=_DIMENSIONS
        )

    def unfolding(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return patches(x, window, stride, padding) @ kernel.reshape(-1, kernel.shape[-1])

    def transposed(forward: Callable) -> Callable:
        def apply(dy: jax.Array, kernel: jax.Array) -> jax.Array:
            x = jax.ShapeDtypeStruct((dy.shape[0], *size, kernel.shape[2]), dy.dtype)
            return jax.linear_transpose(lambda x: forward(x, kernel), x)(dy)[0]

        return apply

    def weight(forward: Callable) -> Callable:
        def apply(x: jax.Array, dy: jax.Array) -> jax.Array:
            shape = (window, window, x.shape[-1], dy.shape[-1])
            kernel = jax.ShapeDtypeStruct(shape, x.dtype)
            return jax.linear_transpose(lambda kernel: forward(x, kernel), kernel)(dy)[0]

        return apply

    def chunks_of(x: jax.Array) -> int:
        """How many chunks of images have patches that the cache holds."""
        places = math.prod(
            (s + sum(p) - window) // stride + 1 for s, p in zip(size, pads, strict=True)
        )
        image = places * window**2 * x.shape[-1] * x.dtype.itemsize
        return math.ceil(x.shape[0] / max(1, _PATCHES_BYTES // image))

    def few_unfolding(x: jax.Array, kernel: jax.Array) -> jax.Array:
        # The patches of few images are still at hand when the kernel's gradient needs them.
        return (unfolding if chunks_of(x) == 1 else native)(x, kernel)

    def weight_by_patches(x: jax.Array, dy: jax.Array) -> jax.Array:
        unfolded, features = patches(x, window, stride, padding), dy.shape[-1]
        dk = _gram(unfolded.reshape(-1, unfolded.shape[-1]), dy.reshape(-1, features))
        return dk.reshape(window, window, -1, features)

    def turned(dy: jax.Array, kernel: jax.Array) -> jax.Array:
        """t as a convolution, for stride 1."""
        return lax.conv_general_dilated(
            dy,
            kernel[::-1, ::-1].swapaxes(2, 3),
            (1, 1),
            [(window - 1 - low, window - 1 - high) for low, high in pads],
            dimension_numbers=_DIMENSIONS,
        )

    def weight_by_chunks(x: jax.Array, dy: jax.Array) -> jax.Array:
        """w for some images at a time, whose patches fit the cache."""
        chunks = chunks_of(x)
        if chunks == 1:
            return weight_by_patches(x, dy)
        pairs = _in_chunks(x, chunks), _in_chunks(dy, chunks)

        def body(total: jax.Array, pair: tuple) -> tuple[jax.Array, None]:
            return total + weight_by_patches(*pair), None

        zeros = jnp.zeros((window, window, x.shape[-1], dy.shape[-1]), x.dtype)
        return lax.scan(body, zeros, pairs)[0]

    def differentiable(apply: Callable, gradients: Callable) -> Callable:
        function = jax.custom_vjp(apply)
        function.defvjp(
            lambda a, b: (function(a, b), (a, b)), lambda saved, dy: gradients(*saved, dy)
        )
        return function

    f_apply, t_apply, w_apply = native, transposed(native), weight(native)
    if jax.default_backend() == "cpu":
        border = min(size) < window  # a convolution of nothing but borders is not a fast one
        f_apply = unfolding if border else few_unfolding
        t_apply = turned if stride == 1 and not border else transposed(unfolding)
        w_apply = weight_by_chunks
    f = differentiable(
        _over_tasks(f_apply, unfolding, shared=True), lambda x, k, dy: (t(dy, k), w(x, dy))
    )
    t = differentiable(
        _over_tasks(t_apply, transposed(unfolding), shared=True),
        lambda dy, k, dx: (f(dx, k), w(dx, dy)),
    )
    w = differentiable(
        _over_tasks(w_apply, weight_by_patches, shared=False),
        lambda x, dy, dk: (t(dy, dk), f(x, dk)),
    )
    return f, t, w


def _over_tasks(native: Callable, unfolding: Callable, *, shared: bool) -> Callable:
    """`native` with a rule for `vmap`.

    Args:
      native: (images, kernel or images) -> an array.
      unfolding: the same by patches and a matrix product.
      shared: whether the second argument is a kernel, which tasks may share.
    """
    function = custom_vmap(native)

    @function.def_vmap
    def rule(tasks: int, batched: list, a: jax.Array, b: jax.Array) -> tuple[jax.Array, bool]:
        if shared and not batched[1]:  # more images for the same kernel
            y = function(a.reshape(-1, *a.shape[2:]), b)
            return y.reshape(tasks, -1, *y.shape[1:]), True
        if jax.default_backend() != "cpu":
            return jax.vmap(unfolding, [0 if each else None for each in batched])(a, b), True
        a, b = (
            array if each else jnp.broadcast_to(array, (tasks, *array.shape))
            for array, each in zip((a, b), batched, strict=True)
        )
        return lax.map(lambda pair: function(*pair), (a, b)), True

    return function


# ---- Around a convolution.


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
    padding: str = "SAME",
) -> tuple[jax.Array, Moments]:
    """Convolution, then 2x2 max-pooling where `sign` > 0 and min-pooling where it is < 0.

    Args:
      x: images [n, height, width, channels].
      kernel: [window, window, channels, features].
      sign: +1 or -1 for each feature, [features]; the sign of the batch-norm scale that follows.
      stride: step between windows, in pixels.
      pool: whether to pool at all.
      padding: 'SAME' or 'VALID'.

    Returns:
      The pooled output [n, out_height, out_width, features] and the moments of the unpooled one.
    """
    if not _small_patches(kernel):
        return pool_moments(convolve(x, kernel, stride=stride, padding=padding), sign, pool=pool)

    def chunk(x: jax.Array, weight: jax.Array | None) -> tuple[jax.Array, Moments]:
        unfolded = patches(x, kernel.shape[0], stride, padding)
        y = _patches_times(unfolded, kernel)
        return signed_pool(y, sign, pool), _moments_by_patches(unfolded, kernel, weight)

    chunks = _chunks(x, kernel, stride)
    if chunks == 1:
        return chunk(x, None)
    n = x.shape[0]
    size = math.ceil(n / chunks)
    chunks = math.ceil(n / size)  # no chunk is all filling
    fill = chunks * size - n
    xs = _in_chunks(x, chunks)
    weight = (jnp.arange(chunks * size) < n).astype(x.dtype).reshape(chunks, size, 1, 1, 1)
    # The backward pass computes a chunk's output again, which is cheaper than keeping it.
    body = jax.checkpoint(lambda c: chunk(c[0], c[1] if fill else None), prevent_cse=False)
    y, parts = lax.map(body, (xs, weight))
    share = weight.mean((1, 2, 3, 4))[:, None] * (chunks * size / n) / chunks
    # Chan's formula: E[y^2] - mean^2 would cancel in float32.
    mean = (share * parts.mean).sum(0)
    var = (share * (parts.var + (parts.mean - mean) ** 2)).sum(0)
    return y.reshape(chunks * size, *y.shape[2:])[:n], Moments(mean, var)


def first_moments(
    x: jax.Array, kernel: jax.Array, *, stride: int, padding: str = "SAME"
) -> Moments:
    """The moments of a convolution with few input channels, without its output.

    Args:
      x: images [n, height, width, channels].
      kernel: [window, window, channels, features].
      stride: step between windows, in pixels.
      padding: 'SAME' or 'VALID'.
    """
    return _moments_by_patches(patches(x, kernel.shape[0], stride, padding), kernel, None)


def prepared_chunks(x: jax.Array, kernel: jax.Array, *, stride: int, pool: bool) -> int:
    """In how many chunks of images a first block pays that is worked out twice; 1: it does not.

    Args:
      x: images [n, height, width, channels].
      kernel: of the first convolution, [window, window, channels, features].
      stride: of the first convolution, in pixels.
      pool: whether 2x2 pooling follows.
    """
    if jax.default_backend() != "cpu" or not _small_patches(kernel):
        return 1
    side = stride * (2 if pool else 1)
    places = math.ceil(x.shape[1] / side) * math.ceil(x.shape[2] / side)
    image = places * kernel.shape[3] * x.dtype.itemsize
    return math.ceil(x.shape[0] / max(1, _PREPARED_BYTES // image))


def convolve_prepared(
    prepare: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    kernel: jax.Array,
    *,
    chunks: int,
    stride: int,
    padding: str = "SAME",
) -> jax.Array:
    """`convolve(prepare(x), kernel)` for some images at a time, prepared again for the gradient.

    Args:
      prepare: images [n, ...] -> inputs [n, height, width, channels], each image by itself.
      x: images [n, ...].
      kernel: [window, window, channels, features].
      chunks: how many.
      stride: step between windows, in pixels.
      padding: 'SAME' or 'VALID'.
    """
    body = jax.checkpoint(
        lambda x: convolve(prepare(x), kernel, stride=stride, padding=padding), prevent_cse=False
    )
    y = lax.map(body, _in_chunks(x, chunks))
    return y.reshape(-1, *y.shape[2:])[: x.shape[0]]


def pool_moments(y: jax.Array, sign: jax.Array, *, pool: bool) -> tuple[jax.Array, Moments]:
    """2x2 max-pooling where `sign` > 0, min-pooling where it is < 0, and the moments before it.

    Args:
      y: a convolution's output [n, height, width, features].
      sign: +1 or -1 for each feature, [features].
      pool: whether to pool at all.
    """
    # One pass over y, forwards and backwards, around a rough mean: E[y^2] - E[y]^2 alone would
    # cancel in float32. The result does not depend on the centre, so its gradient is exactly zero.
    centre = jax.lax.stop_gradient(y[0].mean((0, 1)))
    away = y - centre
    first, second = away.mean((0, 1, 2)), (away * away).mean((0, 1, 2))
    return signed_pool(y, sign, pool), Moments(centre + first, second - first**2)


def signed_pool(y: jax.Array, sign: jax.Array, pool: bool) -> jax.Array:
    """2x2 max-pooling where `sign` > 0 and min-pooling where it is < 0; y itself without `pool`."""
    return sign * max_pool(sign * y) if pool else y


def _moments_by_patches(
    unfolded: jax.Array, kernel: jax.Array, weight: jax.Array | None
) -> Moments:
    """Moments of y = p k without y: mean(p) k and the diagonal of k' cov(p) k.

    Images are weighted by [n, 1, 1, 1].
    """
    kernel = kernel.reshape(-1, kernel.shape[-1])
    if weight is None:
        weight = jnp.ones((unfolded.shape[0], 1, 1, 1), unfolded.dtype)
    count = weight.sum() * unfolded.shape[1] * unfolded.shape[2]
    mean = (weight * unfolded).sum((0, 1, 2)) / count
    centred = (unfolded - mean).reshape(-1, mean.size)
    weighted = (weight * (unfolded - mean)).reshape(-1, mean.size)
    covariance = centred.T @ weighted / count
    return Moments(mean @ kernel, (kernel * (covariance @ kernel)).sum(0))


def _in_chunks(x: jax.Array, chunks: int) -> jax.Array:
    """Images [n, ...] -> [chunks, ceil(n / chunks), ...], the last ones of zeros."""
    size = math.ceil(x.shape[0] / chunks)
    x = jnp.pad(x, ((0, chunks * size - x.shape[0]), *[(0, 0)] * (x.ndim - 1)))
    return x.reshape(chunks, size, *x.shape[1:])


def _chunks(x: jax.Array, kernel: jax.Array, stride: int) -> int:
    """How many chunks keep a chunk's output in the cache, where computing it again is cheap."""
    if jax.default_backend() != "cpu":
        return 1
    places = math.ceil(x.shape[1] / stride) * math.ceil(x.shape[2] / stride)
    return math.ceil(x.shape[0] * places * kernel.shape[3] * x.dtype.itemsize / _CHUNK_BYTES)
