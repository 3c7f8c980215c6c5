"""The sinusoid regression tasks of Finn et al. (2017), section 5.1."""

import jax
import jax.numpy as jnp

from meta_jax.core import Batch, Episode


def sample_sinusoid(key: jax.Array, shots: int, queries: int) -> Episode:
    """Draws one task y = a sin(x - p), amplitude a in U[0.1, 5], phase p in U[0, pi].

    Args:
      key: a random key.
      shots: support points.
      queries: query points.

    Returns:
      An episode with x [n, 1] in U[-5, 5] (radians) and y [n, 1].
    """
    amplitude_key, phase_key, x_key = jax.random.split(key, 3)
    amplitude = jax.random.uniform(amplitude_key, minval=0.1, maxval=5.0)
    phase = jax.random.uniform(phase_key, maxval=jnp.pi)
    x = jax.random.uniform(x_key, (shots + queries, 1), minval=-5.0, maxval=5.0)
    y = amplitude * jnp.sin(x - phase)
    return Episode(Batch(x[:shots], y[:shots]), Batch(x[shots:], y[shots:]))
