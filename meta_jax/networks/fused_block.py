"""A block of conv4 in one piece: convolution, batch norm, ReLU and pooling, for speed alone.

Only the blocks of this package's own networks use it, and only where moments are those of a batch;
elsewhere a block is made of plain layers (see `meta_jax.networks.layers`). Three facts shape this
file:

- With one to four input channels, batch-norm moments follow from the mean and covariance of the
  patches, nine numbers wide, without a look at the output.
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

from meta_jax.backend import on_cpu
from meta_jax.core import Array, MomentsUse, PyTree
from meta_jax.networks.chunks import chunks_within, in_chunks, is_known
from meta_jax.networks.convolution import (
    convolve,
    max_pool,
    patches,
    patches_times,
    small_patches,
)
from meta_jax.networks.normalisation import EPSILON, Moments, used_moments, wide_type
from meta_jax.shapes import with_rank

_PREPARED_BYTES = 1 << 18  # inputs of one chunk; they stay in a core's own cache
_CHUNK_BYTES = 4 << 20  # convolution output of one chunk; about a core's share of the cache


class Deferred(NamedTuple):
    """A block's output that the next block works out for some images at a time."""

    images: Array  # the block's input, [n, ...]
    apply: Callable[[Array], Array]  # some of the images -> their features
    chunks: int  # in how many parts they fit the cache


def fused_conv_block(
    params: PyTree,
    stats: PyTree,
    x: Array | Deferred,
    *,
    stride: int,
    pool: bool,
    moments: MomentsUse,
    mask: Array | None = None,
    padding: str = "SAME",
    axis: str | None = None,
) -> tuple[Array, PyTree]:
    """Convolution -> batch norm -> ReLU -> optional 2x2 max-pooling, as `layers.conv_block`.

    Args:
      params, stats: Parameters and moments of a block of a mode in `BATCH_MODES`.
      x: Images [n, height, width, inputs], or what another block deferred.
      stride: Step of the convolution, in pixels.
      pool: Whether to max-pool at the end.
      moments: Which moments normalise.
      mask: bool [n], False for padding, which enters no moment.
      padding: 'SAME' or 'VALID'.
      axis: Name of the devices' axis that shares the images, inside `jax.shard_map`.

    Returns:
      The features [n, out_height, out_width, features] and the new statistics.
    """
    kernel, sign = params["conv"]["kernel"], scale_sign(params)
    if isinstance(x, Deferred):
        y = convolve_prepared(
            x.apply, x.images, kernel, chunks=x.chunks, stride=stride, padding=padding
        )
        y, batch = pool_moments(y, sign, pool=pool, mask=mask)
    else:
        y, batch = convolve_pool_moments(
            x, kernel, sign, pool=pool, stride=stride, padding=padding, mask=mask
        )
    batch = _over_devices(batch, mask, axis)
    return finish_block(params, stats, y, batch, moments=moments, mask=mask, axis=axis)


def deferred_conv_block(
    params: PyTree,
    stats: PyTree,
    x: Array,
    *,
    stride: int,
    pool: bool,
    moments: MomentsUse,
    mask: Array | None = None,
    padding: str = "SAME",
    axis: str | None = None,
) -> tuple[Array | Deferred, PyTree]:
    """`fused_conv_block`, its features left to the next block where that is faster.

    Args:
      params, stats, x, stride, pool, moments, mask, padding, axis: As in `fused_conv_block`.

    Returns:
      The features, or what the next block makes them from, and the new statistics.
    """
    kernel, sign = params["conv"]["kernel"], scale_sign(params)
    chunks = prepared_chunks(x, kernel, stride=stride, pool=pool)
    if chunks == 1:
        return fused_conv_block(
            params,
            stats,
            x,
            stride=stride,
            pool=pool,
            moments=moments,
            mask=mask,
            padding=padding,
            axis=axis,
        )
    batch = first_moments(x, kernel, stride=stride, padding=padding, mask=mask)
    batch = _over_devices(batch, mask, axis)
    used, stats = _used(params, stats, batch, moments, mask, axis)

    def features(x: Array) -> Array:
        y = convolve(x, kernel, stride=stride, padding=padding)
        return _normalised(params, signed_pool(y, sign, pool), used)

    return Deferred(x, features, chunks), stats


def scale_sign(params: PyTree) -> Array:
    """The sign of a block's scale, [features]: pooling before it must know."""
    # Pooling first is exact where the scale is >= 0, and with the sign turned elsewhere.
    scale = params["normalisation"]["scale"]
    return jnp.where(scale < 0, -1, 1).astype(scale.dtype)


