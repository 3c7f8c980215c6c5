"""ResNet-12, the usual deep backbone of few-shot learning, with DropBlock."""

import math
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import lax

from meta_jax import registry
from meta_jax.core import Array, MomentsUse, Network, Normalisation, PyTree
from meta_jax.lookup import UsageError
from meta_jax.networks.convolution import convolve, max_pool
from meta_jax.networks.layers import check_at_least_one
from meta_jax.networks.normalisation import check_mode, init_normalisation, normalise
from meta_jax.ranges import Decay, PositiveInt, PositiveInts

_LAYERS = ("layer1", "layer2", "layer3")
_SLOPE = 0.1  # of the leaky ReLU below zero
_IN_SQUARES = 2  # the last blocks, whose features DropBlock drops in squares


@registry.network("resnet12")
def resnet12(
    widths: PositiveInts = (64, 160, 320, 640),
    *,
    drop_rate: Decay = 0.1,
    drop_block: PositiveInt = 5,
    mean: bool = True,
    normalisation: Normalisation = "running",
) -> Network:
    """Builds ResNet-12: residual blocks of three 3x3 convolutions, 2x2 max-pooling after each.

    It is the network of TADAM (Oreshkin et al. 2018) and MetaOptNet (Lee et al. 2019), with its
    leaky ReLUs of slope 0.1 and 1x1 shortcuts. Its moments are those of plain normalisation layers.

    Args:
      widths: Channels of each block.
      drop_rate: Share of features dropped while training, behind each block; 0 drops none.
      drop_block: Side of the squares that DropBlock drops behind the last two blocks, at most that
        of their feature maps; 1 drops single features. The other blocks drop single features.
      mean: Whether the last block is averaged over places, as TADAM does; if not, it is flattened,
        as MetaOptNet does.
      normalisation: Mode of the normalisation layers (see `meta_jax.networks.normalisation`).

    Returns:
      A network from images [n, height, width, channels], sides of at least 2 to the number of
      blocks, to embeddings [n, widths[-1]]. 12,424,320 parameters for three channels.

    Raises:
      UsageError: an unknown mode, no blocks, a width or a square below one, or a drop_rate that is
        not in [0, 1).

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> network = resnet12()
      >>> x = jax.ShapeDtypeStruct((2, 84, 84, 3), jnp.float32)
      >>> params, state = jax.eval_shape(network.init, jax.random.key(0), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      12424320
    """
    widths = tuple(widths)
    check_mode(normalisation)
    if not widths:
        raise UsageError("resnet12 without a block: give widths, for example (64, 160, 320, 640)")
    form = _Form(widths, drop_rate, drop_block, mean, normalisation)
    return Network(partial(_init, form), partial(_apply, form), normalisation)


def _check_rate(what: str, setting: str, rate: float) -> None:
    if not 0 <= rate < 1:
        raise UsageError(f"{what} needs a {setting} from 0 to below 1, not {rate}")


class _Form(NamedTuple):
    """The settings of `resnet12`."""

    widths: tuple[int, ...]
    drop_rate: float
    drop_block: int
    mean: bool
    normalisation: Normalisation


def _init(form: _Form, key: Array, x: Array) -> tuple[PyTree, PyTree]:
    smallest = 2 ** len(form.widths)
    if min(x.shape[1:3]) < smallest:
        raise UsageError(
            f"images of {x.shape[1]}x{x.shape[2]} pixels are too small for resnet12, which pools "
            f"them {len(form.widths)} times: use at least {smallest}x{smallest}"
        )
    params, state, inputs = {}, {}, x.shape[-1]
    for i, block_key in enumerate(jax.random.split(key, len(form.widths))):
        name, width = f"block{i + 1}", form.widths[i]
        params[name], stats = _init_block(block_key, inputs, width, form.normalisation)
        if stats:
            state[name] = stats
        inputs = width
    return params, state


def _init_block(
    key: Array, inputs: int, width: int, normalisation: Normalisation
) -> tuple[PyTree, PyTree]:
    """Three 3x3 layers, `layer1` to `layer3`, and the 1x1 `shortcut`; moments where there are."""
    params, state = {}, {}
    windows = {**dict.fromkeys(_LAYERS, 3), "shortcut": 1}
    for (name, window), layer_key in zip(
        windows.items(), jax.random.split(key, len(windows)), strict=True
    ):
        channels = width if name in _LAYERS[1:] else inputs
        params[name], stats = _init_layer(layer_key, window, channels, width, normalisation)
        if stats:
            state[name] = stats
    return params, state


