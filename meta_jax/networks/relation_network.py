"""The encoder and the relation module of Relation Networks (Sung et al. 2018, arXiv:1711.06025)."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from meta_jax import registry
from meta_jax.core import Array, MomentsUse, Network, Normalisation, PyTree
from meta_jax.lookup import UsageError
from meta_jax.networks.convolution import convolve, max_pool
from meta_jax.networks.fused_block import finish_block, pool_moments, scale_sign
from meta_jax.networks.layers import (
    Block,
    apply_conv_blocks,
    conv_block,
    init_conv_block,
    linear,
)
from meta_jax.networks.normalisation import BATCH_MODES, check_mode, normalise
from meta_jax.networks.sharing import embed_on
from meta_jax.ranges import PositiveInt

_HIDDEN = 8  # units between the relation module's convolutions and its output
_BLOCKS = {
    "block1": Block(1, True, "VALID"),
    "block2": Block(1, True, "VALID"),
    "block3": Block(1, False, "SAME"),
    "block4": Block(1, False, "SAME"),
}


@registry.network("relation_encoder")
def relation_encoder(
    features: PositiveInt = 64,
    *,
    normalisation: Normalisation = "batch",
    mesh: Mesh | None = None,
) -> Network:
    """Builds the encoder of Relation Networks: 4 x [3x3 convolution, normalisation, ReLU].

    The first two blocks are unpadded and max-pooled 2x2.

    Args:
      features: Channels of every block.
      normalisation: Mode of the normalisation layers (see `meta_jax.networks.normalisation`); the
        paper's is 'batch'.
      mesh: Devices, along one axis, that share the images.

    Returns:
      A network from images [n, height, width, channels] to feature maps
      [n, rows, columns, features], 5x5 for 28x28 pixels. 111,936 parameters at 64 features and one
      channel.

    Raises:
      UsageError: an unknown mode, or features below one.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> network = relation_encoder()
      >>> x = jnp.zeros((2, 28, 28, 1))
      >>> params, state = jax.jit(network.init)(jax.random.key(0), x)
      >>> embed = jax.jit(lambda x: network.apply(params, state, x, key=None, train=False)[0])
      >>> embed(x).shape
      (2, 5, 5, 64)
    """
    check_mode(normalisation)
    init = partial(_init_encoder, features, normalisation)
    return Network(init, partial(_apply_encoder, normalisation, mesh), normalisation)


def _init_encoder(
    features: int, normalisation: Normalisation, key: Array, x: Array
) -> tuple[PyTree, PyTree]:
    if min(x.shape[1:3]) < 10:
        raise UsageError(
            f"images of {x.shape[1]}x{x.shape[2]} pixels are too small for the relation "
            "encoder: use at least 10x10"
        )
    params, state, inputs = {}, {}, x.shape[-1]
    for name, block_key in zip(_BLOCKS, jax.random.split(key, len(_BLOCKS)), strict=True):
        params[name], stats = _init_block(block_key, inputs, features, normalisation)
        if stats:
            state[name] = stats
        inputs = features
    return params, state


def _apply_encoder(
    normalisation: Normalisation,
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
    embed = partial(apply_conv_blocks, blocks=_BLOCKS, normalisation=normalisation, moments=moments)
    return embed_on(mesh, normalisation, embed, params, state, x, mask)


def init_relation_module(
    key: Array,
    maps: Array,
    *,
    features: int = 64,
    padding: str = "SAME",
    normalisation: Normalisation = "batch",
) -> tuple[PyTree, PyTree]:
    """Parameters and moments of the relation module; 111,505 parameters for 5x5x64 maps.

    Args:
      key: A random key.
      maps: Feature maps [n, height, width, channels], for their shape.
      features: Channels of both convolutions.
      padding: 'SAME', as the authors have it on Omniglot, or 'VALID', as on miniImageNet.
      normalisation: Mode of the normalisation layers.

    Raises:
      UsageError: the inputs are no feature maps, or too small to be pooled twice.
    """
    if maps.ndim != 4:
        raise UsageError(
            f"the relation module compares feature maps, not embeddings of shape {maps.shape[1:]}: "
            "use an encoder whose outputs are [n, height, width, channels]"
        )
    height, width = (_pooled(_pooled(side, padding), padding) for side in maps.shape[1:3])
    if min(height, width) < 1:
        raise UsageError(
            f"feature maps of {maps.shape[1]}x{maps.shape[2]} are too small for the relation "
            "module: use larger images or another encoder"
        )
    keys = jax.random.split(key, 4)
    block1, stats1 = _init_block(keys[0], 2 * maps.shape[3], features, normalisation)
    block2, stats2 = _init_block(keys[1], features, features, normalisation)
    params = {
        "block1": block1,
        "block2": block2,
        "hidden": _init_dense(keys[2], height * width * features, _HIDDEN),
        "output": _init_dense(keys[3], _HIDDEN, 1),
    }
    return params, _present({"block1": stats1, "block2": stats2})


def relation_module(
    params: PyTree,
    stats: PyTree,
    classes: Array,
    queries: Array,
    *,
    normalisation: Normalisation,
    moments: MomentsUse,
    mask: Array | None = None,
    padding: str = "SAME",
) -> tuple[Array, PyTree]:
    """2 x [3x3 convolution, normalisation, ReLU, 2x2 max-pooling], 8 units with ReLU, 1 output.

    It looks at the class's map and the query's, concatenated along the channels, for all pairs.

    Args:
      params, stats: Parameters and moments, from `init_relation_module`.
      classes: One feature map for each class [ways, height, width, channels].
      queries: Feature maps [m, height, width, channels].
      normalisation: Mode of the normalisation layers.
      moments: Which moments of the pairs normalise.
      mask: bool [m], False for queries that are padding; their pairs enter no moment.
      padding: As in `init_relation_module`.

    Returns:
      The output before its sigmoid [m, ways], and the new moments.
    """
    chex.assert_rank([classes, queries], 4)
    m, ways = queries.shape[0], classes.shape[0]
    # Of all pairs, a query's in a row.
    pair_mask = None if mask is None else jnp.repeat(mask, ways)
    settings = {"normalisation": normalisation, "moments": moments, "mask": pair_mask}
    x, stats1 = _first_block(
        params["block1"], stats.get("block1", {}), classes, queries, padding=padding, **settings
    )
    x, stats2 = conv_block(
        params["block2"],
        stats.get("block2", {}),
        x,
        stride=1,
        pool=True,
        padding=padding,
        **settings,
    )
    x = jax.nn.relu(linear(params["hidden"], x.reshape(m * ways, -1)))
    scores = linear(params["output"], x).reshape(m, ways)
    return scores, _present({"block1": stats1, "block2": stats2})


def _first_block(
    params: PyTree,
    stats: PyTree,
    classes: Array,
    queries: Array,
    *,
    normalisation: Normalisation,
    moments: MomentsUse,
    mask: Array | None,
    padding: str,
) -> tuple[Array, PyTree]:
    """The first block on all pairs [m * ways, height, width, channels], a query's in a row."""
    # A convolution of two maps concatenated is the sum of two convolutions: of each map once, not
    # of each pair.
    kernel, channels = params["conv"]["kernel"], classes.shape[-1]
    of_class = convolve(classes, kernel[:, :, :channels], padding=padding)
    of_query = convolve(queries, kernel[:, :, channels:], padding=padding)
    x = of_query[:, None] + of_class[None]
    x = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    if normalisation in BATCH_MODES:
        x, batch = pool_moments(x, scale_sign(params), pool=True, mask=mask)
        return finish_block(params, stats, x, batch, moments=moments, mask=mask)
    x, stats = normalise(
        params.get("normalisation", {}),
        stats,
        x + params["conv"]["bias"],
        mode=normalisation,
        moments=moments,
        mask=mask,
    )
    return max_pool(jax.nn.relu(x)), stats


def _present(stats: dict[str, PyTree]) -> PyTree:
    """The blocks that keep moments."""
    return {name: kept for name, kept in stats.items() if kept}


def _pooled(side: int, padding: str) -> int:
    """A side, in pixels, behind a 3x3 convolution and 2x2 pooling."""
    return (side - 2 if padding == "VALID" else side) // 2


def _init_block(
    key: Array, inputs: int, features: int, normalisation: Normalisation
) -> tuple[PyTree, PyTree]:
    """A block whose kernel is normal with variance 2 / (9 * features), as the authors have it."""
    normal = jax.nn.initializers.normal(math.sqrt(2 / (9 * features)))
    return init_conv_block(key, inputs, features, normalisation, kernel_init=normal)


def _init_dense(key: Array, inputs: int, outputs: int) -> PyTree:
    """Normal with standard deviation 0.01, and biases of one."""
    kernel = 0.01 * jax.random.normal(key, (inputs, outputs))
    return {"kernel": kernel, "bias": jnp.ones(outputs, kernel.dtype)}
