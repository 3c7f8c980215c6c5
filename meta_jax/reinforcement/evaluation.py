"""Evaluation of strategies: the returns of their trials, the largest possible ones, and tuning."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

from meta_jax.core import Array
from meta_jax.lookup import UsageError
from meta_jax.reinforcement.environment import Environment, Problem
from meta_jax.reinforcement.rollout import run_trial
from meta_jax.reinforcement.strategy import Candidate, Strategy


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
      >>> from meta_jax.reinforcement.strategy import random_actions
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
