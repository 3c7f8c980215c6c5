"""Layers as pure functions on dictionaries of parameters: linear maps and batch-normed blocks.

Batch norm has named modes, and every reported accuracy names its own:

- `batch`: statistics of whatever is in the batch, in training and in tests (transductive on
  queries; the original MAML and Relation Networks).
- `running`: statistics of the batch in training, averaged over tasks and time for tests (the
  Prototypical Networks' protocol).
- `support`: statistics of the support set alone, kept by `adapt` and used for the queries
  (inductive). In this mode `train=True` means "these are support images: take their statistics".
"""

import jax
import jax.numpy as jnp

from meta_jax.core import PyTree
from meta_jax.networks.convolution import Moments, convolve_pool_moments

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


def conv_block(
    params: PyTree,
    stats: PyTree,
    x: jax.Array,
    *,
    stride: int,
    pool: bool,
    batch_norm: str,
    train: bool,
    padding: str = "SAME",
    axis: str | None = None,
) -> tuple[jax.Array, PyTree]:
    """3x3 convolution -> batch norm -> ReLU -> optional 2x2 max-pooling.

    Args:
      params, stats: from `init_conv_block`.
      x: images [n, height, width, inputs].
      stride: of the convolution, in pixels.
      pool: whether to max-pool at the end.
      batch_norm: a mode of this module.
      train: whether the batch's own statistics are taken (`batch` always takes them).
      padding: of the convolution, 'SAME' or 'VALID'.
      axis: of the devices that share the images evenly, inside `jax.shard_map`.

    Returns:
      The features [n, out_height, out_width, features] and the new statistics.
    """
    y, moments = convolve_pool_moments(
        x,
        params["conv"]["kernel"],
        scale_sign(params),
        stride=stride,
        pool=pool,
        padding=padding,
    )
    if axis is not None:
        mean = jax.lax.pmean(moments.mean, axis)
        moments = Moments(mean, jax.lax.pmean(moments.var + (moments.mean - mean) ** 2, axis))
    return normalise(params, stats, y, moments, batch_norm=batch_norm, train=train)


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
    scale, offset = params["batch_norm"]["scale"], params["batch_norm"]["offset"]
    bias = params["conv"]["bias"]
    batch = Moments(moments.mean + bias, moments.var)
    if train and batch_norm == "running":
        stats = {
            "mean": _MOMENTUM * stats["mean"] + (1 - _MOMENTUM) * batch.mean,
            "var": _MOMENTUM * stats["var"] + (1 - _MOMENTUM) * batch.var,
        }
        used = batch
    elif train or batch_norm == "batch":
        stats = {"mean": batch.mean, "var": batch.var}
        used = batch
    else:
        used = Moments(stats["mean"], stats["var"])
    factor = scale / jnp.sqrt(used.var + _EPSILON)
    return jax.nn.relu((y + (bias - used.mean)) * factor + offset), stats