def finish_block(
    params: PyTree,
    stats: PyTree,
    y: Array,
    batch: Moments,
    *,
    moments: MomentsUse,
    mask: Array | None = None,
    axis: str | None = None,
) -> tuple[Array, PyTree]:
    """The end of a block: bias, batch norm and ReLU.

    Args:
      params, stats: The block's.
      y: The convolution's output, pooled or not, [n, height, width, features].
      batch: Moments of the output before pooling and bias, of the images on all devices.
      moments: Which moments normalise.
      mask: bool [n], False for padding.
      axis: Name of the devices' axis that shares the images, inside `jax.shard_map`.

    Returns:
      The features, of y's shape, and the new statistics; the old ones where no image is real.
    """
    used, stats = _used(params, stats, batch, moments, mask, axis)
    return _normalised(params, y, used), stats


def _over_devices(moments: Moments, mask: Array | None, axis: str | None) -> Moments:
    """Moments over the images of all devices."""
    if axis is None:
        return moments
    share = 1 / lax.axis_size(axis)
    if mask is not None:
        own = mask.sum().astype(moments.mean.dtype)
        share = own / jnp.maximum(lax.psum(own, axis), 1)
    return _mixed(moments, share, lambda x: lax.psum(x, axis))


def _mixed(parts: Moments, share: Array | float, total: Callable[[Array], Array]) -> Moments:
    """Moments of a whole from those of its parts, by Chan's formula.

    E[y^2] - mean^2 would cancel in float32.

    Args:
      parts: Moments of the parts.
      share: Each part's share of the whole.
      total: The sum over the parts.
    """
    mean = total(share * parts.mean)
    return Moments(mean, total(share * (parts.var + (parts.mean - mean) ** 2)))


def _used(
    params: PyTree,
    stats: PyTree,
    batch: Moments,
    moments: MomentsUse,
    mask: Array | None,
    axis: str | None,
) -> tuple[Moments, PyTree]:
    """What to normalise with, mean and variance with the bias, and the new statistics."""
    batch = Moments(batch.mean + params["conv"]["bias"], batch.var)
    used, new = used_moments(stats, batch, moments)
    if mask is None or new is stats:
        return used, new
    real = mask.any() if axis is None else lax.pmax(mask.any(), axis)
    return used, jax.tree.map(lambda n, old: jnp.where(real, n, old), new, stats)


def _normalised(params: PyTree, y: Array, used: Moments) -> Array:
    scale, offset = params["normalisation"]["scale"], params["normalisation"]["offset"]
    factor = scale / jnp.sqrt(used.var + EPSILON)
    bias = with_rank(params["conv"]["bias"] - used.mean, y)
    # Moments are float32 where y is bfloat16.
    return jax.nn.relu((y + bias) * with_rank(factor, y) + with_rank(offset, y)).astype(y.dtype)


# ---- Convolution, pooling and moments.


def convolve_pool_moments(
    x: Array,
    kernel: Array,
    sign: Array,
    *,
    stride: int,
    pool: bool,
    padding: str = "SAME",
    mask: Array | None = None,
) -> tuple[Array, Moments]:
    """Convolution, then 2x2 max-pooling where `sign` > 0 and min-pooling where it is < 0.

    Args:
      x: Images [n, height, width, channels].
      kernel: [window, window, channels, features].
      sign: +1 or -1 for each feature, [features]; the sign of the batch-norm scale that follows.
      stride: Step between windows, in pixels.
      pool: Whether to pool at all.
      padding: 'SAME' or 'VALID'.
      mask: bool [n], False for padding, which enters no moment.

    Returns:
      The pooled output [n, out_height, out_width, features] and the moments of the unpooled one.
    """
    if not small_patches(kernel):
        y = convolve(x, kernel, stride=stride, padding=padding)
        return pool_moments(y, sign, pool=pool, mask=mask)

    def chunk(x: Array, mask: Array | None) -> tuple[Array, Moments]:
        unfolded = patches(x, kernel.shape[0], stride, padding)
        y = patches_times(unfolded, kernel)
        return signed_pool(y, sign, pool), _moments_by_patches(unfolded, kernel, mask)

    chunks = _chunks(x, kernel, stride)
    if chunks == 1:
        y, moments = chunk(x, mask)
        return y, moments
    n = x.shape[0]
    chunks = math.ceil(n / math.ceil(n / chunks))  # no chunk is all filling
    xs = in_chunks(x, chunks)
    real = in_chunks(jnp.ones(n, bool) if mask is None else mask, chunks)
    weighted = mask is not None or real.size > n
    # The backward pass computes a chunk's output again, which is cheaper than keeping it.
    body = jax.checkpoint(lambda c: chunk(c[0], c[1] if weighted else None), prevent_cse=False)
    y, parts = lax.map(body, (xs, real))
    share = (real.sum(1) / jnp.maximum(real.sum(), 1)).astype(parts.mean.dtype)[:, None]
    return y.reshape(real.size, *y.shape[2:])[:n], _mixed(parts, share, lambda x: x.sum(0))


def first_moments(
    x: Array, kernel: Array, *, stride: int, padding: str = "SAME", mask: Array | None = None
) -> Moments:
    """The moments of a convolution with few input channels, without its output.

    Args:
      x: Images [n, height, width, channels].
      kernel: [window, window, channels, features].
      stride: Step between windows, in pixels.
      padding: 'SAME' or 'VALID'.
      mask: bool [n], False for padding.
    """
    return _moments_by_patches(patches(x, kernel.shape[0], stride, padding), kernel, mask)


