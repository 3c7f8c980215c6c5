import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.reinforcement.baselines import fit_baseline, linear_features, returns_to_go
from meta_jax.reinforcement.dice import dice_surrogate, lvc_surrogate

pytestmark = pytest.mark.usefixtures("x64")

THETA, REWARDS, RATE = jnp.array([0.2, -0.1, 0.4]), jnp.array([1.0, 0.0, 0.5]), 0.5


def mean_reward(theta):
    return jax.nn.softmax(theta) @ REWARDS


def expected(surrogate, theta):
    """A surrogate in expectation over one pull of three arms."""
    p = jax.lax.stop_gradient(jax.nn.softmax(theta))
    log_p = jax.nn.log_softmax(theta)[:, None]
    return jax.vmap(surrogate)(log_p, (p * REWARDS)[:, None], jnp.ones((3, 1), bool)).sum()


def expected_plain(theta):
    p = jax.lax.stop_gradient(jax.nn.softmax(theta))
    return (p * REWARDS * jax.nn.log_softmax(theta)).sum()


def meta_gradient(surrogate):
    def after(theta):
        return mean_reward(theta + RATE * jax.grad(surrogate)(theta))

    return jax.jit(jax.grad(after))(THETA)


@pytest.mark.parametrize("surrogate", [dice_surrogate, lvc_surrogate])
def test_the_meta_gradient_of_a_bandit_is_exact(surrogate):
    exact = meta_gradient(mean_reward)
    np.testing.assert_allclose(exact, [0.161723, -0.126879, -0.034844], atol=1e-6)
    found = meta_gradient(functools.partial(expected, surrogate))
    np.testing.assert_allclose(found, exact, atol=1e-12)
    plain = meta_gradient(expected_plain)
    np.testing.assert_allclose(plain, [0.143925, -0.121556, -0.022369], atol=1e-6)


@pytest.mark.parametrize("surrogate", [dice_surrogate, lvc_surrogate])
def test_padding_counts_nowhere(surrogate):
    w, a = jnp.array([-0.5, -7.0, -1.0]), jnp.array([2.0, 9.0, 3.0])
    mask = jnp.array([True, False, True])
    hessian = jax.jit(jax.hessian(surrogate))
    found = hessian(w, a, mask)
    expected = hessian(w[mask], a[mask], jnp.ones(2, bool))
    np.testing.assert_allclose(found[mask][:, mask], expected, atol=1e-12)
    assert not found[1].any()
    np.testing.assert_allclose(jax.grad(surrogate)(w, a, mask), [2.0, 0.0, 3.0])


def test_the_curvature_of_lvc_is_that_of_single_steps():
    w, a = jnp.array([-0.5, -7.0, -1.0]), jnp.array([2.0, 9.0, 3.0])
    mask = jnp.ones(3, bool)
    full, single = (jax.hessian(s)(w, a, mask) for s in (dice_surrogate, lvc_surrogate))
    np.testing.assert_allclose(single, np.diag(a))
    # DiCE: the probability of a step weighs the advantages of all later ones.
    np.testing.assert_allclose(full, [[2, 9, 3], [9, 9, 3], [3, 3, 3]])


def test_a_baseline_that_is_linear_in_its_features_is_found():
    generator = np.random.default_rng(0)
    observations = generator.normal(size=(4, 10, 2))
    steps = np.broadcast_to(np.arange(10), (4, 10))
    features = linear_features(jnp.asarray(observations), jnp.asarray(steps))
    assert features.shape == (4, 10, 8)
    np.testing.assert_allclose(features[2, 3, 4:], [0.03, 0.03**2, 0.03**3, 1], atol=1e-12)
    wanted = 3 * observations[..., 0] ** 2 - observations[..., 1] + 2
    mask = generator.uniform(size=(4, 10)) < 0.8
    found = jax.jit(fit_baseline)(features, jnp.where(mask, wanted, 1e6), mask)
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_returns_to_go():
    found = returns_to_go(jnp.array([1.0, 5.0, 2.0]), jnp.array([True, False, True]), 0.5)
    np.testing.assert_allclose(found, [2.0, 0.0, 2.0])
