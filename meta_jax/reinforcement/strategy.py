"""Strategies: how a task is met, without learned parameters, and how strategies are measured.

A strategy is written for one task and mapped over many. Those of this library are
`jax.tree_util.Partial`, whose parameters are leaves: another value needs no compilation.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from meta_jax.core import Array, PyTree
from meta_jax.lookup import UsageError
from meta_jax.reinforcement.environment import Discrete, Environment, Problem
from meta_jax.reinforcement.rollout import Agent, Percept, run_trial


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


class Tuned(NamedTuple):
    """A strategy with the parameter that served best.

    Attributes:
      strategy: The strategy.
      parameter: The parameter; None where the strategy has none.
      returns: Mean return of a trial by value of the parameter; empty where there is none.
    """

    strategy: Strategy
    parameter: Any
    returns: Mapping[Any, float]


def number_of_actions(environment: Environment) -> int:
    """Number of the actions of an environment.

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


# ---- How they are measured.


def trial_returns(
    environment: Environment, strategy: Strategy, key: Array, trials: int, *, chunk: int = 125
) -> np.ndarray:
    """Lets a strategy meet freshly drawn tasks, one trial of each.

    Args:
      environment: Environment that the tasks are drawn from.
      strategy: Strategy that meets them. The leaves of a `jax.tree_util.Partial`, a learned
        policy's parameters say, are arguments of the compiled program; what any other function
        holds is compiled in.
      key: Random key; the same key draws the same tasks, whatever the strategy and the chunk.
      trials: Number of trials.
      chunk: Number of trials vmapped at a time.

    Returns:
      The return of each trial, the sum of its sampled rewards, [trials].

    Raises:
      UsageError: trials or chunk below 1.

    Examples:
      >>> from meta_jax.reinforcement.bandits import bandit
      >>> returns = trial_returns(bandit(pulls=20), random_actions(), jax.random.key(0), 50)
      >>> returns.shape, bool(8 < returns.mean() < 12)
      ((50,), True)
    """
    if min(trials, chunk) < 1:
        raise UsageError(f"trials={trials} and chunk={chunk} must be at least 1")
    if not isinstance(strategy, Partial):
        strategy = Partial(strategy)
    chunk = min(chunk, trials)
    indices = np.arange(trials + -trials % chunk).reshape(-1, chunk)
    # The last chunk is filled up, so that all of them run the same program.
    returns = [_returns(environment, strategy, key, each) for each in indices]
    return np.concatenate(returns)[:trials]


@functools.partial(jax.jit, static_argnums=0)
def _returns(environment: Environment, strategy: Strategy, key: Array, indices: Array) -> Array:
    return jax.vmap(functools.partial(_trial_return, environment, strategy, key))(indices)


def _trial_return(environment: Environment, strategy: Strategy, key: Array, index: Array) -> Array:
    task_key, trial_key = jax.random.split(jax.random.fold_in(key, index))
    problem = Problem(environment, environment.sample_task(task_key))
    return run_trial(trial_key, problem, strategy(problem)).reward.sum()


def optimal_returns(environment: Environment, key: Array, trials: int) -> np.ndarray:
    """Largest expected returns of trials, for somebody who knows their tasks.

    Args:
      environment: Environment that the tasks are drawn from.
      key: Random key; with that of `trial_returns` the tasks are the same.
      trials: Number of trials.

    Returns:
      Number of episodes times the optimal return of an episode, [trials].

    Raises:
      UsageError: the environment does not know its optimal return.

    Examples:
      >>> from meta_jax.reinforcement.bandits import dependent_bandit
      >>> optimal_returns(dependent_bandit(difficulty="easy", pulls=10), jax.random.key(0), 2)
      array([9., 9.], dtype=float32)
    """
    if environment.optimal_return is None:
        raise UsageError("the environment has no optimal_return: give it one")
    return np.asarray(_optimal_returns(environment, key, np.arange(trials)))


@functools.partial(jax.jit, static_argnums=0)
def _optimal_returns(environment: Environment, key: Array, indices: Array) -> Array:
    return environment.episodes * jax.vmap(functools.partial(_optimum, environment, key))(indices)


def _optimum(environment: Environment, key: Array, index: Array) -> Array:
    assert environment.optimal_return is not None
    task_key, _ = jax.random.split(jax.random.fold_in(key, index))
    return environment.optimal_return(environment.sample_task(task_key))


def tune(
    candidate: Candidate, environment: Environment, key: Array, trials: int, *, chunk: int = 125
) -> Tuned:
    """Chooses a strategy's parameter by the mean return on training tasks.

    Args:
      candidate: The kind of strategy and the values of its parameter.
      environment: Environment that the tasks are drawn from.
      key: Random key of the tasks, the same ones for every value; not the key of a test.
      trials: Number of trials for each value.
      chunk: Number of trials vmapped at a time.

    Returns:
      The strategy with the best value; the first of equals.
    """
    if not candidate.grid:
        return Tuned(candidate.factory(), None, {})
    strategies = {value: candidate.factory(value) for value in candidate.grid}
    returns = {
        value: float(trial_returns(environment, strategy, key, trials, chunk=chunk).mean())
        for value, strategy in strategies.items()
    }
    best = max(returns, key=returns.__getitem__)
    return Tuned(strategies[best], best, returns)


def best_action(values: Array, key: Array) -> Array:
    """The action of the largest value, any of them where several are equal.

    Args:
      values: Values of the actions, [actions].
      key: Random key.
    """
    return jnp.argmax(jnp.where(values == values.max(), jax.random.uniform(key, values.shape), -1))


def check_share(name: str, value: float) -> None:
    """Refuses a share or probability that is not in [0, 1]."""
    if not 0 <= value <= 1:
        raise UsageError(f"{name}={value} must lie in [0, 1]")


def check_not_negative(name: str, value: float) -> None:
    """Refuses a number below 0, infinity and NaN."""
    if not 0 <= value < np.inf:
        raise UsageError(f"{name}={value} must be a number of at least 0")
