"""The sinusoid regression tasks of Finn et al. (2017), section 5.1."""

import jax
import jax.numpy as jnp

from meta_jax import registry
from meta_jax.core import Array, Batch, Episode, Objective, PyTree, Sample
from meta_jax.data.source import EpisodeSize, TaskSource, source_from_sampler


@registry.tasks("sinusoid", run={"shots": 10, "task_batch": 25})
def sinusoid(*, objective: Objective | str = "squared_error") -> TaskSource:
    """Builds the source of sinusoids of Finn et al. (2017): y = a sin(x - p).

    Amplitude a in U[0.1, 5], phase p in U[0, pi], x in U[-5, 5]; every split is drawn alike, and
    `ways` means nothing.

    A run has the paper's 10 shots and 25 tasks in a step, where no flag says otherwise.

    Args:
      objective: Objective of the tasks: 'squared_error', or somebody's own as
        package.module:attribute.
    """
    return source_from_sampler(_sample_of_size, objective)


def _sample_of_size(size: EpisodeSize, /) -> Sample:
    def sample(key: Array, data: PyTree = (), /) -> Episode:
        return sample_sinusoid(key, size.shots, size.queries)

    return sample


def sample_sinusoid(key: Array, shots: int, queries: int) -> Episode:
    """Draws one task y = a sin(x - p), amplitude a in U[0.1, 5], phase p in U[0, pi].

    Args:
      key: Random key.
      shots: Number of support points.
      queries: Number of query points.

    Returns:
      An episode with x [n, 1] in U[-5, 5] (radians) and y [n, 1].
    """
    amplitude_key, phase_key, x_key = jax.random.split(key, 3)
    amplitude = jax.random.uniform(amplitude_key, minval=0.1, maxval=5.0)
    phase = jax.random.uniform(phase_key, maxval=jnp.pi)
    x = jax.random.uniform(x_key, (shots + queries, 1), minval=-5.0, maxval=5.0)
    y = amplitude * jnp.sin(x - phase)
    return Episode(Batch(x[:shots], y[:shots]), Batch(x[shots:], y[shots:]))