def _init_layer(
    key: Array, window: int, inputs: int, width: int, normalisation: Normalisation
) -> tuple[PyTree, PyTree]:
    """A convolution without bias, of variance 2 / (window^2 width), and its normalisation."""
    he = jax.nn.initializers.normal(math.sqrt(2 / (window**2 * width)))
    kernel = he(key, (window, window, inputs, width))
    scale, stats = init_normalisation(width, normalisation, kernel.dtype)
    return {"conv": {"kernel": kernel}, **({"normalisation": scale} if scale else {})}, stats


def _apply(
    form: _Form,
    params: PyTree,
    state: PyTree,
    x: Array,
    *,
    key: Array | None,
    train: bool,
    moments: MomentsUse = "stored",
    mask: Array | None = None,
) -> tuple[Array, PyTree]:
    drops = train and form.drop_rate > 0
    if drops and key is None:
        raise ValueError(
            f"resnet12 needs a key while training, for its drop_rate is {form.drop_rate}: give "
            "one, or build it with drop_rate=0"
        )
    blocks = len(form.widths)
    new_state = {}
    for i in range(blocks):
        name = f"block{i + 1}"
        x, stats = _block(
            params[name],
            state.get(name, {}),
            x,
            normalisation=form.normalisation,
            moments=moments,
            mask=mask,
        )
        if stats:
            new_state[name] = stats
        if drops and key is not None:
            size = form.drop_block if i >= blocks - _IN_SQUARES else 1
            x = drop_block(jax.random.fold_in(key, i), x, rate=form.drop_rate, block_size=size)
    return x.mean((1, 2)) if form.mean else x.reshape(x.shape[0], -1), new_state


def _block(
    params: PyTree,
    stats: PyTree,
    x: Array,
    *,
    normalisation: Normalisation,
    moments: MomentsUse,
    mask: Array | None,
) -> tuple[Array, PyTree]:
    """The residual block, max-pooled."""
    new_stats = {}

    def layer(name: str, x: Array) -> Array:
        y, kept = normalise(
            params[name].get("normalisation", {}),
            stats.get(name, {}),
            convolve(x, params[name]["conv"]["kernel"]),
            mode=normalisation,
            moments=moments,
            mask=mask,
        )
        if kept:
            new_stats[name] = kept
        return y

    y = x
    for name in _LAYERS[:-1]:
        y = jax.nn.leaky_relu(layer(name, y), _SLOPE)
    y = layer(_LAYERS[-1], y) + layer("shortcut", x)
    return max_pool(jax.nn.leaky_relu(y, _SLOPE)), new_stats


def drop_block(key: Array, x: Array, *, rate: float, block_size: int) -> Array:
    """Drops squares of feature maps, DropBlock of Ghiasi, Lin and Le (2018).

    Each feature of each image draws its own squares, which lie inside the map; what is kept is
    scaled up by the share of features kept in the whole batch.

    Args:
      key: A random key.
      x: Feature maps [n, height, width, channels].
      rate: Expected share of features dropped, from 0 to below 1, up to overlaps of the squares.
      block_size: Side of the squares, cut down to that of the maps; 1 is plain dropout.

    Returns:
      Feature maps of x's shape and type.

    Raises:
      UsageError: a rate that is not in [0, 1), or squares with a side below one.

    Examples:
      >>> x = jnp.ones((1, 4, 4, 1))
      >>> drop_block(jax.random.key(0), x, rate=0.0, block_size=2).sum()
      Array(16., dtype=float32)
    """
    chex.assert_rank(x, 4)
    check_at_least_one("drop_block", block_size=block_size)
    _check_rate("drop_block", "rate", rate)
    n, height, width, channels = x.shape
    size = min(block_size, height, width)
    rows, cols = height - size + 1, width - size + 1
    # The rate of squares' corners that drops this share of features, were there no overlaps.
    corner_rate = rate / size**2 * (height * width) / (rows * cols)
    corners = jax.random.bernoulli(key, min(corner_rate, 1.0), (n, rows, cols, channels))
    dropped = lax.reduce_window(
        corners,
        False,
        lax.bitwise_or,
        (1, size, size, 1),
        (1, 1, 1, 1),
        ((0, 0), (size - 1, size - 1), (size - 1, size - 1), (0, 0)),
    )
    kept = 1 - dropped.mean(dtype=jnp.promote_types(x.dtype, jnp.float32))
    scale = 1 / jnp.maximum(kept, 1e-6)  # nothing may be kept
    return jnp.where(dropped, 0, x * scale.astype(x.dtype))
