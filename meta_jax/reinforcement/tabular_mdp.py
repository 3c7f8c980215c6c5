"""Random Markov decision processes with few states, whose optimal values are known."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import Array
from meta_jax.ranges import PositiveInt
from meta_jax.reinforcement.environment import Discrete, Environment
from meta_jax.reinforcement.source import environment_tasks


class TabularMDP(NamedTuple):
    """One decision process and what is known of it.

    Attributes:
      transitions: Probabilities of the next state, [states, actions, states].
      rewards: Means of the rewards, [states, actions].
      action_values: Largest expected return from a step on, by the action taken there, [horizon,
        states, actions].
    """

    transitions: Array
    rewards: Array
    action_values: Array


class Place(NamedTuple):
    """Where an episode is.

    Attributes:
      state: State of the process, an int scalar.
      time: Number of steps taken, an int scalar.
    """

    state: Array
    time: Array


@environment_tasks("tabular_mdp")
def tabular_mdp(
    *,
    states: PositiveInt = 10,
    actions: PositiveInt = 5,
    episodes: PositiveInt = 10,
    horizon: PositiveInt = 10,
) -> Environment:
    """Builds random decision processes (Duan et al. 2016, table 2).

    P(. | s, a) ~ Dirichlet(1, ..., 1), mean reward r(s, a) ~ N(1, 1), reward ~ N(r(s, a), 1). An
    episode begins in state 0 and takes `horizon` steps; the observation is the state, one-hot.

    Args:
      states: Number of states.
      actions: Number of actions.
      episodes: Number of episodes of a trial.
      horizon: Number of steps of an episode.

    Returns:
      The environment; its tasks are `TabularMDP`.

    Raises:
      UsageError: one of the numbers is below 1.

    Examples:
      >>> environment = tabular_mdp(states=3, actions=2, horizon=4)
      >>> task = environment.sample_task(jax.random.key(0))
      >>> task.transitions.shape, task.action_values.shape
      ((3, 2, 3), (4, 3, 2))
    """
    return Environment(
        functools.partial(_sample, states, actions, horizon),
        functools.partial(_reset, states),
        functools.partial(_step, states, horizon),
        Discrete(actions),
        jax.ShapeDtypeStruct((states,), jnp.result_type(float)),
        horizon=horizon,
        episodes=episodes,
        expected_reward=_expected_reward,
        regret=_regret,
        optimal_return=_optimal_return,
    )


def finite_horizon_values(transitions: Array, rewards: Array, horizon: int) -> Array:
    """Solves a decision process by value iteration backwards from its last step.

    Q_t(s, a) = r(s, a) + sum_s' P(s' | s, a) max_a' Q_{t+1}(s', a'), and Q_horizon = 0.

    Args:
      transitions: Probabilities of the next state, [states, actions, states].
      rewards: Means of the rewards, [states, actions], or of each step, [horizon, states, actions].
      horizon: Number of steps.

    Returns:
      Q, [horizon, states, actions]; the value of a state is the largest over its actions.

    Examples:
      >>> stay = jnp.eye(2)[:, None, :]  # one action, which changes nothing
      >>> finite_horizon_values(stay, jnp.array([[1.0], [0.0]]), 3)[0].tolist()
      [[3.0], [0.0]]
    """
    rewards = jnp.broadcast_to(rewards, (horizon, *rewards.shape[-2:]))
    backup = functools.partial(_backup, transitions)
    _, values = jax.lax.scan(backup, jnp.zeros_like(rewards[0, :, 0]), rewards, reverse=True)
    return values


def _backup(transitions: Array, later: Array, rewards: Array) -> tuple[Array, Array]:
    values = rewards + transitions @ later
    return values.max(-1), values


def _sample(states: int, actions: int, horizon: int, key: Array) -> TabularMDP:
    transition_key, reward_key = jax.random.split(key)
    # Exponential numbers divided by their sum are uniform on the simplex.
    weights = jax.random.exponential(transition_key, (states, actions, states))
    transitions = weights / weights.sum(-1, keepdims=True)
    rewards = 1 + jax.random.normal(reward_key, (states, actions))
    return TabularMDP(transitions, rewards, finite_horizon_values(transitions, rewards, horizon))


def _reset(states: int, key: Array, task: TabularMDP) -> tuple[Place, Array]:
    del key, task
    start = jnp.zeros((), jnp.int32)
    return Place(start, start), jax.nn.one_hot(start, states)


def _step(
    states: int, horizon: int, key: Array, task: TabularMDP, place: Place, action: Array
) -> tuple[Place, Array, Array, Array]:
    state_key, reward_key = jax.random.split(key)
    log_probabilities = jnp.log(task.transitions[place.state, action])
    state = jax.random.categorical(state_key, log_probabilities).astype(jnp.int32)
    reward = task.rewards[place.state, action] + jax.random.normal(reward_key)
    after = Place(state, place.time + 1)
    return after, jax.nn.one_hot(state, states), reward, after.time >= horizon


def _expected_reward(task: TabularMDP, place: Place, action: Array) -> Array:
    return task.rewards[place.state, action]


def _regret(task: TabularMDP, place: Place, action: Array) -> Array:
    values = task.action_values[place.time, place.state]
    return values.max() - values[action]


def _optimal_return(task: TabularMDP) -> Array:
    return task.action_values[0, 0].max()
