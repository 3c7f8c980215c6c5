"""The encoder and the relation module of Relation Networks (Sung et al. 2018, arXiv:1711.06025)."""

import jax
import jax.numpy as jnp

from meta_jax.core import Network, PyTree
from meta_jax.networks.convolution import convolve, pool_moments
from meta_jax.networks.layers import (
    check_batch_norm,
    conv_block,
    init_conv_block,
    linear,
    normalise,
    scale_sign,
)

_HIDDEN = 8  # units between the relation module's convolutions and its output


def relation_encoder(features: int = 64, *, batch_norm: str = "batch") -> Network:
    """4 x [3x3 convolution, batch norm, ReLU]; the first two unpadded and max-pooled 2x2.

    Args:
      features: channels of every block.
      batch_norm: 'batch', as in the paper, 'running' or 'support' (see
        `meta_jax.networks.layers`).

    Returns:
      A network from images [n, height, width, channels] to feature maps
      [n, rows, columns, features], 5x5 for 28x28 pixels. 111,936 parameters at 64 features and one
      channel.

    Raises:
      ValueError: for an unknown batch-norm mode.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> network = relation_encoder()
      >>> x = jnp.zeros((2, 28, 28, 1))
      >>> params, state = network.init(jax.random.key(0), x)
      >>> network.apply(params, state, x, key=None, train=False)[0].shape
      (2, 5, 5, 64)
    """
    check_batch_norm(batch_norm)
    blocks = {f"block{i + 1}": (i < 2, "VALID" if i < 2 else "SAME") for i in range(4)}

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        if min(x.shape[1:3]) < 10:
            raise ValueError(
                f"images of {x.shape[1]}x{x.shape[2]} pixels are too small for the relation "
                "encoder: use at least 10x10"
            )
        params, state, inputs = {}, {}, x.shape[-1]
        for name, block_key in zip(blocks, jax.random.split(key, 4), strict=True):
            params[name], state[name] = _init_block(block_key, inputs, features)
            inputs = features
        return params, state

    def apply(
        params: PyTree, state: PyTree, x: jax.Array, *, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, PyTree]:
        del key
        new_state = {}
        for name, (pool, padding) in blocks.items():
            x, new_state[name] = conv_block(
                params[name],
                state[name],
                x,
                stride=1,
                pool=pool,
                padding=padding,
                batch_norm=batch_norm,
                train=train,
            )
        return x, new_state

    return Network(init, apply, batch_norm)


def init_relation_module(
    key: jax.Array, maps: jax.Array, *, features: int = 64, padding: str = "SAME"
) -> tuple[PyTree, PyTree]:
    """Parameters and statistics of the relation module; 111,505 parameters for 5x5x64 maps.

    Args:
      key: a random key.
      maps: feature maps [n, height, width, channels], for their shape and type.
      features: channels of both convolutions.
      padding: 'SAME', as the authors have it on Omniglot, or 'VALID', as on miniImageNet.

    Raises:
      ValueError: the inputs are no feature maps, or too small to be pooled twice.
    """
    if maps.ndim != 4:
        raise ValueError(
            f"the relation module compares feature maps, not embeddings of shape {maps.shape[1:]}: "
            "use an encoder whose outputs are [n, height, width, channels]"
        )
    height, width = (_pooled(_pooled(side, padding), padding) for side in maps.shape[1:3])
    if min(height, width) < 1:
        raise ValueError(
            f"feature maps of {maps.shape[1]}x{maps.shape[2]} are too small for the relation "
            "module: use larger images or another encoder"
        )
    keys = jax.random.split(key, 4)
    block1, stats1 = _init_block(keys[0], 2 * maps.shape[3], features)
    block2, stats2 = _init_block(keys[1], features, features)
    params = {
        "block1": block1,
        "block2": block2,
        "hidden": _init_dense(keys[2], height * width * features, _HIDDEN),
        "output": _init_dense(keys[3], _HIDDEN, 1),
    }
    return params, {"block1": stats1, "block2": stats2}


def relation_module(
    params: PyTree,
    stats: PyTree,
    classes: jax.Array,
    queries: jax.Array,
    *,
    batch_norm: str,
    train: bool,
    padding: str = "SAME",
) -> tuple[jax.Array, PyTree]:
    """2 x [3x3 convolution, batch norm, ReLU, 2x2 max-pooling], 8 units with ReLU, 1 output.

    It looks at the class's map and the query's, concatenated along the channels, for all pairs.

    Args:
      params, stats: from `init_relation_module`.
      classes: one feature map for each class [ways, height, width, channels].
      queries: feature maps [m, height, width, channels].
      batch_norm: a mode of `meta_jax.networks.layers`.
      train: whether the pairs' own statistics are taken (`batch` always takes them).
      padding: as in `init_relation_module`.

    Returns:
      The output before its sigmoid [m, ways], and the new statistics.
    """
    m, ways, channels = queries.shape[0], classes.shape[0], classes.shape[-1]
    # A convolution of two maps concatenated is the sum of two convolutions: of each map once, not
    # of each pair.
    kernel = params["block1"]["conv"]["kernel"]
    of_class = convolve(classes, kernel[:, :, :channels], padding=padding)
    of_query = convolve(queries, kernel[:, :, channels:], padding=padding)
    x = of_query[:, None] + of_class
    x, moments = pool_moments(
        x.reshape(m * ways, *x.shape[2:]), scale_sign(params["block1"]), pool=True
    )
    settings = {"batch_norm": batch_norm, "train": train}
    x, stats1 = normalise(params["block1"], stats["block1"], x, moments, **settings)
    x, stats2 = conv_block(
        params["block2"], stats["block2"], x, stride=1, pool=True, padding=padding, **settings
    )
    x = jax.nn.relu(linear(params["hidden"], x.reshape(m * ways, -1)))
    return linear(params["output"], x).reshape(m, ways), {"block1": stats1, "block2": stats2}


def _pooled(side: int, padding: str) -> int:
    """A side, in pixels, behind a 3x3 convolution and 2x2 pooling."""
    return (side - 2 if padding == "VALID" else side) // 2


def _init_block(key: jax.Array, inputs: int, features: int) -> tuple[PyTree, PyTree]:
    """A block whose kernel is normal with variance 2 / (9 * features), as the authors have it."""
    params, stats = init_conv_block(key, inputs, features)
    kernel = params["conv"]["kernel"]
    normal = jax.random.normal(key, kernel.shape, kernel.dtype)
    params["conv"]["kernel"] = jnp.sqrt(2 / (9 * features)).astype(kernel.dtype) * normal
    return params, stats


def _init_dense(key: jax.Array, inputs: int, outputs: int) -> PyTree:
    """Normal with standard deviation 0.01, and biases of one."""
    kernel = 0.01 * jax.random.normal(key, (inputs, outputs))
    return {"kernel": kernel, "bias": jnp.ones(outputs, kernel.dtype)}
