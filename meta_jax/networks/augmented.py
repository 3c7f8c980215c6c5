"""A network with slow and fast weights, by layer augmentation (Munkhdalai and Yu 2017)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.networks.convolution import convolve, max_pool
from meta_jax.shapes import with_rank


def init_augmented(
    key: Array, x: Array, features: int, hidden: int, ways: int, *, blocks: int = 5
) -> PyTree:
    """Slow weights: convolutions with bias, then a layer and a classifier without.

    Args:
      key: A random key.
      x: Images [n, height, width, channels].
      features: Channels of every convolution.
      hidden: Units of the layer behind them.
      ways: Outputs of the classifier.
      blocks: Number of convolutions.

    Returns:
      {'conv': {'layer1': {'kernel', 'bias'}, ...}, 'dense': {'hidden', 'classifier'}}.
    """
    keys = jax.random.split(key, blocks + 2)
    he = jax.nn.initializers.he_normal()
    conv, channels, (height, width) = {}, x.shape[-1], x.shape[1:3]
    for i, layer_key in enumerate(keys[:blocks]):
        kernel = he(layer_key, (3, 3, channels, features))
        conv[f"layer{i + 1}"] = {"kernel": kernel, "bias": jnp.zeros(features, kernel.dtype)}
        channels, height, width = features, -(-height // 2), -(-width // 2)
    dense = {
        "hidden": he(keys[-2], (height * width * features, hidden)),
        "classifier": jax.nn.initializers.glorot_uniform()(keys[-1], (hidden, ways)),
    }
    return {"conv": conv, "dense": dense}


def pool_up(x: Array) -> Array:
    """2x2 max-pooling with stride 2 that keeps odd borders: [n, h, w, c], h becomes ceil(h / 2).

    Examples:
      >>> pool_up(jnp.arange(9.0).reshape(1, 3, 3, 1))[0, :, :, 0].tolist()
      [[4.0, 5.0], [7.0, 8.0]]
    """
    borders = ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0))
    return max_pool(jnp.pad(x, borders, constant_values=-jnp.inf))


def represent(slow: PyTree, fast: PyTree | None, x: Array) -> Array:
    """The network up to its classifier, [n, hidden].

    A layer is relu(f(x, W)) + relu(f(x, W*)), summed after the nonlinearity and before pooling
    (section 2.4); the pooling is 2x2 and rounds up, which takes 28 pixels to 14, 7, 4, 2, 1.

    Args:
      slow: W, from `init_augmented`.
      fast: W*, of the same structure; None for the slow network alone.
      x: Images [n, height, width, channels].
    """

    for name in slow["conv"]:
        x = pool_up(_augmented(partial(_convolution, name), slow, fast, x))
    return _augmented(_hidden, slow, fast, x.reshape(x.shape[0], -1))


def _augmented(
    layer: Callable[[PyTree, Array], Array], slow: PyTree, fast: PyTree | None, x: Array
) -> Array:
    """relu(f(x, W)) + relu(f(x, W*)), f the layer: (weights, x) -> its output."""
    y = jax.nn.relu(layer(slow, x))
    return y if fast is None else y + jax.nn.relu(layer(fast, x))


def _convolution(name: str, weights: PyTree, x: Array) -> Array:
    layer = weights["conv"][name]
    y = convolve(x, layer["kernel"])
    return y + with_rank(layer["bias"], y)


def _hidden(weights: PyTree, x: Array) -> Array:
    return x @ weights["dense"]["hidden"]


def classify(slow: PyTree, fast: PyTree | None, x: Array) -> Array:
    """The whole network, [n, ways]; slow and fast logits are simply added."""
    z = represent(slow, fast, x)
    logits = z @ slow["dense"]["classifier"]
    return logits if fast is None else logits + z @ fast["dense"]["classifier"]
