"""The multi-layer perceptron."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from meta_jax import registry
from meta_jax.core import Array, MomentsUse, Network, PyTree
from meta_jax.lookup import UsageError
from meta_jax.networks.layers import init_linear, linear
from meta_jax.ranges import PositiveInts

Activation = Callable[[Array], Array]
_ACTIVATIONS: dict[str, Activation] = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}


@registry.network("mlp")
def mlp(
    widths: PositiveInts = (40, 40),
    *,
    activation: Literal["relu", "tanh", "sigmoid", "elu", "gelu", "silu"] | Activation = "relu",
) -> Network:
    """Builds a multi-layer perceptron: linear layers, each followed by a nonlinearity.

    With widths (40, 40) and a linear output it is the sinusoid network of Finn et al. (2017).
    Inputs are flattened.

    Args:
      widths: Units of every layer.
      activation: Nonlinearity of every layer; in Python also a function of an array.

    Returns:
      A stateless network from [n, ...] to [n, widths[-1]].

    Raises:
      UsageError: no width is given, a width is below one, or an unknown activation.
    """
    widths = tuple(widths)
    if not widths:
        raise UsageError("mlp without a layer: give widths, for example (40, 40)")
    if isinstance(activation, str):
        if activation not in _ACTIVATIONS:
            raise UsageError(
                f"unknown activation '{activation}': choose one of {', '.join(_ACTIVATIONS)}"
            )
        activation = _ACTIVATIONS[activation]
    return Network(partial(_init, widths), partial(_apply, activation))


def _init(widths: tuple[int, ...], key: Array, x: Array) -> tuple[PyTree, PyTree]:
    sizes = (x.reshape(x.shape[0], -1).shape[1], *widths)
    keys = jax.random.split(key, len(widths))
    return {f"layer{i + 1}": init_linear(k, *sizes[i : i + 2]) for i, k in enumerate(keys)}, {}


def _apply(
    activation: Activation,
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
    x = x.reshape(x.shape[0], -1)
    for i in range(len(params)):
        x = activation(linear(params[f"layer{i + 1}"], x))
    return x, state
