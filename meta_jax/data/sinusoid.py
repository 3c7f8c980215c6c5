"""Sinusoids: the tasks of Finn et al. (2017), section 5.1, and those of Li et al. (2017)."""

import functools

import jax
import jax.numpy as jnp

from meta_jax import registry
from meta_jax.core import Array, Batch, Episode, Objective, PyTree, Sample
from meta_jax.data.source import EpisodeSize, SampleOfSize, TaskSource, source_from_sampler
from meta_jax.linear_systems import solve_positive_definite
from meta_jax.objectives import as_objective

_FREQUENCIES = (0.8, 1.2)


@registry.tasks("sinusoid", run={"shots": 10, "task_batch": 25})
def sinusoid(
    *, objective: Objective | str = "squared_error", vary_frequency: bool = False
) -> TaskSource:
    """Builds the source of sinusoids of Finn et al. (2017): y = a sin(x - p).

    Amplitude a in U[0.1, 5], phase p in U[0, pi], x in U[-5, 5]; every split is drawn alike, and
    `ways` means nothing.

    A run has the paper's 10 shots and 25 tasks in a step, where no flag says otherwise.

    Args:
      objective: Objective of the tasks: 'squared_error', or somebody's own as
        package.module:attribute.
      vary_frequency: Whether tasks differ in frequency too, y = a sin(w x + p) with w in
        U[0.8, 1.2], as in Meta-SGD (Li et al. 2017, section 4.1). The sinusoid that fits the
        support points best is then shown beside a result.
    """
    objective = as_objective(objective)
    sample_of_size = functools.partial(_sample_of_size, vary_frequency)
    exact = {}
    if vary_frequency and objective.outputs == "array":
        exact = {"best_sinusoid": functools.partial(_exact_of_size, sample_of_size)}
    return source_from_sampler(sample_of_size, objective, exact_answers=exact)


def _sample_of_size(vary_frequency: bool, size: EpisodeSize, /) -> Sample:
    def sample(key: Array, data: PyTree = (), /) -> Episode:
        return sample_sinusoid(key, size.shots, size.queries, vary_frequency=vary_frequency)

    return sample


def _exact_of_size(sample_of_size: SampleOfSize, size: EpisodeSize, /) -> Sample:
    sample = sample_of_size(size)

    def exact(key: Array, data: PyTree = (), /) -> tuple[Episode, Array]:
        episode = sample(key, data)
        return episode, best_sinusoid(episode.support, episode.query.x)

    return exact


def sample_sinusoid(
    key: Array, shots: int, queries: int, *, vary_frequency: bool = False
) -> Episode:
    """Draws one task y = a sin(x - p), amplitude a in U[0.1, 5], phase p in U[0, pi].

    Args:
      key: Random key.
      shots: Number of support points.
      queries: Number of query points.
      vary_frequency: Whether it is y = a sin(w x + p) with w in U[0.8, 1.2] instead.

    Returns:
      An episode with x [n, 1] in U[-5, 5] (radians) and y [n, 1].
    """
    amplitude_key, phase_key, x_key = jax.random.split(key, 3)
    amplitude = jax.random.uniform(amplitude_key, minval=0.1, maxval=5.0)
    phase = jax.random.uniform(phase_key, maxval=jnp.pi)
    x = jax.random.uniform(x_key, (shots + queries, 1), minval=-5.0, maxval=5.0)
    angle = x - phase
    if vary_frequency:
        low, high = _FREQUENCIES
        # Folded in, so that the other draws are the same with and without it.
        frequency_key = jax.random.fold_in(key, 0)
        angle = jax.random.uniform(frequency_key, minval=low, maxval=high) * x + phase
    y = amplitude * jnp.sin(angle)
    return Episode(Batch(x[:shots], y[:shots]), Batch(x[shots:], y[shots:]))


def best_sinusoid(support: Batch, x: Array) -> Array:
    """Answers of the sinusoid that has the least squared error on a support set.

    Of 801 frequencies in [0.8, 1.2], each with the amplitude and the phase that fit best.

    Args:
      support: Points [n, 1] with targets [n, 1], without padding.
      x: Queries [m, 1].

    Returns:
      [m, 1].
    """

    def waves(frequency: Array, x: Array) -> Array:
        return jnp.concatenate([jnp.sin(frequency * x), jnp.cos(frequency * x)], 1)

    def fit(frequency: Array) -> tuple[Array, Array]:
        basis = waves(frequency, support.x)
        weights = solve_positive_definite(basis.T @ basis + 1e-6 * jnp.eye(2), basis.T @ support.y)
        return ((basis @ weights - support.y) ** 2).sum(), weights

    frequencies = jnp.linspace(*_FREQUENCIES, 801)
    errors, weights = jax.vmap(fit)(frequencies)
    best = errors.argmin()
    return waves(frequencies[best], x) @ weights[best]
