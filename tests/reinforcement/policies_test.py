import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from meta_jax.reinforcement.environment import Continuous, Discrete
from meta_jax.reinforcement.policies import entropy, log_probability, num_outputs, sample_action

LOGITS = jnp.array([0.3, -1.0, 2.0])
GAUSSIAN = jnp.array([0.5, -2.0, np.log(0.3), np.log(1.7)])
SCALES = np.array([0.3, 1.7])


def test_a_categorical_policy():
    p = np.exp(LOGITS) / np.exp(LOGITS).sum()
    found = [float(log_probability(LOGITS, jnp.array(i), Discrete(3))) for i in range(3)]
    np.testing.assert_allclose(np.exp(found), p, rtol=1e-6)
    np.testing.assert_allclose(entropy(LOGITS, Discrete(3)), stats.entropy(p), rtol=1e-6)
    draw = jax.jit(jax.vmap(lambda key: sample_action(key, LOGITS, Discrete(3))))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 20_000)))
    assert drawn.dtype == np.int32
    np.testing.assert_allclose(np.bincount(drawn) / drawn.size, p, atol=0.015)


def test_a_gaussian_policy():
    action = jnp.array([0.1, -1.0])
    expected = stats.norm([0.5, -2.0], SCALES)
    found = log_probability(GAUSSIAN, action, Continuous(2))
    np.testing.assert_allclose(found, expected.logpdf(action).sum(), rtol=1e-5)
    np.testing.assert_allclose(
        entropy(GAUSSIAN, Continuous(2)), expected.entropy().sum(), rtol=1e-5
    )
    draw = jax.jit(jax.vmap(lambda key: sample_action(key, GAUSSIAN, Continuous(2))))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 20_000)))
    np.testing.assert_allclose(drawn.mean(0), [0.5, -2.0], atol=0.05)
    np.testing.assert_allclose(drawn.std(0), SCALES, rtol=0.03)


def test_numbers_that_describe_a_policy():
    assert (num_outputs(Discrete(4)), num_outputs(Continuous(2))) == (4, 4)
