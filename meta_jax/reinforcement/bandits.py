"""Bernoulli bandits: arms that pay 1 with a probability of their own."""

import functools

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.lookup import UsageError
from meta_jax.reinforcement.environment import Discrete, Environment
from meta_jax.reinforcement.source import environment_tasks


@environment_tasks("bandit")
def bandit(*, arms: int = 5, pulls: int = 10) -> Environment:
    """Builds Bernoulli bandits (Duan et al. 2016, table 1).

    A task is a probability for each arm, p_i ~ U[0, 1]. One pull is one episode, and nothing is
    observed but its reward.

    Args:
      arms: Number of arms.
      pulls: Number of pulls of a trial.

    Returns:
      The environment; its tasks are floats [arms].

    Raises:
      UsageError: no arm, or no pull.

    Examples:
      >>> environment = bandit(arms=3)
      >>> task = jnp.array([0.1, 0.75, 0.25])
      >>> float(environment.regret(task, (), jnp.array(2))), environment.episodes
      (0.5, 10)
    """
    if min(arms, pulls) < 1:
        raise UsageError(f"a bandit needs at least 1 arm and 1 pull: arms={arms}, pulls={pulls}")
    return Environment(
        functools.partial(_uniform_arms, arms),
        _reset,
        _pull,
        Discrete(arms),
        jax.ShapeDtypeStruct((0,), jnp.float32),
        horizon=1,
        episodes=pulls,
        expected_reward=_probability,
        regret=_regret,
        optimal_return=jnp.max,
    )


def _uniform_arms(arms: int, key: Array) -> Array:
    return jax.random.uniform(key, (arms,))


def _reset(key: Array, task: PyTree) -> tuple[tuple, Array]:
    del key, task
    return (), jnp.zeros(0)


def _pull(
    key: Array, task: Array, state: tuple, action: Array
) -> tuple[tuple, Array, Array, Array]:
    reward = jax.random.bernoulli(key, task[action]).astype(jnp.float32)
    return state, jnp.zeros(0), reward, jnp.bool_(True)


def _probability(task: Array, state: tuple, action: Array) -> Array:
    del state
    return task[action]


def _regret(task: Array, state: tuple, action: Array) -> Array:
    return task.max() - _probability(task, state, action)
