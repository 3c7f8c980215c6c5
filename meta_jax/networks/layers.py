"""Layers as pure functions on dictionaries of parameters: linear maps and batch-normed blocks.

Batch norm has named modes, and every reported accuracy names its own:

- `batch`: statistics of whatever is in the batch, in training and in tests (transductive on
  queries; the original MAML and Relation Networks).
- `running`: statistics of the batch in training, averaged over tasks and time for tests (the
  Prototypical Networks' protocol).
- `support`: statistics of the support set alone, kept by `adapt` and used for the queries
  (inductive). In this mode `train=True` means "these are support images: take their statistics".
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import PyTree
from meta_jax.networks.convolution import (
    Moments,
    convolve,
    convolve_pool_moments,
    convolve_prepared,
    first_moments,
    pool_moments,
    prepared_chunks,
    signed_pool,
)

BATCH_NORM_MODES = ("batch", "running", "support")
_EPSILON = 1e-5
_MOMENTUM = 0.9  # of the running statistics, for each outer step


def init_linear(key: jax.Array, inputs: int, outputs: int) -> PyTree:
    """Glorot-uniform kernel [inputs, outputs] and a zero bias [outputs]."""
    kernel = jax.nn.initializers.glorot_uniform()(key, (inputs, outputs))
    return {"kernel": kernel, "bias": jnp.zeros(outputs, kernel.dtype)}


def linear(params: PyTree, x: jax.Array) -> jax.Array:
    """x [n, inputs] -> x W + b [n, outputs]."""
    return x @ params["kernel"] + params["bias"]


def check_batch_norm(mode: str) -> None:
    """Raises ValueError for a batch-norm mode that does not exist."""
    if mode not in BATCH_NORM_MODES:
        raise ValueError(
            f"unknown batch norm '{mode}': choose one of {', '.join(BATCH_NORM_MODES)}"
        )


def init_conv_block(key: jax.Array, inputs: int, features: int) -> tuple[PyTree, PyTree]:
    """Parameters and statistics of a 3x3 convolution with bias and its batch norm.

    Args:
      key: a random key.
      inputs: input channels.
      features: output channels.

    Returns:
      `params` with `conv` = {kernel [3, 3, inputs, features], bias [features]} and
      `batch_norm` = {scale [features], offset [features]}; `stats` = {mean, var}, [features] each.
    """
    kernel = jax.nn.initializers.glorot_uniform()(key, (3, 3, inputs, features))
    zeros, ones = jnp.zeros(features, kernel.dtype), jnp.ones(features, kernel.dtype)
    params = {
        "conv": {"kernel": kernel, "bias": zeros},
        "batch_norm": {"scale": ones, "offset": zeros},
    }
    return params, {"mean": zeros, "var": ones}


class Deferred(NamedTuple):
    """A block's output that the next block works out for some images at a time."""

    images: jax.Array  # the block's input, [n, ...]
    apply: Callable[[jax.Array], jax.Array]  # some of the images -> their features
    chunks: int  # in how many parts they fit the cache


def conv_block(
    params: PyTree,
    stats: PyTree,
    x: jax.Array | Deferred,
    *,
    stride: int,
    pool: bool,
    batch_norm: str,
    train: bool,
    padding: str = "SAME",
    axis: str | None = None,
    defer: bool = False,
) -> tuple[jax.Array | Deferred, PyTree]:
    """3x3 convolution -> batch norm -> ReLU -> optional 2x2 max-pooling.

    Args:
      params, stats: from `init_conv_block`.
      x: images [n, height, width, inputs], or what another block deferred.
      stride: of the convolution, in pixels.
      pool: whether to max-pool at the end.
      batch_norm: a mode of this module.
      train: whether the batch's own statistics are taken (`batch` always takes them).
      padding: of the convolution, 'SAME' or 'VALID'.
      axis: of the devices that share the images evenly, inside `jax.shard_map`.
      defer: whether the features may be left to the next block, where that is faster.

    Returns:
      The features [n, out_height, out_width, features], or what the next block makes them from
      where they are deferred, and the new statistics.
    """
    kernel, sign = params["conv"]["kernel"], scale_sign(params)
    convolution = {"stride": stride, "padding": padding}

    def everywhere(moments: Moments) -> Moments:
        if axis is None:
            return moments
        mean = jax.lax.pmean(moments.mean, axis)
        return Moments(mean, jax.lax.pmean(moments.var + (moments.mean - mean) ** 2, axis))

    mode = {"batch_norm": batch_norm, "train": train}
    if isinstance(x, Deferred):
        y = convolve_prepared(x.apply, x.images, kernel, chunks=x.chunks, **convolution)
        y, moments = pool_moments(y, sign, pool=pool)
        return normalise(params, stats, y, everywhere(moments), **mode)
    chunks = prepared_chunks(x, kernel, stride=stride, pool=pool) if defer else 1
    if chunks > 1:
        moments = everywhere(first_moments(x, kernel, **convolution))
        used, stats = _statistics(params, stats, moments, **mode)

        def features(x: jax.Array) -> jax.Array:
            return _normalised(
                params, signed_pool(convolve(x, kernel, **convolution), sign, pool), used
            )

        return Deferred(x, features, chunks), stats
    y, moments = convolve_pool_moments(x, kernel, sign, pool=pool, **convolution)
    return normalise(params, stats, y, everywhere(moments), **mode)


def scale_sign(params: PyTree) -> jax.Array:
    """The sign of a block's batch-norm scale, [features]: pooling before it must know."""
    # Pooling first is exact where the scale is >= 0, and with the sign turned elsewhere.
    scale = params["batch_norm"]["scale"]
    return jnp.where(scale < 0, -1, 1).astype(scale.dtype)


def normalise(
    params: PyTree, stats: PyTree, y: jax.Array, moments: Moments, *, batch_norm: str, train: bool
) -> tuple[jax.Array, PyTree]:
    """The end of a block: bias, batch norm and ReLU.

    Args:
      params, stats: from `init_conv_block`.
      y: the convolution's output, pooled or not, [n, height, width, features].
      moments: of the output before pooling and bias.
      batch_norm: a mode of this module.
      train: whether the batch's own statistics are taken (`batch` always takes them).

    Returns:
      The features, of y's shape, and the new statistics.
    """
    used, stats = _statistics(params, stats, moments, batch_norm=batch_norm, train=train)
    return _normalised(params, y, used), stats


def _statistics(
    params: PyTree, stats: PyTree, moments: Moments, *, batch_norm: str, train: bool
) -> tuple[Moments, PyTree]:
    """What to normalise with, mean and variance with the bias, and the new statistics."""
    batch = Moments(moments.mean + params["conv"]["bias"], moments.var)
    if train and batch_norm == "running":
        stats = {
            "mean": _MOMENTUM * stats["mean"] + (1 - _MOMENTUM) * batch.mean,
            "var": _MOMENTUM * stats["var"] + (1 - _MOMENTUM) * batch.var,
        }
        return batch, stats
    if train or batch_norm == "batch":
        return batch, {"mean": batch.mean, "var": batch.var}
    return Moments(stats["mean"], stats["var"]), stats


def _normalised(params: PyTree, y: jax.Array, used: Moments) -> jax.Array:
    scale, offset = params["batch_norm"]["scale"], params["batch_norm"]["offset"]
    factor = scale / jnp.sqrt(used.var + _EPSILON)
    return jax.nn.relu((y + (params["conv"]["bias"] - used.mean)) * factor + offset)
