"""A linear baseline of the return, fitted to the trajectories of one task."""

import jax.numpy as jnp

from meta_jax.core import Array
from meta_jax.linear_systems import solve_positive_definite
from meta_jax.reinforcement.advantages import generalised_advantages


def linear_features(observations: Array, steps: Array) -> Array:
    """Features of the baseline of Duan et al. (2016): x, x^2, t, t^2, t^3 and 1, t in hundreds.

    Args:
      observations: [..., steps, size].
      steps: Number of each step in its episode, [..., steps].

    Returns:
      Features [..., steps, 2 size + 4].
    """
    t = (steps / 100)[..., None].astype(observations.dtype)
    x = jnp.clip(observations, -10, 10)
    return jnp.concatenate([x, x**2, t, t**2, t**3, jnp.ones_like(t)], -1)


def fit_baseline(features: Array, returns: Array, mask: Array, ridge: float = 1e-5) -> Array:
    """Ridge regression of the returns that are left on features.

    Args:
      features: [trajectories, steps, features].
      returns: Discounted sums of the rewards from each step on, [trajectories, steps].
      mask: bool [trajectories, steps], False for padding.
      ridge: Weight of the squared coefficients, for each step.

    Returns:
      The baseline of each step, [trajectories, steps].
    """
    real = jnp.where(mask[..., None], features, 0).reshape(-1, features.shape[-1])
    targets = jnp.where(mask, returns, 0).reshape(-1)
    gram = real.T @ real + ridge * mask.sum() * jnp.eye(real.shape[1], dtype=real.dtype)
    return features @ solve_positive_definite(gram, (real.T @ targets)[:, None])[:, 0]


def returns_to_go(rewards: Array, mask: Array, discount: float) -> Array:
    """Discounted sum of the rewards from each step on, [steps]."""
    zeros = jnp.zeros_like(rewards)
    return generalised_advantages(rewards, zeros, mask, discount=discount, gae_lambda=1.0)
