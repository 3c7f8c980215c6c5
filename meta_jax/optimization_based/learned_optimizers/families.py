"""Families of problems that optimizers are trained and compared on."""

from typing import NamedTuple

import jax

from meta_jax.core import Batch, Criterion, Episode, Network, PyTree, cross_entropy
from meta_jax.networks.output_layer import with_output_layer


class ProblemFamily(NamedTuple):
    """A network to be trained, and on what; a task's support set is its training set.

    Tasks are episodes, drawn by any sampler: `sample_quadratic`, or `sample_episode`.
    """

    network: Network  # with its output layer; its initial parameters are drawn, not learned
    criterion: Criterion  # (outputs, y) -> (loss, metrics)
    minibatch: int | None = None  # examples drawn, with replacement, for a step; None: all


def sample_quadratic(
    key: jax.Array, data: PyTree = None, *, dimensions: int = 10, distribution: str = "normal"
) -> Episode:
    """A random linear system W theta = y, as an episode: W [D, D] are inputs, y [D, 1] targets.

    Args:
      key: of the draw.
      data: nothing; samplers have a second argument.
      dimensions: D.
      distribution: of all entries, 'normal' for N(0, 1) or 'uniform' for U[0, 1).

    Raises:
      ValueError: for another distribution.
    """
    del data
    draws = {"normal": jax.random.normal, "uniform": jax.random.uniform}
    if distribution not in draws:
        raise ValueError(f"unknown distribution '{distribution}': choose normal or uniform")
    w_key, y_key = jax.random.split(key)
    draw = draws[distribution]
    system = Batch(draw(w_key, (dimensions, dimensions)), draw(y_key, (dimensions, 1)))
    return Episode(system, system)


def quadratics() -> ProblemFamily:
    """f(theta) = ||W theta - y||^2 from theta ~ N(0, 0.01^2) (Andrychowicz et al. 2016, 3.1).

    Examples:
      >>> import jax.numpy as jnp
      >>> family, (system, _) = quadratics(), sample_quadratic(jax.random.key(0))
      >>> theta, _ = family.network.init(jax.random.key(1), system.x)
      >>> outputs, _ = family.network.apply(theta, {}, system.x, key=None, train=True)
      >>> loss, _ = family.criterion(outputs, system.y)
      >>> bool(jnp.allclose(loss, ((system.x @ theta[:, None] - system.y) ** 2).sum()))
      True
    """

    def init(key: jax.Array, x: jax.Array) -> tuple[PyTree, PyTree]:
        return 0.01 * jax.random.normal(key, (x.shape[1],), x.dtype), {}

    def apply(
        params: PyTree, state: PyTree, x: jax.Array, *, key: jax.Array | None, train: bool
    ) -> tuple[jax.Array, PyTree]:
        del key, train
        return (x @ params)[:, None], state

    def criterion(outputs: jax.Array, y: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss = ((outputs - y) ** 2).sum()
        return loss, {"squares": loss}

    return ProblemFamily(Network(init, apply), criterion)


def classification(network: Network, *, ways: int, minibatch: int | None) -> ProblemFamily:
    """A classifier's training by minibatches: tasks are episodes of `ways` classes.

    Args:
      network: the body; an output layer follows it.
      ways: classes of a task.
      minibatch: examples of a step.
    """
    return ProblemFamily(with_output_layer(network, ways), cross_entropy, minibatch)
