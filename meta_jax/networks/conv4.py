"""The four-block convolutional network of few-shot learning, in its published forms."""

from functools import partial
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from meta_jax import registry
from meta_jax.core import Array, MomentsUse, Network, Normalisation, PyTree
from meta_jax.lookup import UsageError
from meta_jax.networks.layers import Block, apply_conv_blocks, init_conv_block
from meta_jax.networks.normalisation import check_mode
from meta_jax.networks.sharing import embed_on
from meta_jax.ranges import PositiveInt

_NAMES = ("block1", "block2", "block3", "block4")


@registry.network("conv4")
def conv4(
    features: PositiveInt = 64,
    *,
    normalisation: Normalisation = "running",
    mesh: Mesh | None = None,
) -> Network:
    """Builds conv4: 4 x [3x3 convolution, normalisation, ReLU, 2x2 max-pooling], flattened.

    It is the network of Vinyals et al. (2016).

    Args:
      features: Channels of every block.
      normalisation: Mode of the normalisation layers (see `meta_jax.networks.normalisation`).
      mesh: Devices, along one axis, that share the images.

    Returns:
      A network from images [n, height, width, channels], sides of at least 16 pixels, to
      embeddings [n, (height // 16) * (width // 16) * features]. 111,936 parameters at 64 features
      and one channel.

    Raises:
      UsageError: an unknown mode, or features below one.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> network = conv4()
      >>> x = jnp.zeros((2, 28, 28, 1))
      >>> params, state = jax.jit(network.init)(jax.random.key(0), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      111936
      >>> embed = jax.jit(lambda x: network.apply(params, state, x, key=None, train=False)[0])
      >>> embed(x).shape
      (2, 64)
    """
    return _network("conv4", features, normalisation, mesh, stride=1, pool=True, mean=False)


@registry.network("strided_conv4")
def strided_conv4(
    features: PositiveInt = 64,
    *,
    normalisation: Normalisation = "batch",
    mean: bool = True,
    mesh: Mesh | None = None,
) -> Network:
    """Builds strided conv4: 4 x [3x3 convolution of stride 2, normalisation, ReLU], then a mean.

    It is the network of Finn et al. (2017) on Omniglot; the mean is over an image's places.

    Args:
      features: Channels of every block.
      normalisation: Mode of the normalisation layers (see `meta_jax.networks.normalisation`).
      mean: Whether the last block is averaged over places; if not, it is flattened.
      mesh: Devices, along one axis, that share the images.

    Returns:
      A network from images [n, height, width, channels] to embeddings [n, features], or
      [n, ceil(height / 16) * ceil(width / 16) * features] where they are flattened.

    Raises:
      UsageError: an unknown mode, or features below one.
    """
    return _network("strided_conv4", features, normalisation, mesh, stride=2, pool=False, mean=mean)


@registry.network("flat_strided_conv4")
def flat_strided_conv4(
    features: PositiveInt = 64, *, normalisation: Normalisation = "batch", mesh: Mesh | None = None
) -> Network:
    """Builds strided conv4 with its last block flattened, as Nichol et al. (2018) have it.

    Args:
      features: Channels of every block.
      normalisation: Mode of the normalisation layers (see `meta_jax.networks.normalisation`).
      mesh: Devices, along one axis, that share the images.

    Returns:
      A network from images [n, height, width, channels] to embeddings
      [n, ceil(height / 16) * ceil(width / 16) * features].

    Raises:
      UsageError: an unknown mode, or features below one.
    """
    return strided_conv4(features, normalisation=normalisation, mean=False, mesh=mesh)


class _Form(NamedTuple):
    """Which of the published forms."""

    features: int
    stride: int
    pool: bool
    mean: bool
    normalisation: Normalisation


def _network(
    name: str,
    features: int,
    normalisation: Normalisation,
    mesh: Mesh | None,
    *,
    stride: int,
    pool: bool,
    mean: bool,
) -> Network:
    check_mode(normalisation)
    form = _Form(features, stride, pool, mean, normalisation)
    return Network(partial(_init, form), partial(_apply, form, mesh), normalisation)


def _init(form: _Form, key: Array, x: Array) -> tuple[PyTree, PyTree]:
    smallest = 2 ** len(_NAMES)
    if form.pool and min(x.shape[1:3]) < smallest:
        raise UsageError(
            f"images of {x.shape[1]}x{x.shape[2]} pixels are too small for conv4, which pools "
            f"them four times: use at least {smallest}x{smallest}"
        )
    params, state, inputs = {}, {}, x.shape[-1]
    for name, block_key in zip(_NAMES, jax.random.split(key, len(_NAMES)), strict=True):
        params[name], stats = init_conv_block(block_key, inputs, form.features, form.normalisation)
        if stats:
            state[name] = stats
        inputs = form.features
    return params, state


def _apply(
    form: _Form,
    mesh: Mesh | None,
    params: PyTree,
    state: PyTree,
    x: Array,
    *,
    key: Array | None,
    train: bool,
    moments: MomentsUse = "stored",
    mask: Array | None = None,
) -> tuple[Array, PyTree]:
    del key, train  # there is no dropout
    embed = partial(_embed, form, moments=moments)
    return embed_on(mesh, form.normalisation, embed, params, state, x, mask)


def _embed(
    form: _Form,
    params: PyTree,
    state: PyTree,
    x: Array,
    *,
    moments: MomentsUse,
    mask: Array | None,
    axis: str | None,
) -> tuple[Array, PyTree]:
    y, state = apply_conv_blocks(
        params,
        state,
        x,
        dict.fromkeys(_NAMES, Block(form.stride, form.pool, "SAME")),
        normalisation=form.normalisation,
        moments=moments,
        mask=mask,
        axis=axis,
        defer=True,
    )
    return y.mean((1, 2)) if form.mean else y.reshape(y.shape[0], -1), state
