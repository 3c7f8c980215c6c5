"""Families of problems that optimizers are trained and compared on."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import chex
import jax

from meta_jax import registry
from meta_jax.core import Array, Batch, Network, PyTree
from meta_jax.lookup import UsageError
from meta_jax.networks.conv4 import strided_conv4
from meta_jax.networks.mlp import mlp
from meta_jax.networks.output_layer import with_output_layer
from meta_jax.objectives import check_batch, tree_rows
from meta_jax.ranges import PositiveInt


class ProblemFamily(NamedTuple):
    """A kind of network to be trained on a task's support set, and how.

    The tasks, and what their objective asks of the network, come from a source of tasks.

    Attributes:
      network: Function from a training set to the network, with its output layer, that is trained
        on it. The network's initial parameters are drawn, not learned.
      minibatch: Number of examples drawn, with replacement, for a step; None for all of them.
      tasks: Name of the source of tasks that it is used with by default.
    """

    network: Callable[[Batch], Network]
    minibatch: int | None = None
    tasks: str = "glyphs"


def network_family(network: Network, *, minibatch: int | None = None) -> ProblemFamily:
    """Builds the problems of training a network with an output layer.

    Args:
      network: Body of the network; a linear layer as wide as a task's targets follows it.
      minibatch: Number of examples drawn, with replacement, for a step; None for all of them.

    Returns:
      The family.

    Raises:
      UsageError: the minibatch is empty.
    """
    if minibatch is not None and minibatch < 1:
        raise UsageError(f"minibatch {minibatch} must be at least 1")
    return ProblemFamily(
        lambda batch: with_output_layer(network, batch.y.shape[-1]), minibatch=minibatch
    )


@registry.component("family", "mlp")
def mlp_family(
    *,
    width: PositiveInt = 20,
    depth: PositiveInt = 1,
    activation: Literal["sigmoid", "relu", "tanh"] = "sigmoid",
    minibatch: PositiveInt | None = 64,
) -> ProblemFamily:
    """Builds the problems of training multi-layer perceptrons.

    The defaults are the networks of Andrychowicz et al. (2016), section 3.2.

    Args:
      width: Number of units of each hidden layer.
      depth: Number of hidden layers.
      activation: Nonlinearity of the hidden layers.
      minibatch: Number of examples drawn for a step; None for all of them.

    Returns:
      The family.

    Raises:
      UsageError: there is no layer or unit, or the activation is unknown.
    """
    return network_family(mlp((width,) * depth, activation=activation), minibatch=minibatch)


@registry.component("family", "convnet")
def convnet_family(
    *, features: PositiveInt = 20, minibatch: PositiveInt | None = 64
) -> ProblemFamily:
    """Builds the problems of training convolutional networks of four blocks on images.

    Args:
      features: Number of channels of each block.
      minibatch: Number of examples drawn for a step; None for all of them.

    Returns:
      The family.
    """
    return network_family(strided_conv4(features, normalisation="batch"), minibatch=minibatch)


def draw_minibatch(key: Array, batch: Batch, size: int) -> Batch:
    """Draws examples with replacement, among those that are not padding.

    Args:
      key: Random key.
      batch: Examples, leaves [n, ...].
      size: Number of examples to draw.

    Returns:
      A batch of `size` rows without padding.

    Examples:
      >>> import jax.numpy as jnp
      >>> batch = Batch(jnp.arange(3.0)[:, None], jnp.ones((3, 1)), jnp.array([False, True, False]))
      >>> draw_minibatch(jax.random.key(0), batch, 2).x.tolist()
      [[1.0], [1.0]]
    """
    chex.assert_scalar_positive(size)
    check_batch(batch, "the training set")
    x, y, mask = batch
    if mask is None:
        chosen = jax.random.randint(key, (size,), 0, tree_rows(x))
    else:
        # Real rows come first: padding does not change which of them are drawn.
        real = (~mask).argsort(stable=True)
        chosen = real[jax.random.randint(key, (size,), 0, mask.sum())]

    def rows(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[chosen], tree)

    return Batch(rows(x), rows(y))
