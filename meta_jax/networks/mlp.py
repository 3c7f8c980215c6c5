"""The multi-layer perceptron."""

from collections.abc import Callable, Sequence

import jax

from meta_jax.core import Network, PyTree
from meta_jax.networks.layers import init_linear, linear


def mlp(
    widths: Sequence[int] = (40, 40), *, activation: Callable[[jax.Array], jax.Array] = jax.nn.relu
) -> Network:
    """Fully connected layers, each followed by a nonlinearity, on flattened inputs.

    With widths (40, 40) and a linear output it is the sinusoid network of Finn et al. (2017).

    Args:
      widths: units of every layer.
      activation: of every layer.

    Returns:
      A stateless network from [n, ...] to [n, widths[-1]].

    Raises:
      ValueError: where no width is given.
    """
    if not widths:
        raise ValueError("mlp needs at least one layer: give its widths, for example (40, 40)")

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        sizes = [x.reshape(x.shape[0], -1).shape[1], *widths]
        keys = jax.random.split(key, len(widths))
        return {f"layer{i + 1}": init_linear(k, *sizes[i : i + 2]) for i, k in enumerate(keys)}, {}

    def apply(
        params: PyTree, state: PyTree, x: jax.Array, *, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, PyTree]:
        del key, train
        x = x.reshape(x.shape[0], -1)
        for i in range(len(widths)):
            x = activation(linear(params[f"layer{i + 1}"], x))
        return x, state

    return Network(init, apply)
