"""Random linear systems: the quadratics of Andrychowicz et al. (2016), section 3.1."""

import functools
from typing import Literal, get_args

import jax

from meta_jax import registry
from meta_jax.core import (
    Array,
    Batch,
    Episode,
    Metrics,
    MomentsUse,
    Network,
    Objective,
    PyTree,
    Sample,
)
from meta_jax.data.source import EpisodeSize, TaskSource, source_from_sampler
from meta_jax.lookup import UsageError
from meta_jax.objectives import check_outputs, without_padding
from meta_jax.optimization_based.learned_optimizers.families import ProblemFamily
from meta_jax.ranges import PositiveInt

Distribution = Literal["normal", "uniform"]


def sum_of_squares_loss(
    outputs: Array, y: Array, mask: Array | None = None
) -> tuple[Array, Metrics]:
    """Sum of squared errors over rows and dimensions.

    Args:
      outputs: [n, D].
      y: Real targets [n, D].
      mask: Bool [n], False for rows of padding, which do not count.

    Returns:
      The loss and the metric `squares`, which is the loss.

    Raises:
      ValueError: outputs and targets differ in shape.
    """
    check_outputs(outputs, y)
    loss = (without_padding(outputs - y, mask) ** 2).sum()
    return loss, {"squares": loss}


#: The objective of `quadratics`: the sum of squared differences.
sum_of_squares = Objective(
    sum_of_squares_loss,
    "squares",
    maximise=False,
    kind="regression",
    name=f"{__name__}:sum_of_squares",
)


def sample_quadratic(
    key: Array, data: PyTree = (), /, *, dimensions: int = 10, distribution: Distribution = "normal"
) -> Episode:
    """Draws a linear system W theta = y as an episode, whose support and query are the same.

    Args:
      key: Random key.
      data: Nothing; samplers have a second argument.
      dimensions: Number D of unknowns, and of equations.
      distribution: Distribution of all entries, 'normal' for N(0, 1) or 'uniform' for U[0, 1).

    Returns:
      An episode with inputs W [D, D] and targets y [D, 1].

    Raises:
      UsageError: an unknown distribution, or no dimension.
    """
    del data
    if distribution not in get_args(Distribution):
        raise UsageError(f"unknown distribution '{distribution}': choose normal or uniform")
    if dimensions < 1:
        raise UsageError(f"dimensions {dimensions} must be at least 1")
    w_key, y_key = jax.random.split(key)
    draw = jax.random.normal if distribution == "normal" else jax.random.uniform
    system = Batch(draw(w_key, (dimensions, dimensions)), draw(y_key, (dimensions, 1)))
    return Episode(system, system)


@registry.tasks("quadratics")
def quadratic_tasks(
    *, dimensions: PositiveInt = 10, distribution: Distribution = "normal"
) -> TaskSource:
    """Builds the source of random quadratics ||W theta - y||^2.

    Every split is drawn alike, and the sizes of an episode mean nothing.

    Args:
      dimensions: Number of unknowns, and of equations.
      distribution: Distribution of all entries, 'normal' for N(0, 1) or 'uniform' for U[0, 1).
    """
    sample = functools.partial(sample_quadratic, dimensions=dimensions, distribution=distribution)
    # Refused here, not when the first task is drawn.
    jax.eval_shape(sample, jax.random.key(0))

    def sample_of_size(size: EpisodeSize, /) -> Sample:
        del size
        return sample

    return source_from_sampler(sample_of_size, sum_of_squares)


@registry.component("family", "quadratics")
def quadratics() -> ProblemFamily:
    """Builds the problems of solving W theta = y, from theta ~ N(0, 0.01^2).

    f(theta) = ||W theta - y||^2 (Andrychowicz et al. 2016, section 3.1).

    Examples:
      >>> import jax.numpy as jnp
      >>> family, (system, _) = quadratics(), sample_quadratic(jax.random.key(0))
      >>> network = family.network(system)
      >>> theta, _ = network.init(jax.random.key(1), system.x)
      >>> outputs, _ = network.apply(theta, {}, system.x, key=None, train=True)
      >>> loss, _ = sum_of_squares.loss(outputs, system.y, None)
      >>> bool(jnp.allclose(loss, ((system.x @ theta[:, None] - system.y) ** 2).sum()))
      True
    """
    return ProblemFamily(_linear_system, minibatch=None, tasks="quadratics")


def _linear_system(batch: Batch) -> Network:
    x, y = (tuple(getattr(part, "shape", ())) for part in (batch.x, batch.y))
    if len(x) != 2 or y != (x[0], 1):
        raise UsageError(
            f"quadratics need systems W [n, D] and y [n, 1], not x {list(x)} and y {list(y)}: use "
            "the tasks 'quadratics', or another family"
        )
    return Network(_init_unknowns, _apply_system)


def _init_unknowns(key: Array, x: PyTree, /) -> tuple[PyTree, PyTree]:
    return 0.01 * jax.random.normal(key, (x.shape[1],), x.dtype), {}


def _apply_system(
    params: PyTree,
    state: PyTree,
    x: PyTree,
    /,
    *,
    key: Array | None,
    train: bool,
    moments: MomentsUse = "stored",
    mask: Array | None = None,
) -> tuple[Array, PyTree]:
    del key, train, moments, mask
    return (x @ params)[:, None], state
