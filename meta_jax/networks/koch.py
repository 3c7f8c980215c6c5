"""The twins' network of Convolutional Siamese Networks (Koch, Zemel and Salakhutdinov 2015)."""

from functools import partial

import jax

from meta_jax import registry
from meta_jax.core import Array, MomentsUse, Network, PyTree
from meta_jax.lookup import UsageError
from meta_jax.networks.convolution import convolve, max_pool
from meta_jax.networks.layers import linear
from meta_jax.ranges import PositiveInt

# Side of the window, features, whether 2x2 max-pooling follows.
_BLOCKS = ((10, 64, True), (7, 128, True), (4, 128, True), (4, 256, False))
_SMALLEST = 65  # pixels a side that leave one place behind the last convolution


@registry.network("koch")
def koch(outputs: PositiveInt = 4096) -> Network:
    """Builds Koch's network: 4 unpadded convolutions with ReLU, then a sigmoid layer.

    10x10 to 64 channels, 7x7 to 128, 4x4 to 128, 4x4 to 256, the first three max-pooled; no
    normalisation. Convolution weights begin as N(0, 0.01), those of the last layer as N(0, 0.2),
    biases as N(0.5, 0.01), given as mean and standard deviation.

    Args:
      outputs: Units of the last layer.

    Returns:
      A stateless network from images [n, height, width, channels], 105x105x1 in the paper, to
      embeddings [n, outputs] in (0, 1).

    Raises:
      UsageError: outputs below one.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> network = koch()
      >>> x = jax.ShapeDtypeStruct((1, 105, 105, 1), jnp.float32)
      >>> params, _ = jax.eval_shape(network.init, jax.random.key(0), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))  # and 4097 of the pairwise head
      38947648
    """
    return Network(partial(_init, outputs), _apply)


def _init(outputs: int, key: Array, x: Array) -> tuple[PyTree, PyTree]:
    side = list(x.shape[1:3])
    if min(side) < _SMALLEST:
        raise UsageError(
            f"images of {side[0]}x{side[1]} pixels are too small for koch: use at least "
            f"{_SMALLEST}x{_SMALLEST}, 105x105 in the paper"
        )
    params, channels = {}, x.shape[3]
    for i, (window, features, pool) in enumerate(_BLOCKS):
        key, block_key = jax.random.split(key)
        shape = (window, window, channels, features)
        params[f"conv{i + 1}"] = _init_layer(block_key, shape, 0.01)
        side = [(s - window + 1) // (2 if pool else 1) for s in side]
        channels = features
    params["output"] = _init_layer(key, (side[0] * side[1] * channels, outputs), 0.2)
    return params, {}


def _apply(
    params: PyTree,
    state: PyTree,
    x: Array,
    *,
    key: Array | None,
    train: bool,
    moments: MomentsUse = "stored",
    mask: Array | None = None,
) -> tuple[Array, PyTree]:
    del key, train, moments, mask  # there is neither dropout nor normalisation
    for i, (_, _, pool) in enumerate(_BLOCKS):
        layer = params[f"conv{i + 1}"]
        x = convolve(x, layer["kernel"], padding="VALID")
        x = jax.nn.relu((max_pool(x) if pool else x) + layer["bias"])
    return jax.nn.sigmoid(linear(params["output"], x.reshape(x.shape[0], -1))), state


def _init_layer(key: Array, shape: tuple[int, ...], deviation: float) -> PyTree:
    kernel_key, bias_key = jax.random.split(key)
    return {
        "kernel": deviation * jax.random.normal(kernel_key, shape),
        "bias": 0.5 + 0.01 * jax.random.normal(bias_key, shape[-1:]),
    }
