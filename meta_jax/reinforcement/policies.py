"""Policies: distributions over actions, by the outputs of a network."""

import math

import jax
import jax.numpy as jnp

from meta_jax.core import Array
from meta_jax.reinforcement.environment import Actions, Discrete

_LOG_2_PI = math.log(2 * math.pi)


def num_outputs(actions: Actions) -> int:
    """Numbers that describe a distribution over actions: logits, or means and log scales."""
    return actions.n if isinstance(actions, Discrete) else 2 * actions.size


def sample_action(key: Array, outputs: Array, actions: Actions) -> Array:
    """Draws an action.

    Args:
      key: Random key.
      outputs: Logits [n] of a categorical policy; or means and logarithms of the scales, [2 size],
        of a Gaussian one.
      actions: Actions there are.

    Returns:
      An int32 scalar, or floats [size].
    """
    if isinstance(actions, Discrete):
        return jax.random.categorical(key, outputs).astype(jnp.int32)
    mean, log_scale = jnp.split(outputs, 2)
    return mean + jnp.exp(log_scale) * jax.random.normal(key, mean.shape, mean.dtype)


def log_probability(outputs: Array, action: Array, actions: Actions) -> Array:
    """Logarithm of the probability (or density) of an action, a scalar.

    Args:
      outputs: As in `sample_action`.
      action: The action.
      actions: Actions there are.

    Examples:
      >>> float(jnp.exp(log_probability(jnp.zeros(4), jnp.array(2), Discrete(4))))
      0.25
    """
    if isinstance(actions, Discrete):
        return jax.nn.log_softmax(outputs)[action]
    mean, log_scale = jnp.split(outputs, 2)
    deviation = (action - mean) * jnp.exp(-log_scale)
    return -(0.5 * deviation**2 + log_scale + 0.5 * _LOG_2_PI).sum()


def entropy(outputs: Array, actions: Actions) -> Array:
    """Entropy of the policy in nats, a scalar.

    Args:
      outputs: As in `sample_action`.
      actions: Actions there are.
    """
    if isinstance(actions, Discrete):
        log_p = jax.nn.log_softmax(outputs)
        return -(jnp.exp(log_p) * log_p).sum()
    _, log_scale = jnp.split(outputs, 2)
    return (log_scale + 0.5 * (1 + _LOG_2_PI)).sum()
