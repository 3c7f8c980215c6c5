"""Trials: what an agent does in one task, and what comes of it, as one compiled scan."""

import functools
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.networks.sequences.sequence_network import KeepMemory, keep_leaves
from meta_jax.reinforcement.environment import Environment, Problem, no_action


class Percept(NamedTuple):
    """What an agent gets before it acts.

    Attributes:
      observation: Observation of the environment, [size].
      last_observation: Observation of the step before; zeros at the first step of a trial.
      action: Action of the step before; at the first step of a trial -1, or zeros.
      reward: Reward of the step before, a float scalar; 0 at the first step of a trial.
      begins: Whether an episode begins, a bool scalar; True at the first step of a trial.
    """

    observation: Array
    last_observation: Array
    action: Array
    reward: Array
    begins: Array


class Act(Protocol):
    """(memory, percept, key) -> (action, memory, extras)."""

    def __call__(
        self, memory: PyTree, percept: Percept, key: Array, /
    ) -> tuple[Array, PyTree, PyTree]:
        """Takes in a percept and chooses an action; extras are kept in the trajectory."""
        ...


class Agent(NamedTuple):
    """Somebody who acts: a strategy that knows, or a learned policy with its parameters.

    Attributes:
      memory: Its memory at the beginning of a trial.
      act: Function (memory, percept, key) -> (action, memory, extras).
      keep: Function (reads, after, before) -> the memory after a step, or before one of padding.
    """

    memory: PyTree
    act: Act
    keep: KeepMemory = keep_leaves


class Trajectory(NamedTuple):
    """The steps of a trial, leaves [episodes * horizon, ...].

    Attributes:
      percept: What the agent got before it acted.
      action: What it did.
      reward: Rewards; 0 in padding.
      done: Whether the episode ended with this step.
      mask: False for padding: the steps between the end of an episode and its horizon.
      expected_reward: Mean of the reward, where the environment knows it; else the reward.
      regret: What the action loses of the best return that is left in the episode, where the
        environment knows it; else None.
      extras: What the agent gave beside its actions.
    """

    percept: Percept
    action: Array
    reward: Array
    done: Array
    mask: Array
    expected_reward: Array
    regret: Array | None
    extras: PyTree


class _Moment(NamedTuple):
    """What lasts from step to step."""

    state: PyTree  # of the environment
    observation: Array
    last_observation: Array
    action: Array
    reward: Array
    alive: Array  # whether the episode goes on
    memory: PyTree


def run_trial(key: Array, problem: Problem, agent: Agent) -> Trajectory:
    """Lets an agent act for a trial of one task.

    Every episode has room for `horizon` steps; those after its end are padding, which neither the
    agent nor the environment sees.

    Args:
      key: Random key.
      problem: The task.
      agent: Who acts.

    Returns:
      The trajectory, [episodes * horizon] steps.
    """
    environment = problem.environment
    steps = environment.episodes * environment.horizon
    start_key, key = jax.random.split(key)
    state, observation = environment.reset(start_key, problem.task)
    start = _Moment(
        state,
        observation,
        jnp.zeros_like(observation),
        no_action(environment.actions),
        jnp.zeros(()),
        jnp.bool_(True),
        agent.memory,
    )
    return jax.lax.scan(functools.partial(_step, problem, agent, key), start, jnp.arange(steps))[1]


def _step(
    problem: Problem, agent: Agent, key: Array, moment: _Moment, t: Array
) -> tuple[_Moment, Trajectory]:
    """Step t of a trial; an episode begins at each multiple of the horizon."""
    environment, task = problem.environment, problem.task
    reset_key, act_key, step_key = jax.random.split(jax.random.fold_in(key, t), 3)
    begins = t % environment.horizon == 0
    state, observation = _where(
        begins, environment.reset(reset_key, task), (moment.state, moment.observation)
    )
    alive = moment.alive | begins
    percept = Percept(observation, moment.last_observation, moment.action, moment.reward, begins)
    action, memory, extras = agent.act(moment.memory, percept, act_key)
    after, seen, reward, done = environment.step(step_key, task, state, action)
    step = Trajectory(
        percept,
        action,
        jnp.where(alive, reward, 0),
        done & alive,
        alive,
        jnp.where(alive, _expected_reward(environment, task, state, action, reward), 0),
        _regret(environment, task, state, action, alive),
        extras,
    )
    kept = agent.keep(alive, memory, moment.memory)
    moment = _where(
        alive,
        _Moment(after, seen, observation, action, reward, ~done, ()),
        moment._replace(state=state, observation=observation, alive=alive, memory=()),
    )
    return moment._replace(memory=kept), step


def _where(condition: Array, yes: PyTree, no: PyTree) -> PyTree:
    return jax.tree.map(functools.partial(jnp.where, condition), yes, no)


def _expected_reward(
    environment: Environment, task: PyTree, state: PyTree, action: Array, reward: Array
) -> Array:
    known = environment.expected_reward
    return reward if known is None else known(task, state, action)


def _regret(
    environment: Environment, task: PyTree, state: PyTree, action: Array, alive: Array
) -> Array | None:
    known = environment.regret
    return None if known is None else jnp.where(alive, known(task, state, action), 0)


def episode_returns(trajectory: Trajectory, environment: Environment) -> Array:
    """The return of each episode of a trial, [episodes]: the sum of its rewards."""
    return trajectory.reward.reshape(environment.episodes, environment.horizon).sum(1)
