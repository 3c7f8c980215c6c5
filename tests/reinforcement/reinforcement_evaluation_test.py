"""How strategies are measured and tuned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from meta_jax.lookup import UsageError
from meta_jax.networks.mlp import mlp
from meta_jax.reinforcement import evaluation
from meta_jax.reinforcement.bandit_strategies import best_arm, epsilon_greedy
from meta_jax.reinforcement.bandits import bandit
from meta_jax.reinforcement.environment import Problem
from meta_jax.reinforcement.evaluation import (
    by_learner,
    by_strategy,
    optimal_returns,
    run_trials,
    trial_returns,
    tune,
)
from meta_jax.reinforcement.maml_rl import maml_rl
from meta_jax.reinforcement.rl2 import rl2
from meta_jax.reinforcement.rollout import Agent, run_trial
from meta_jax.reinforcement.strategy import Candidate, best_action, random_actions
from meta_jax.reinforcement.tabular_mdp import tabular_mdp

BANDIT = bandit(arms=3, pulls=6)
KEY = jax.random.key(0)


def test_returns_are_those_of_one_trial_after_another():
    found = trial_returns(BANDIT, epsilon_greedy(0.2), KEY, 5, chunk=2)

    @jax.jit
    def one(index):
        task_key, trial_key = jax.random.split(jax.random.fold_in(KEY, index))
        problem = Problem(BANDIT, BANDIT.sample_task(task_key))
        return run_trial(trial_key, problem, epsilon_greedy(0.2)(problem)).reward.sum()

    np.testing.assert_array_equal(found, [one(i) for i in range(5)])
    np.testing.assert_array_equal(trial_returns(BANDIT, epsilon_greedy(0.2), KEY, 5), found)


def test_another_parameter_needs_no_compilation():
    trial_returns(BANDIT, epsilon_greedy(0.2), KEY, 5, chunk=2)
    before = evaluation._trials._cache_size()
    trial_returns(BANDIT, epsilon_greedy(0.7), KEY, 9, chunk=2)
    assert evaluation._trials._cache_size() == before


def test_optimal_returns_are_of_the_same_tasks():
    bandits = bandit(arms=3, pulls=200)
    optimum = optimal_returns(bandits, KEY, 8)
    reached = trial_returns(bandits, best_arm(), KEY, 8, chunk=8)
    assert optimum.std() > 10
    np.testing.assert_allclose(reached, optimum, atol=30)  # four standard errors of 200 pulls
    with pytest.raises(UsageError, match="no optimal_return"):
        optimal_returns(BANDIT._replace(optimal_return=None), KEY, 2)


def pulling(arm, memory, percept, key):
    return arm, memory, ()


def always(arm, problem):
    return Agent((), functools.partial(pulling, arm))


def known_bandit():
    """A bandit whose tasks are all the same: its arms pay 0.1, 0.9 and 0.5."""
    return BANDIT._replace(sample_task=lambda key: jnp.array([0.1, 0.9, 0.5]))


def test_the_parameter_of_the_largest_mean_return_is_chosen():
    candidate = Candidate(lambda arm: Partial(always, arm), (0, 1, 2))
    tuned = tune(candidate, known_bandit(), KEY, 200)
    assert tuned.parameter == 1
    found = [tuned.returns[arm] for arm in candidate.grid]
    np.testing.assert_allclose(found, [0.6, 5.4, 3.0], atol=0.5)
    agent = tuned.strategy(Problem(BANDIT, None))
    assert agent.act((), None, KEY)[0] == 1
    assert tune(Candidate(random_actions), BANDIT, KEY, 1)[1:] == (None, {})


def test_any_function_is_a_strategy():
    returns = trial_returns(known_bandit(), functools.partial(always, jnp.array(1)), KEY, 200)
    assert abs(returns.mean() - 5.4) < 0.25


def test_random_actions_are_alike():
    act = random_actions()(Problem(BANDIT, None)).act
    arms = jax.jit(jax.vmap(lambda key: act((), None, key)[0]))(jax.random.split(KEY, 3000))
    np.testing.assert_allclose(np.bincount(arms, minlength=3) / 3000, 1 / 3, atol=0.045)


def test_equal_best_actions_are_alike():
    values = jnp.array([1.0, 2.0, 0.0, 2.0])
    chosen = jax.jit(jax.vmap(functools.partial(best_action, values)))(jax.random.split(KEY, 3000))
    shares = np.bincount(chosen, minlength=4) / 3000
    np.testing.assert_allclose(shares, [0, 0.5, 0, 0.5], atol=0.05)


@pytest.mark.parametrize("sizes", [{"trials": 0}, {"trials": 5, "chunk": 0}])
def test_no_trial_is_refused(sizes):
    with pytest.raises(UsageError, match="must be at least 1"):
        trial_returns(BANDIT, random_actions(), KEY, **sizes)


@pytest.mark.parametrize("build", [rl2, functools.partial(maml_rl, mlp((4,)), steps=0)])
def test_a_learner_plays_as_it_is_evaluated(build):
    """Against `evaluate`, on a large sample of the same tasks."""
    mdp = tabular_mdp(states=2, actions=2, episodes=2, horizon=2)
    learner = build()
    example = Problem(mdp, mdp.sample_task(KEY))
    params, state = jax.jit(learner.init)(KEY, example)
    found = run_trials(mdp, by_learner(learner, params, state), KEY, 2000, chunk=2000)
    assert found.regret.shape == (2000, 4)
    assert (np.diff(found.regret, axis=1) >= 0).all()
    tasks = jax.vmap(mdp.sample_task)(jax.random.split(jax.random.key(7), 2000))
    evaluate = jax.jit(jax.vmap(learner.evaluate, (None, None, 0, 0)))
    returns = evaluate(
        params, state, Problem(mdp, tasks), jax.random.split(jax.random.key(8), 2000)
    )["return"]
    error = np.sqrt(np.var(returns) / 2000 + found.returns.var() / 2000)
    assert abs(returns.mean() - found.returns.mean()) < 4 * error


def test_regret_is_the_gap_to_the_best_arm():
    """The expected return of a trial and its regret add up to the best arm's return."""
    found = run_trials(BANDIT, by_strategy(epsilon_greedy(0.2)), KEY, 4000, chunk=1000)
    best = optimal_returns(BANDIT, KEY, 4000)
    gap = best - found.returns
    error = (gap - found.regret[:, -1]).std() / np.sqrt(4000)
    assert abs(gap.mean() - found.regret[:, -1].mean()) < 4 * error
    assert found.regret[:, -1].mean() > 10 * error
