"""Returns and advantages of a trial."""

import chex
import jax
import jax.numpy as jnp

from meta_jax.core import Array


def generalised_advantages(
    rewards: Array, values: Array, mask: Array, *, discount: float, gae_lambda: float
) -> Array:
    """Generalised advantage estimates over a whole trial (Schulman et al. 2016).

    A_t = sum_l (gamma lambda)^l delta_{t+l} with delta_t = r_t + gamma V_{t+1} - V_t, where t + 1
    is the next step that is not padding. Ends of episodes within the trial are no ends of the
    return; at the end of the trial V is 0.

    Args:
      rewards: Rewards [steps].
      values: Values V_t that a critic gives the steps, [steps].
      mask: bool [steps], False for padding.
      discount: Discount gamma.
      gae_lambda: Lambda, from 0 (the critic's opinion) to 1 (the observed return).

    Returns:
      Advantages [steps]; 0 in padding.

    Examples:
      >>> r, v = jnp.array([1.0, 0.0, 2.0]), jnp.zeros(3)
      >>> generalised_advantages(r, v, jnp.ones(3, bool), discount=0.5, gae_lambda=1.0).tolist()
      [1.5, 1.0, 2.0]
    """
    chex.assert_rank([rewards, values, mask], 1)
    chex.assert_equal_shape([rewards, values, mask])

    def back(carry: tuple[Array, Array], step: tuple) -> tuple[tuple[Array, Array], Array]:
        next_value, next_advantage = carry
        reward, value, real = step
        advantage = reward + discount * next_value - value
        advantage += discount * gae_lambda * next_advantage
        after = jnp.where(real, value, next_value), jnp.where(real, advantage, next_advantage)
        return after, jnp.where(real, advantage, 0)

    zero = jnp.zeros((), values.dtype)
    _, advantages = jax.lax.scan(back, (zero, zero), (rewards, values, mask), reverse=True)
    return advantages


def standardised(advantages: Array, mask: Array) -> Array:
    """Advantages of mean 0 and deviation 1 over all steps that are not padding; 0 in padding.

    Args:
      advantages: Advantages of any shape.
      mask: bool of the same shape, False for padding.
    """
    count = mask.sum()
    mean = jnp.where(mask, advantages, 0).sum() / count
    centred = jnp.where(mask, advantages - mean, 0)
    return centred / (jnp.sqrt((centred**2).sum() / count) + 1e-8)
