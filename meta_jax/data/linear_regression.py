"""Linear regression in context (Garg et al. 2022)."""

import functools

import jax
import jax.numpy as jnp

from meta_jax import registry
from meta_jax.core import Array, Batch, Episode, Objective, PyTree, Sample
from meta_jax.data.source import EpisodeSize, SampleOfSize, TaskSource, source_from_sampler
from meta_jax.data.varying_sizes import with_random_shots
from meta_jax.linear_systems import eliminate
from meta_jax.objectives import Gaussian, as_objective, row_mask
from meta_jax.ranges import NotNegative, PositiveInt


@registry.tasks(
    "linear_regression", run={"shots": 16, "queries": 16, "task_batch": 64, "task_chunk": 64}
)
def linear_regression(
    *,
    dimensions: PositiveInt = 8,
    noise: NotNegative = 0.0,
    least_shots: PositiveInt = 1,
    objective: Objective | str = "squared_error",
) -> TaskSource:
    """Builds the source of linear functions y = w x of Garg et al. (2022), w and x in N(0, I).

    Least squares is shown beside a result, where there is noise ridge regression, which then is
    exact. All splits are drawn alike, and `ways` means nothing.

    Args:
      dimensions: Dimensions d of x; the paper has 20, and up to 2 d + 1 points.
      noise: Standard deviation of the noise of every target.
      least_shots: Smallest number of support points: each task has a random number of them, from
        this one up to `shots`, and padding in place of the others; `shots` of them where it is as
        large.
      objective: Objective of the tasks: squared_error, gaussian_likelihood, or somebody's own as
        package.module:attribute.

    Raises:
      UsageError: a number of dimensions or of points below one, or a negative noise.
    """
    objective = as_objective(objective)
    sample = functools.partial(_sample_of_size, dimensions, noise, least_shots)
    exact = functools.partial(_exact_of_size, sample, noise, objective)
    exact_answers = {"ridge_regression" if noise else "least_squares": exact}
    if objective.outputs == "gaussian" and not noise:
        exact_answers = {}  # without noise, targets that are known have no density
    return source_from_sampler(sample, objective, exact_answers=exact_answers)


def _sample_of_size(
    dimensions: int, noise: float, least_shots: int, size: EpisodeSize, /
) -> Sample:
    def sample(key: Array, data: PyTree = (), /) -> Episode:
        w_key, x_key, noise_key, shots_key = jax.random.split(key, 4)
        points = size.shots + size.queries
        w = jax.random.normal(w_key, (dimensions, 1))
        x = jax.random.normal(x_key, (points, dimensions))
        y = x @ w + noise * jax.random.normal(noise_key, (points, 1))
        support = Batch(x[: size.shots], y[: size.shots])
        query = Batch(x[size.shots :], y[size.shots :])
        return Episode(with_random_shots(shots_key, support, least_shots), query)

    return sample


def _exact_of_size(
    sample_of_size: SampleOfSize, noise: float, objective: Objective, size: EpisodeSize, /
) -> Sample:
    sample = sample_of_size(size)

    def exact(key: Array, data: PyTree = (), /) -> tuple[Episode, Array | Gaussian]:
        episode = sample(key, data)
        answer = posterior(noise, episode.support, episode.query.x)
        return episode, answer if objective.outputs == "gaussian" else answer.mean

    return exact


def posterior(noise: float, support: Batch, x: Array) -> Gaussian:
    """The exact posterior of targets y = w x + noise e with w in N(0, I), e in N(0, 1).

    Its mean is that of ridge regression with the penalty noise^2; without noise, of the smallest w
    that fits the targets.

    Args:
      noise: Standard deviation of the noise.
      support: Points [n, d] with targets [n, 1]; padding is passed over.
      x: Queries [m, d].

    Returns:
      Mean and standard deviation, [m, 1] each.
    """
    real = row_mask(support)[:, None]
    known, targets = jnp.where(real, support.x, 0), jnp.where(real, support.y, 0)
    gram = known @ known.T + noise**2 * jnp.eye(len(known))
    _, solved = eliminate(gram, jnp.concatenate([targets, known @ x.T], 1))
    seen, targets = solved[:, 1:], solved[:, :1]
    variance = (x**2).sum(1) - (seen**2).sum(0)
    return Gaussian(seen.T @ targets, jnp.sqrt(jnp.maximum(variance, 0) + noise**2)[:, None])
