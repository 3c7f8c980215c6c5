import jax
import jax.numpy as jnp
import numpy as np

from meta_jax.reinforcement.advantages import generalised_advantages

REWARDS = np.random.default_rng(0).normal(size=7)
VALUES = np.random.default_rng(1).normal(size=7)
MASK = np.array([True, True, False, False, True, True, True])


def by_a_loop(rewards, values, discount, gae_lambda):
    n = len(rewards)
    following = np.append(values[1:], 0)
    deltas = rewards + discount * following - values
    return [
        sum((discount * gae_lambda) ** (j - i) * deltas[j] for j in range(i, n)) for i in range(n)
    ]


def advantages(mask, **settings):
    return jax.jit(lambda *a: generalised_advantages(*a, **settings))(REWARDS, VALUES, mask)


def test_they_are_the_discounted_sum_of_errors(x64):
    settings = {"discount": 0.9, "gae_lambda": 0.7}
    expected = by_a_loop(REWARDS, VALUES, **settings)
    np.testing.assert_allclose(advantages(np.ones(7, bool), **settings), expected, atol=1e-12)


def test_padding_is_passed_over(x64):
    settings = {"discount": 0.9, "gae_lambda": 0.7}
    found = np.asarray(advantages(MASK, **settings))
    expected = by_a_loop(REWARDS[MASK], VALUES[MASK], **settings)
    np.testing.assert_allclose(found[MASK], expected, atol=1e-12)
    assert not found[~MASK].any()


def test_with_lambda_one_they_are_returns_less_values(x64):
    found = advantages(np.ones(7, bool), discount=0.5, gae_lambda=1.0)
    returns = [sum(0.5 ** (j - i) * REWARDS[j] for j in range(i, 7)) for i in range(7)]
    np.testing.assert_allclose(found + jnp.asarray(VALUES), returns, atol=1e-12)