def prepared_chunks(x: Array, kernel: Array, *, stride: int, pool: bool) -> int:
    """In how many chunks of images a first block pays that is worked out twice; 1: it does not.

    Args:
      x: Images [n, height, width, channels].
      kernel: Kernel of the first convolution, [window, window, channels, features].
      stride: Stride of the first convolution, in pixels.
      pool: Whether 2x2 pooling follows.
    """
    if not on_cpu() or not small_patches(kernel):
        return 1
    side = stride * (2 if pool else 1)
    places = math.ceil(x.shape[1] / side) * math.ceil(x.shape[2] / side)
    image = places * kernel.shape[3] * x.dtype.itemsize
    return chunks_within(x.shape[0], image, _PREPARED_BYTES)


def convolve_prepared(
    prepare: Callable[[Array], Array],
    x: Array,
    kernel: Array,
    *,
    chunks: int,
    stride: int,
    padding: str = "SAME",
) -> Array:
    """`convolve(prepare(x), kernel)` for some images at a time, prepared again for the gradient.

    Args:
      prepare: Images [n, ...] -> inputs [n, height, width, channels], each image by itself.
      x: Images [n, ...].
      kernel: [window, window, channels, features].
      chunks: Number of chunks.
      stride: Step between windows, in pixels.
      padding: 'SAME' or 'VALID'.
    """
    body = jax.checkpoint(
        lambda x: convolve(prepare(x), kernel, stride=stride, padding=padding), prevent_cse=False
    )
    y = lax.map(body, in_chunks(x, chunks))
    return y.reshape(-1, *y.shape[2:])[: x.shape[0]]


def pool_moments(
    y: Array, sign: Array, *, pool: bool, mask: Array | None = None
) -> tuple[Array, Moments]:
    """2x2 max-pooling where `sign` > 0, min-pooling where it is < 0, and the moments before it.

    Args:
      y: A convolution's output [n, height, width, features].
      sign: +1 or -1 for each feature, [features].
      pool: Whether to pool at all.
      mask: bool [n], False for padding, which enters no moment.
    """
    # One pass over y, forwards and backwards, around a rough mean: E[y^2] - E[y]^2 alone would
    # cancel in float32. The result does not depend on the centre, so its gradient is exactly zero.
    wide = y.astype(wide_type(y.dtype))
    one = wide[0] if mask is None else wide[jnp.argmax(mask)]
    centre = lax.stop_gradient(one.mean((0, 1)))
    away = wide - with_rank(centre, wide)
    first, second = _mean_of_real(away, mask), _mean_of_real(away * away, mask)
    return signed_pool(y, sign, pool), Moments(centre + first, second - first**2)


def _mean_of_real(x: Array, mask: Array | None) -> Array:
    """Mean over images that are not padding, and over places, [features]."""
    if mask is None:
        return x.mean((0, 1, 2))
    count = jnp.maximum(mask.sum(), 1) * x.shape[1] * x.shape[2]
    # Not a product with zero: what stands in padding may be infinite.
    return jnp.where(mask.reshape(-1, 1, 1, 1), x, 0).sum((0, 1, 2)) / count.astype(x.dtype)


def signed_pool(y: Array, sign: Array, pool: bool) -> Array:
    """2x2 max-pooling where `sign` > 0 and min-pooling where it is < 0; y itself without `pool`."""
    if not pool:
        return y
    sign = with_rank(sign, y)
    return sign * max_pool(sign * y)


def _moments_by_patches(unfolded: Array, kernel: Array, mask: Array | None) -> Moments:
    """Moments of y = p k without y: mean(p) k and the diagonal of k' cov(p) k."""
    wide = wide_type(unfolded.dtype)
    kernel, unfolded = kernel.reshape(-1, kernel.shape[-1]).astype(wide), unfolded.astype(wide)
    mean, places = _mean_of_real(unfolded, mask), unfolded.shape[1] * unfolded.shape[2]
    away = unfolded - with_rank(mean, unfolded)
    count: Array | int = unfolded.shape[0]
    if mask is not None:
        away, count = jnp.where(mask.reshape(-1, 1, 1, 1), away, 0), jnp.maximum(mask.sum(), 1)
    away = away.reshape(-1, mean.size)
    covariance = away.T @ away / (count * places)
    return Moments(mean @ kernel, (kernel * (covariance @ kernel)).sum(0))


def _chunks(x: Array, kernel: Array, stride: int) -> int:
    """How many chunks keep a chunk's output in the cache, where computing it again is cheap."""
    if not on_cpu() or not is_known(x.shape[0]):
        return 1
    places = math.ceil(x.shape[1] / stride) * math.ceil(x.shape[2] / stride)
    return math.ceil(x.shape[0] * places * kernel.shape[3] * x.dtype.itemsize / _CHUNK_BYTES)
