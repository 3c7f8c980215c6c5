"""Strategies: how a task is met, without learned parameters.

A strategy is written for one task and mapped over many. Those of this library are
`jax.tree_util.Partial`, whose parameters are leaves: another value needs no compilation.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from meta_jax.core import Array, PyTree
from meta_jax.lookup import UsageError
from meta_jax.reinforcement.environment import Discrete, Environment, Problem
from meta_jax.reinforcement.rollout import Agent, Percept


class Strategy(Protocol):
    """(problem) -> agent."""

    def __call__(self, problem: Problem, /) -> Agent:
        """The agent that meets a task; only an oracle looks at the task itself."""
        ...


class Candidate(NamedTuple):
    """A kind of strategy and the values of its parameter to choose from.

    Attributes:
      factory: Function that builds the strategy, of the parameter where there are values of one.
      grid: Values of the parameter; empty where there is none.
    """

    factory: Callable[..., Strategy]
    grid: tuple[Any, ...] = ()


def number_of_actions(environment: Environment) -> int:
    """Number of the actions of an environment.

    Args:
      environment: The environment.

    Raises:
      UsageError: its actions are vectors.
    """
    if not isinstance(environment.actions, Discrete):
        raise UsageError("the strategy chooses among discrete actions: name another environment")
    return environment.actions.n


def random_actions() -> Strategy:
    """Builds the strategy that takes every action with the same probability.

    Raises:
      UsageError: where it meets an environment whose actions are vectors.
    """
    return Partial(_random_agent)


def _random_agent(problem: Problem) -> Agent:
    return Agent((), functools.partial(_random_act, number_of_actions(problem.environment)))


def _random_act(
    actions: int, memory: PyTree, percept: Percept, key: Array
) -> tuple[Array, PyTree, PyTree]:
    del percept
    return jax.random.randint(key, (), 0, actions), memory, ()


def best_action(values: Array, key: Array) -> Array:
    """The action of the largest value, any of them where several are equal.

    Args:
      values: Values of the actions, [actions].
      key: Random key.

    Returns:
      The action, an int scalar.
    """
    return jnp.argmax(jnp.where(values == values.max(), jax.random.uniform(key, values.shape), -1))


def check_share(name: str, value: float) -> None:
    """Refuses a probability that is none.

    Args:
      name: Name of the number in messages.
      value: The number.

    Raises:
      UsageError: it is not in [0, 1].
    """
    if not 0 <= value <= 1:
        raise UsageError(f"{name}={value} must lie in [0, 1]")


def check_not_negative(name: str, value: float) -> None:
    """Refuses a scale that is none.

    Args:
      name: Name of the number in messages.
      value: The number.

    Raises:
      UsageError: it is below 0, infinite or NaN.
    """
    if not 0 <= value < np.inf:
        raise UsageError(f"{name}={value} must be a number of at least 0")
