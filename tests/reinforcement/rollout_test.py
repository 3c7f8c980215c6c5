"""Trials, in an environment whose every step can be foretold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.lookup import UsageError
from meta_jax.reinforcement.environment import Discrete, Environment, Problem, check_environment
from meta_jax.reinforcement.rollout import Agent, episode_returns, run_trial

OBSERVATION = jax.ShapeDtypeStruct((1,), jnp.float32)


def reset(key, task):
    return jnp.int32(0), jnp.zeros(1)


def step(key, task, state, action):
    """An episode ends after `task` steps; a reward is the action, and 10 for each step before."""
    state = state + 1
    reward = action.astype(jnp.float32) + 10 * (state - 1)
    return state, state[None].astype(jnp.float32), reward, state >= task


COUNTING = Environment(
    lambda key: jax.random.randint(key, (), 1, 4), reset, step, Discrete(3), OBSERVATION, 3, 2
)


def act(memory, percept, key):
    """Counts its steps, and acts by turns."""
    return memory % 3, memory + 1, percept


@functools.cache
def trial(length):
    problem = Problem(COUNTING, jnp.int32(length))
    return jax.jit(lambda key: run_trial(key, problem, Agent(jnp.int32(0), act)))(jax.random.key(0))


def test_what_is_done_and_seen():
    found = trial(2)
    # Two episodes with room for three steps, of which the third is padding.
    np.testing.assert_array_equal(found.mask, [1, 1, 0, 1, 1, 0])
    real = np.asarray(found.mask)
    np.testing.assert_array_equal(np.asarray(found.action)[real], [0, 1, 2, 0])
    np.testing.assert_array_equal(found.reward, [0, 11, 0, 2, 10, 0])
    np.testing.assert_array_equal(found.done, [0, 1, 0, 0, 1, 0])
    seen = found.percept
    np.testing.assert_array_equal(np.asarray(seen.observation)[real, 0], [0, 1, 0, 1])
    np.testing.assert_array_equal(np.asarray(seen.action)[real], [-1, 0, 1, 2])
    np.testing.assert_array_equal(np.asarray(seen.reward)[real], [0, 0, 11, 2])
    np.testing.assert_array_equal(np.asarray(seen.begins)[real], [1, 0, 1, 0])
    np.testing.assert_array_equal(episode_returns(found, COUNTING), [11, 12])
    np.testing.assert_array_equal(found.expected_reward, found.reward)
    assert found.regret is None


def test_the_memory_lasts_over_a_trial_and_no_longer():
    np.testing.assert_array_equal(trial(3).action, [0, 1, 2, 0, 1, 2])
    problem = Problem(COUNTING, jnp.array([2, 3]))
    agent = Agent(jnp.int32(0), act)
    together = jax.vmap(lambda problem, key: run_trial(key, problem, agent))
    found = together(problem, jax.random.split(jax.random.key(0), 2))
    for i, length in enumerate((2, 3)):
        mask = np.asarray(trial(length).mask)
        for ours, theirs in zip(
            jax.tree.leaves(found), jax.tree.leaves(trial(length)), strict=True
        ):
            np.testing.assert_array_equal(ours[i][mask], theirs[mask])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 0}, "horizon of an environment must be at least 1"),
        ({"observation": jax.ShapeDtypeStruct((2,), jnp.float32)}, r"gives observations .*\[1\]"),
        ({"step": lambda *a: (*step(*a)[:2], jnp.zeros(1), jnp.bool_(True))}, "a reward must be"),
        ({"step": lambda *a: (*step(*a)[:3], jnp.zeros(()))}, "done must be a bool"),
        ({"step": lambda *a: (0.5, *step(*a)[1:])}, "must keep the structure"),
    ],
)
def test_functions_that_do_not_fit_are_refused(changes, message):
    check_environment(COUNTING)
    with pytest.raises(UsageError, match=message) as caught:
        check_environment(COUNTING._replace(**changes))
    assert "\n" not in str(caught.value)
