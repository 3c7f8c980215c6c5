"""Evaluation of strategies and learned policies: what their trials bring, and tuning."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from meta_jax.core import Array, MetaLearner, PyTree
from meta_jax.lookup import UsageError
from meta_jax.reinforcement.environment import Environment, Problem
from meta_jax.reinforcement.rollout import Agent, Percept, Trajectory, run_trial
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


class Play(Protocol):
    """(problem, key) -> trajectory."""

    def __call__(self, problem: Problem, key: Array, /) -> Trajectory:
        """One trial of a task, by whoever plays."""
        ...


class Trials(NamedTuple):
    """What came of many trials.

    Attributes:
      returns: The sum of the sampled rewards of each, [trials].
      regret: What the actions up to each step lost in expectation, [trials, steps]; None where the
        environment does not know it.
    """

    returns: np.ndarray
    regret: np.ndarray | None


def by_strategy(strategy: Strategy) -> Play:
    """Lets a strategy play.

    Args:
      strategy: The strategy. The leaves of a `jax.tree_util.Partial` are arguments of compiled
        programs; what any other function holds is compiled in.
    """
    return Partial(_play, strategy if isinstance(strategy, Partial) else Partial(strategy))


def _play(strategy: Strategy, problem: Problem, key: Array) -> Trajectory:
    return run_trial(key, problem, strategy(problem))


def by_learner(learner: MetaLearner, params: PyTree, state: PyTree) -> Play:
    """Lets a learner of reinforcement learning play: it adapts to a task, and then acts.

    Args:
      learner: A learner whose tasks are `Problem`s, such as `rl2` or `maml_rl`.
      params: Its parameters.
      state: Its state.
    """
    return Partial(functools.partial(_play_adapted, learner), params, state)


def _play_adapted(
    learner: MetaLearner, params: PyTree, state: PyTree, problem: Problem, key: Array
) -> Trajectory:
    adapt_key, key = jax.random.split(key)
    adapted = learner.adapt(params, state, problem, adapt_key, train=False)
    return run_trial(key, problem, Agent(adapted, functools.partial(_act, learner, params)))


def _act(
    learner: MetaLearner, params: PyTree, memory: PyTree, percept: Percept, key: Array
) -> tuple[Array, PyTree, PyTree]:
    (action, extras), memory = learner.predict(params, memory, percept, key, train=False)
    return action, memory, extras


def run_trials(
    environment: Environment, play: Play, key: Array, trials: int, *, chunk: int = 125
) -> Trials:
    """Lets somebody play freshly drawn tasks, one trial of each.

    Args:
      environment: Environment that the tasks are drawn from.
      play: Who plays, from `by_strategy` or `by_learner`.
      key: Random key; the same key draws the same tasks, whoever plays and whatever the chunk.
      trials: Number of trials.
      chunk: Number of trials vmapped at a time.

    Returns:
      Returns and regret.

    Raises:
      UsageError: trials or chunk below 1.

    Examples:
      >>> from meta_jax.reinforcement.bandits import bandit
      >>> from meta_jax.reinforcement.strategy import random_actions
      >>> play = by_strategy(random_actions())
      >>> found = run_trials(bandit(pulls=20), play, jax.random.key(0), 50)
      >>> found.regret.shape, bool(8 < found.returns.mean() < 12)
      ((50, 20), True)
    """
    if min(trials, chunk) < 1:
        raise UsageError(f"trials={trials} and chunk={chunk} must be at least 1")
    chunk = min(chunk, trials)
    indices = np.arange(trials + -trials % chunk).reshape(-1, chunk)
    # The last chunk is filled up, so that all of them run the same program.
    found = [_trials(environment, play, key, each) for each in indices]
    returns, regret = jax.tree.map(lambda *parts: np.concatenate(parts)[:trials], *found)
    return Trials(returns, regret)


@functools.partial(jax.jit, static_argnums=0)
def _trials(
    environment: Environment, play: Play, key: Array, indices: Array
) -> tuple[Array, Array | None]:
    return jax.vmap(functools.partial(_trial, environment, play, key))(indices)


def _trial(
    environment: Environment, play: Play, key: Array, index: Array
) -> tuple[Array, Array | None]:
    task_key, trial_key = jax.random.split(jax.random.fold_in(key, index))
    found = play(Problem(environment, environment.sample_task(task_key)), trial_key)
    regret = None if found.regret is None else jnp.cumsum(found.regret)
    return found.reward.sum(), regret


def trial_returns(
    environment: Environment, strategy: Strategy, key: Array, trials: int, *, chunk: int = 125
) -> np.ndarray:
    """The returns of `run_trials` by a strategy, [trials].

    Examples:
      >>> from meta_jax.reinforcement.bandits import bandit
      >>> from meta_jax.reinforcement.strategy import random_actions
      >>> trial_returns(bandit(pulls=20), random_actions(), jax.random.key(0), 50).shape
      (50,)
    """
    return run_trials(environment, by_strategy(strategy), key, trials, chunk=chunk).returns


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
