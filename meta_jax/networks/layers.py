"""Layers as pure functions on dictionaries of parameters: linear maps and convolutional blocks."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import Array, MomentsUse, Normalisation, PyTree, check_mask
from meta_jax.lookup import UsageError
from meta_jax.networks.convolution import convolve, max_pool
from meta_jax.networks.fused_block import deferred_conv_block, fused_conv_block
from meta_jax.networks.normalisation import BATCH_MODES, init_normalisation, normalise
from meta_jax.shapes import with_rank


def check_at_least_one(component: str, **settings: float) -> None:
    """Refuses settings below one.

    Args:
      component: Name of the component that has them.
      **settings: The values by name.

    Raises:
      UsageError: a value is below one.
    """
    for name, value in settings.items():
        if value < 1:
            raise UsageError(f"{component} needs {name} of at least 1, not {value}")


def init_linear(key: Array, inputs: int, outputs: int) -> PyTree:
    """Glorot-uniform kernel [inputs, outputs] and a zero bias [outputs]."""
    kernel = jax.nn.initializers.glorot_uniform()(key, (inputs, outputs))
    return {"kernel": kernel, "bias": jnp.zeros(outputs, kernel.dtype)}


def linear(params: PyTree, x: Array) -> Array:
    """x [n, inputs] -> x W + b [n, outputs]."""
    y = x @ params["kernel"]
    return y + with_rank(params["bias"], y)


def init_conv_block(
    key: Array,
    inputs: int,
    features: int,
    normalisation: Normalisation,
    *,
    kernel_init: Callable[[Array, tuple[int, ...]], Array] | None = None,
) -> tuple[PyTree, PyTree]:
    """Parameters and moments of a 3x3 convolution with bias and its normalisation.

    Args:
      key: A random key.
      inputs: Input channels.
      features: Output channels.
      normalisation: Mode of the normalisation.
      kernel_init: (key, shape) -> the kernel; Glorot-uniform if None.

    Returns:
      `params` with `conv` = {kernel [3, 3, inputs, features], bias [features]} and, but for the
      mode none, `normalisation` as `init_normalisation` has it; the moments, {} in modes that
      keep none.
    """
    kernel = (kernel_init or jax.nn.initializers.glorot_uniform())(key, (3, 3, inputs, features))
    params = {"conv": {"kernel": kernel, "bias": jnp.zeros(features, kernel.dtype)}}
    scale, stats = init_normalisation(features, normalisation, kernel.dtype)
    return params | ({"normalisation": scale} if scale else {}), stats


def conv_block(
    params: PyTree,
    stats: PyTree,
    x: Array,
    *,
    stride: int,
    pool: bool,
    normalisation: Normalisation,
    moments: MomentsUse,
    mask: Array | None = None,
    padding: str = "SAME",
    axis: str | None = None,
) -> tuple[Array, PyTree]:
    """3x3 convolution -> normalisation -> ReLU -> optional 2x2 max-pooling.

    Args:
      params, stats: Parameters and moments, from `init_conv_block`.
      x: Images [n, height, width, inputs].
      stride: Step of the convolution, in pixels.
      pool: Whether to max-pool at the end.
      normalisation: Mode of the normalisation.
      moments: Which moments normalise: see `meta_jax.core.MomentsUse`.
      mask: bool [n], False for padding, which enters no moment.
      padding: 'SAME' or 'VALID', of the convolution.
      axis: Name of the devices' axis that shares the images, inside `jax.shard_map`.

    Returns:
      The features [n, out_height, out_width, features] and the new moments.
    """
    if normalisation in BATCH_MODES:
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
    y = convolve(x, params["conv"]["kernel"], stride=stride, padding=padding)
    y, stats = normalise(
        params.get("normalisation", {}),
        stats,
        y + with_rank(params["conv"]["bias"], y),
        mode=normalisation,
        moments=moments,
        mask=mask,
    )
    y = jax.nn.relu(y)
    return max_pool(y) if pool else y, stats


class Block(NamedTuple):
    """What a `conv_block` of a network is."""

    stride: int
    pool: bool
    padding: str


def apply_conv_blocks(
    params: PyTree,
    state: PyTree,
    x: Array,
    blocks: dict[str, Block],
    *,
    normalisation: Normalisation,
    moments: MomentsUse,
    mask: Array | None = None,
    axis: str | None = None,
    defer: bool = False,
) -> tuple[Array, PyTree]:
    """Applies one `conv_block` after another.

    Args:
      params, state: Parameters and moments of the blocks, by name; moments only where there are.
      x: Images [n, height, width, inputs].
      blocks: The blocks by name, two or more.
      normalisation: Mode of the normalisation.
      moments: Which moments normalise.
      mask: bool [n], False for padding.
      axis: Name of the devices' axis that shares the images, inside `jax.shard_map`.
      defer: Whether the first block may be left to the second, where that is faster.

    Returns:
      The last block's features and the new state, of the old one's structure.
    """
    if mask is not None:
        check_mask(mask, x.shape[0])
    first, new_state = next(iter(blocks)), {}
    y = x  # images, features, or what a block deferred
    for name, block in blocks.items():
        run = _form(normalisation, defer=defer and name == first)
        y, stats = run(
            params[name],
            state.get(name, {}),
            y,
            stride=block.stride,
            pool=block.pool,
            padding=block.padding,
            moments=moments,
            mask=mask,
            axis=axis,
        )
        if stats:
            new_state[name] = stats
    return y, new_state


def _form(normalisation: Normalisation, *, defer: bool) -> Callable[..., tuple[Any, PyTree]]:
    """The form in which a block is computed: one after another, or left to the next."""
    if defer and normalisation in BATCH_MODES:
        return deferred_conv_block
    return partial(conv_block, normalisation=normalisation)
