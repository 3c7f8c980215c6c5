"""The twins' network of Convolutional Siamese Networks (Koch, Zemel and Salakhutdinov 2015)."""

import jax
import jax.numpy as jnp

from meta_jax.core import Network, PyTree
from meta_jax.networks.convolution import convolve_pool_moments
from meta_jax.networks.layers import linear

# Side of the window, features, whether 2x2 max-pooling follows.
_BLOCKS = ((10, 64, True), (7, 128, True), (4, 128, True), (4, 256, False))
_SMALLEST = 65  # pixels a side that leave one place behind the last convolution


def koch(outputs: int = 4096) -> Network:
    """4 unpadded convolutions with ReLU, three of them max-pooled, then a sigmoid layer.

    10x10 to 64 channels, 7x7 to 128, 4x4 to 128, 4x4 to 256; no batch norm. Convolution weights
    begin as N(0, 0.01), those of the last layer as N(0, 0.2), biases as N(0.5, 0.01), given as
    mean and standard deviation.

    Args:
      outputs: units of the last layer.

    Returns:
      A stateless network from images [n, height, width, channels], 105x105x1 in the paper, to
      embeddings [n, outputs] in (0, 1).

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> network = koch()
      >>> x = jax.ShapeDtypeStruct((1, 105, 105, 1), jnp.float32)
      >>> params, _ = jax.eval_shape(network.init, jax.random.key(0), x)
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))  # and 4097 of the pairwise head
      38947648
    """

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        side = list(x.shape[1:3])
        if min(side) < _SMALLEST:
            raise ValueError(
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

    def apply(
        params: PyTree, state: PyTree, x: jax.Array, *, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, PyTree]:
        del key, train
        for i, (_, features, pool) in enumerate(_BLOCKS):
            layer = params[f"conv{i + 1}"]
            x, _ = convolve_pool_moments(
                x,
                layer["kernel"],
                jnp.ones(features, x.dtype),
                stride=1,
                pool=pool,
                padding="VALID",
            )
            x = jax.nn.relu(x + layer["bias"])
        return jax.nn.sigmoid(linear(params["output"], x.reshape(x.shape[0], -1))), state

    return Network(init, apply)


def _init_layer(key: jax.Array, shape: tuple[int, ...], deviation: float) -> PyTree:
    kernel_key, bias_key = jax.random.split(key)
    return {
        "kernel": deviation * jax.random.normal(kernel_key, shape),
        "bias": 0.5 + 0.01 * jax.random.normal(bias_key, shape[-1:]),
    }
