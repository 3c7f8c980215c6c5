"""The adapter for gymnax: against gymnax's own steps where it is installed."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.lookup import UsageError
from meta_jax.reinforcement import gymnax_adapter as adapter
from meta_jax.reinforcement.environment import Continuous, Discrete, check_environment
from meta_jax.reinforcement.evaluation import trial_returns
from meta_jax.reinforcement.gymnax_adapter import gymnax_environment
from meta_jax.reinforcement.strategy import random_actions


@pytest.fixture(scope="module")
def gymnax():
    return pytest.importorskip("gymnax", reason="gymnax is not installed: pip install gymnax")


def test_without_gymnax_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnax", None)
    with pytest.raises(UsageError, match=r"not installed: pip install 'meta_jax\[gymnax\]'"):
        gymnax_environment("CartPole-v1")


def test_an_old_gymnax_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnax", SimpleNamespace())
    monkeypatch.setattr(adapter.metadata, "version", lambda name: "0.0.9")
    with pytest.raises(UsageError, match=r"1\.0 or later, not 0\.0\.9"):
        gymnax_environment("CartPole-v1")


def test_cart_pole_steps_as_gymnax_has_it(gymnax):
    environment = gymnax_environment("CartPole-v1", horizon=30, episodes=3)
    check_environment(environment)
    assert environment.actions == Discrete(2)
    assert (environment.horizon, environment.episodes) == (30, 3)
    task = environment.sample_task(jax.random.key(0))
    state, seen = environment.reset(jax.random.key(1), task)
    made, parameters = gymnax.make("CartPole-v1")
    wanted, inner = made.reset(jax.random.key(1), parameters)
    np.testing.assert_array_equal(seen, wanted)
    step, length = jax.jit(environment.step), 0
    for length in range(1, 31):  # a pole that is always pushed right falls after about ten steps
        key = jax.random.key(length)
        state, seen, reward, done = step(key, task, state, jnp.array(1))
        wanted, inner, _, ended, _ = made.step_env(key, inner, 1, parameters)
        np.testing.assert_allclose(seen, wanted, rtol=1e-5)
        assert reward == 1
        assert bool(done) == bool(ended)
        if done:
            break
    assert 5 < length < 20


def test_trials_end_at_the_horizon_and_tasks_differ(gymnax):
    def heavier(key, parameters):
        return parameters.replace(masspole=jax.random.uniform(key, minval=0.05, maxval=0.2))

    environment = gymnax_environment("CartPole-v1", horizon=4, sample_parameters=heavier)
    tasks = jax.vmap(environment.sample_task)(jax.random.split(jax.random.key(0), 3))
    assert len(np.unique(tasks.masspole)) == 3
    returns = trial_returns(environment, random_actions(), jax.random.key(0), 5, chunk=5)
    np.testing.assert_array_equal(returns, 8)  # nothing falls within four steps


def test_vectors_are_actions_and_the_environment_has_its_own_horizon(gymnax):
    environment = gymnax_environment("Pendulum-v1")
    check_environment(environment)
    assert (environment.actions, environment.horizon) == (Continuous(1), 200)


def test_unknown_names_and_empty_episodes_are_refused(gymnax):
    with pytest.raises(UsageError, match=r"no environment 'CartPole'.*CartPole-v1"):
        gymnax_environment("CartPole")
    with pytest.raises(UsageError, match="horizon=0"):
        gymnax_environment("CartPole-v1", horizon=0)
