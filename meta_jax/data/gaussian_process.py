"""Functions drawn from Gaussian processes, and their exact posterior."""

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from meta_jax import registry
from meta_jax.core import Array, Batch, Episode, Objective, PyTree, Sample
from meta_jax.data.source import EpisodeSize, TaskSource, source_from_sampler
from meta_jax.data.varying_sizes import with_random_shots
from meta_jax.linear_systems import eliminate
from meta_jax.lookup import UsageError
from meta_jax.objectives import Gaussian, as_objective, row_mask
from meta_jax.ranges import Positive, PositiveInt

KernelName = Literal["rbf", "matern52", "periodic"]


class Process(NamedTuple):
    """A distribution of Gaussian processes; the arguments of `gp` describe it."""

    kernel: KernelName
    noise: float
    least_length: float
    largest_length: float


class Hyperparameters(NamedTuple):
    """What a task has drawn of a kernel, scalars."""

    length: Array
    scale: Array
    period: Array


@registry.tasks("gp", run={"shots": 47, "queries": 25, "task_batch": 32, "task_chunk": 32})
def gp(
    *,
    kernel: KernelName = "rbf",
    noise: Positive = 0.02,
    least_length: Positive = 0.6,
    largest_length: Positive = 1.0,
    least_shots: PositiveInt = 3,
    objective: Objective | str = "gaussian_likelihood",
) -> TaskSource:
    """Builds the source of functions drawn from Gaussian processes.

    Every task draws the hyper-parameters of its kernel anew: a length scale, an output scale in
    U[0.1, 1), for the periodic kernel a period in U[0.1, 0.5); and points x in U[-2, 2]. The
    published comparisons of neural processes are on these tasks (Nguyen and Grover 2022, section
    5.1); their code draws length scales in U[0.1, 0.6), their paper names U[0.6, 1).

    The exact posterior, which knows the hyper-parameters, is shown beside a result. All splits are
    drawn alike, and `ways` means nothing.

    Args:
      kernel: Kernel: rbf (squared exponential), matern52, or periodic.
      noise: Standard deviation of the noise of every point.
      least_length: Smallest length scale.
      largest_length: Largest length scale.
      least_shots: Smallest number of support points: each task has a random number of them, from
        this one up to `shots`, and padding in place of the others; `shots` of them where it is as
        large.
      objective: Objective of the tasks: gaussian_likelihood, squared_error, or somebody's own as
        package.module:attribute.

    Raises:
      UsageError: an unknown kernel, or a setting that is out of range.
    """
    if kernel not in get_args(KernelName):
        raise UsageError(f"unknown kernel '{kernel}': choose one of {', '.join(_KERNELS)}")
    if least_length > largest_length:
        raise UsageError(
            f"length scales from {least_length} to {largest_length} are no interval: use for "
            "example 0.6 and 1"
        )
    objective = as_objective(objective)
    process = Process(kernel, noise, least_length, largest_length)
    sample = functools.partial(_sample_of_size, process, least_shots)
    exact = functools.partial(_exact_of_size, process, least_shots, objective)
    return source_from_sampler(sample, objective, exact_answers={"exact_posterior": exact})


def _rbf(hyper: Hyperparameters, difference: Array) -> Array:
    return jnp.exp(-0.5 * (difference / hyper.length) ** 2)


def _matern52(hyper: Hyperparameters, difference: Array) -> Array:
    r = jnp.sqrt(5.0) * abs(difference) / hyper.length
    return (1 + r + r**2 / 3) * jnp.exp(-r)


def _periodic(hyper: Hyperparameters, difference: Array) -> Array:
    return jnp.exp(-2 * (jnp.sin(jnp.pi * difference / hyper.period) / hyper.length) ** 2)


_KERNELS = {"rbf": _rbf, "matern52": _matern52, "periodic": _periodic}


def covariance(kernel: KernelName, hyper: Hyperparameters, a: Array, b: Array) -> Array:
    """Covariances of function values without noise.

    Args:
      kernel: Name of the kernel.
      hyper: Length scale, output scale and period.
      a: Points [n, 1].
      b: Points [m, 1].

    Returns:
      [n, m].
    """
    return hyper.scale**2 * _KERNELS[kernel](hyper, a - b[:, 0][None])


def gp_posterior(
    kernel: KernelName, hyper: Hyperparameters, noise: float, support: Batch, x: Array
) -> Gaussian:
    """The exact posterior of noisy targets under a Gaussian process with known hyper-parameters.

    Args:
      kernel: Name of the kernel.
      hyper: Length scale, output scale and period.
      noise: Standard deviation of the noise.
      support: Points [n, 1] with targets [n, 1]; padding is passed over.
      x: Queries [m, 1].

    Returns:
      Mean and standard deviation of the queries' targets, [m, 1] each.
    """
    real = row_mask(support)
    eye = jnp.eye(len(real))
    # A row of padding is a point of its own, that no other varies with.
    both = real[:, None] & real
    known = jnp.where(both, covariance(kernel, hyper, support.x, support.x), 0) + noise**2 * eye
    known = jnp.where(both | (eye == 0), known, 1.0)
    between = jnp.where(real[:, None], covariance(kernel, hyper, support.x, x), 0)
    targets = jnp.where(real[:, None], support.y, 0)
    _, solved = eliminate(known, jnp.concatenate([between, targets], 1))
    explained, targets = solved[:, :-1], solved[:, -1]
    variance = hyper.scale**2 - (explained**2).sum(0)
    scale = jnp.sqrt(jnp.maximum(variance, 0) + noise**2)
    return Gaussian((explained.T @ targets)[:, None], scale[:, None])


def draw_task(
    key: Array, process: Process, size: EpisodeSize, least_shots: int
) -> tuple[Episode, Hyperparameters]:
    """Draws an episode of noisy points of one function, and the hyper-parameters behind it."""
    keys = jax.random.split(key, 6)
    uniform = jax.random.uniform
    hyper = Hyperparameters(
        uniform(keys[0], minval=process.least_length, maxval=process.largest_length),
        uniform(keys[1], minval=0.1, maxval=1.0),
        uniform(keys[2], minval=0.1, maxval=0.5),
    )
    points = size.shots + size.queries
    x = uniform(keys[3], (points, 1), minval=-2.0, maxval=2.0)
    cov = covariance(process.kernel, hyper, x, x) + process.noise**2 * jnp.eye(points)
    factor, _ = eliminate(cov, jnp.zeros((points, 0)))
    y = factor @ jax.random.normal(keys[4], (points, 1))
    support = with_random_shots(keys[5], Batch(x[: size.shots], y[: size.shots]), least_shots)
    return Episode(support, Batch(x[size.shots :], y[size.shots :])), hyper


def _sample_of_size(process: Process, least_shots: int, size: EpisodeSize, /) -> Sample:
    def sample(key: Array, data: PyTree = (), /) -> Episode:
        return draw_task(key, process, size, least_shots)[0]

    return sample


def _exact_of_size(
    process: Process, least_shots: int, objective: Objective, size: EpisodeSize, /
) -> Sample:
    def exact(key: Array, data: PyTree = (), /) -> tuple[Episode, Array | Gaussian]:
        episode, hyper = draw_task(key, process, size, least_shots)
        x = episode.query.x
        posterior = gp_posterior(process.kernel, hyper, process.noise, episode.support, x)
        return episode, posterior if objective.outputs == "gaussian" else posterior.mean

    return exact
