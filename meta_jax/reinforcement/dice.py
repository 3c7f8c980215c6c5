"""Surrogates whose derivatives of any order are those of an expected return."""

import chex
import jax
import jax.numpy as jnp

from meta_jax.core import Array


def dice_surrogate(
    log_probabilities: Array, advantages: Array, mask: Array, sampled: Array | None = None
) -> Array:
    """Loaded DiCE of one trajectory, to be maximised (Farquhar et al. 2019, equation 8).

    sum_t (magic(w_0 + ... + w_t) - magic(w_0 + ... + w_{t-1})) A_t with w_t = log pi(a_t) and
    magic(w) = exp(w - stop_gradient(w)). Its value is 0; its gradient is that of a policy gradient,
    sum_t A_t grad w_t, and its second derivatives are unbiased too, unlike those of the plain
    surrogate sum_t A_t w_t, which forget that the policy chooses what is sampled.

    Args:
      log_probabilities: Logarithms of the probabilities of the actions, [steps].
      advantages: Advantages, constants, [steps].
      mask: bool [steps], False for padding.
      sampled: Logarithms of the probabilities that the actions were sampled with, constants; by
        default `log_probabilities`. With those of an older policy, steps are weighed by importance.

    Examples:
      >>> w, a = jnp.array([-0.5, -1.0]), jnp.array([2.0, 3.0])
      >>> jax.grad(dice_surrogate)(w, a, jnp.ones(2, bool)).tolist()
      [2.0, 3.0]
    """
    _check_steps(log_probabilities, advantages, mask)
    ratio = jnp.where(mask, _log_ratio(log_probabilities, sampled), 0)
    upto = jnp.cumsum(ratio)
    difference = jnp.exp(upto) - jnp.exp(upto - ratio)
    return jnp.where(mask, difference * jax.lax.stop_gradient(advantages), 0).sum()


def lvc_surrogate(
    log_probabilities: Array, advantages: Array, mask: Array, sampled: Array | None = None
) -> Array:
    """The low-variance curvature surrogate of one trajectory (Rothfuss et al. 2019, equation 5).

    sum_t (magic(w_t) - 1) A_t, to be maximised. Its value and gradient are those of
    `dice_surrogate`. Its second derivatives leave out the products of different steps: they are
    biased, and vary far less in long trajectories.

    Args:
      log_probabilities: Logarithms of the probabilities of the actions, [steps].
      advantages: Advantages, constants, [steps].
      mask: bool [steps], False for padding.
      sampled: As in `dice_surrogate`.

    Examples:
      >>> w, a = jnp.array([-0.5, -1.0]), jnp.array([2.0, 3.0])
      >>> jax.hessian(lvc_surrogate)(w, a, jnp.ones(2, bool)).tolist()
      [[2.0, 0.0], [0.0, 3.0]]
    """
    _check_steps(log_probabilities, advantages, mask)
    ratio = jnp.exp(_log_ratio(log_probabilities, sampled))
    gain = (ratio - 1) * jax.lax.stop_gradient(advantages)
    return jnp.where(mask, gain, 0).sum()


def _check_steps(log_probabilities: Array, advantages: Array, mask: Array) -> None:
    chex.assert_rank([log_probabilities, advantages, mask], 1)
    chex.assert_equal_shape([log_probabilities, advantages, mask])


def _log_ratio(log_probabilities: Array, sampled: Array | None) -> Array:
    sampled = log_probabilities if sampled is None else sampled
    return log_probabilities - jax.lax.stop_gradient(sampled)
