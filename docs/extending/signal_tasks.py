"""A source of tasks of one's own: one-dimensional signals, told apart by their shape.

    python -m experiments.train --tasks=docs.extending.signal_tasks:signals --learner=prototypical \
        --network=mlp --workdir=runs/signals
"""

import jax
import jax.numpy as jnp

import meta_jax as mj
from meta_jax.data import EpisodeSize, TaskSource


def sample_signals(key: jax.Array, size: EpisodeSize, length: int, noise: float) -> mj.Episode:
    """Draws one episode of classes of periodic signals, each class with overtones of its own.

    Args:
      key: A random key.
      size: Ways, shots and queries.
      length: Samples of a signal.
      noise: Standard deviation of what is added to each sample.

    Returns:
      An episode with x [n, length] and one-hot y [n, ways].
    """
    overtone_key, phase_key, noise_key = jax.random.split(key, 3)
    each = size.shots + size.queries
    overtones = jax.random.normal(overtone_key, (size.ways, 1, 5, 1))
    phases = jax.random.uniform(phase_key, (size.ways, each, 1, 1), maxval=0.3)
    angles = 2 * jnp.pi * (jnp.arange(length) / length + phases) * jnp.arange(1, 6)[:, None]
    signals = (overtones * jnp.sin(angles)).sum(2)
    signals += noise * jax.random.normal(noise_key, signals.shape)
    labels = jnp.broadcast_to(jnp.eye(size.ways)[:, None], (size.ways, each, size.ways))

    def batch(part: slice) -> mj.Batch:
        return mj.Batch(
            signals[:, part].reshape(-1, length), labels[:, part].reshape(-1, size.ways)
        )

    return mj.Episode(batch(slice(size.shots)), batch(slice(size.shots, None)))


@mj.registry.tasks("signals")
def signals(
    *, length: int = 64, noise: float = 0.5, objective: str = "cross_entropy"
) -> TaskSource:
    """Builds a source of classification tasks on noisy periodic signals.

    Args:
      length: Samples of a signal.
      noise: Standard deviation of the noise.
      objective: Objective of the tasks.
    """

    def sampler(size: EpisodeSize) -> mj.core.Sample:
        return lambda key, data: sample_signals(key, size, length, noise)

    return mj.data.source_from_sampler(sampler, objective=objective)
