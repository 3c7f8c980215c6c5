"""Each strategy's choices against its formula, computed by hand from what it had seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.lookup import UsageError
from meta_jax.reinforcement import bandit_strategies as strategies
from meta_jax.reinforcement.bandit_strategies import Counts
from meta_jax.reinforcement.bandits import bandit
from meta_jax.reinforcement.environment import Problem
from meta_jax.reinforcement.evaluation import trial_returns
from meta_jax.reinforcement.gittins import (
    bayes_optimal_arms,
    bayes_optimal_return,
    finite_horizon_indices,
    gittins_indices,
)
from meta_jax.reinforcement.navigation import navigation
from meta_jax.reinforcement.rollout import Percept, run_trial
from meta_jax.reinforcement.strategy import random_actions
from meta_jax.reinforcement.tabular_mdp import tabular_mdp

PULLS = 8
BANDIT = bandit(arms=2, pulls=PULLS)


@functools.partial(jax.jit, static_argnums=0)
def trials(environment, strategy, keys):
    def trial(key):
        problem = Problem(environment, environment.sample_task(key))
        return problem.task, run_trial(key, problem, strategy(problem))

    return jax.vmap(trial)(keys)


def choices(score, arms, rewards):
    """The arms that a score (wins, losses, t) -> [arms] chooses after every pull of one trial."""
    wins, losses = np.zeros(2, int), np.zeros(2, int)
    found = []
    for t, (arm, reward) in enumerate(zip(arms, rewards, strict=True)):
        found.append(int(np.argmax(score(wins, losses, t))))
        (wins if reward else losses)[arm] += 1
    return found


def mean(wins, losses, t):
    return (wins + 1) / (wins + losses + 2)


def upper_bound(wins, losses, t):
    return mean(wins, losses, t) + 0.3 * np.sqrt(2 * np.log(t + 1) / (wins + losses + 2))


def discounted_index(wins, losses, t):
    return gittins_indices(0.9, PULLS)[wins, losses]


def remaining_index(wins, losses, t):
    return finite_horizon_indices(PULLS)[PULLS - t - 1, wins, losses]


def optimal(wins, losses, t):
    return np.eye(2)[bayes_optimal_arms(2, PULLS)[(*wins, *losses)]]


@pytest.mark.parametrize(
    ("strategy", "score"),
    [
        (strategies.greedy(), mean),
        (strategies.ucb1(0.3), upper_bound),
        (strategies.gittins(PULLS, 0.9), discounted_index),
        (strategies.gittins(PULLS), remaining_index),
        (strategies.bayes_optimal(2, PULLS), optimal),
    ],
    ids=["greedy", "ucb1", "gittins", "gittins_without_discount", "bayes_optimal"],
)
def test_the_arm_is_that_of_the_formula(strategy, score):
    _, run = trials(BANDIT, strategy, jax.random.split(jax.random.key(0), 40))
    arms, rewards = np.asarray(run.action), np.asarray(run.reward)
    assert 0 < arms.mean() < 1
    for trial in range(40):
        assert arms[trial].tolist() == choices(score, arms[trial], rewards[trial])


# ---- Strategies of chance: frequencies over many keys after the same pulls.

DRAWS = 4000
SEEN = Counts(jnp.array([3.0, 0.0, 1.0]), jnp.array([2.0, 0.0, 2.0]), jnp.array(8))


@jax.jit
def frequencies(strategy):
    problem = Problem(bandit(arms=3), jnp.full(3, 0.5))
    agent = strategy(problem)
    # The ninth percept tells of a success of the third arm.
    percept = Percept(jnp.zeros(0), jnp.zeros(0), jnp.array(2), jnp.array(1.0), jnp.bool_(True))
    keys = jax.random.split(jax.random.key(1), DRAWS)
    arms, memory, _ = jax.vmap(lambda key: agent.act(SEEN, percept, key))(keys)
    return jnp.bincount(arms, length=3) / DRAWS, jax.tree.map(lambda leaf: leaf[0], memory)


ALPHA, BETA = np.array([4, 1, 3]), np.array([3, 1, 3])  # with the prior, after that percept
GRID = (np.arange(4000) + 0.5) / 4000


def posterior():
    """Densities and distribution functions on the grid, [arms, grid]."""
    density = GRID ** (ALPHA[:, None] - 1) * (1 - GRID) ** (BETA[:, None] - 1)
    density /= density.sum(1, keepdims=True)
    return density, np.cumsum(density, 1)


def test_thompson_pulls_an_arm_as_often_as_it_is_best():
    found, memory = frequencies(strategies.thompson())
    density, below = posterior()
    best = [(density[i] * np.delete(below, i, 0).prod(0)).sum() for i in range(3)]
    np.testing.assert_allclose(found, best, atol=0.04)
    np.testing.assert_array_equal(memory.successes, [3, 0, 2])
    np.testing.assert_array_equal(memory.failures, [2, 0, 2])
    np.testing.assert_allclose(frequencies(strategies.likeliest_thompson(1))[0], best, atol=0.04)


def test_an_optimistic_draw_is_never_below_the_mean():
    found, _ = frequencies(strategies.optimistic_thompson())
    means = ALPHA / (ALPHA + BETA)
    rng = np.random.default_rng(0)
    draws = np.maximum(rng.beta(ALPHA, BETA, size=(200_000, 3)), means)
    expected = np.bincount(draws.argmax(1), minlength=3) / len(draws)
    np.testing.assert_allclose(found, expected, atol=0.04)


def test_the_likeliest_of_draws_is_the_one_of_the_largest_density():
    found, _ = frequencies(strategies.likeliest_thompson(6))
    rng = np.random.default_rng(0)
    draws = rng.beta(ALPHA, BETA, size=(60_000, 6, 3))
    density = ((ALPHA - 1) * np.log(draws) + (BETA - 1) * np.log1p(-draws)).sum(2)
    likeliest = draws[np.arange(len(draws)), density.argmax(1)]
    expected = np.bincount(likeliest.argmax(1), minlength=3) / len(draws)
    np.testing.assert_allclose(found, expected, atol=0.04)


def test_epsilon_greedy_pulls_any_arm_with_probability_epsilon():
    found, _ = frequencies(strategies.epsilon_greedy(0.3))
    np.testing.assert_allclose(found, [0.8, 0.1, 0.1], atol=0.04)


# ---- Returns.


def test_no_strategy_is_better_than_the_bayes_optimal_one():
    bound = bayes_optimal_return(arms=2, pulls=PULLS)
    runs, error = 2000, 4 * 1.9 / np.sqrt(2000)  # the standard deviation of a return is below 1.9
    key = jax.random.key(3)
    returns = {
        name: trial_returns(BANDIT, strategy, key, runs, chunk=runs).mean()
        for name, strategy in (
            ("optimal", strategies.bayes_optimal(2, PULLS)),
            ("thompson", strategies.thompson()),
            ("ucb1", strategies.ucb1(1.0)),
            ("best_arm", strategies.best_arm()),
        )
    }
    assert abs(returns["optimal"] - bound) < error
    assert returns["thompson"] < bound
    assert returns["ucb1"] < bound
    assert abs(returns["best_arm"] - PULLS * 2 / 3) < error


def test_the_oracle_pulls_the_best_arm():
    task, run = trials(BANDIT, strategies.best_arm(), jax.random.split(jax.random.key(0), 20))
    np.testing.assert_array_equal(run.regret, 0)
    assert len(np.unique(np.asarray(task).argmax(1))) == 2


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (lambda: strategies.epsilon_greedy(1.5), "epsilon=1.5"),
        (lambda: strategies.epsilon_greedy(float("nan")), "epsilon=nan"),
        (lambda: strategies.ucb1(-1.0), "scale=-1.0"),
        (lambda: strategies.likeliest_thompson(0), "samples=0"),
        (lambda: strategies.gittins(10, 1.5), "discount=1.5"),
        (lambda: strategies.greedy()(Problem(tabular_mdp(), None)), "for bandits"),
        (lambda: random_actions()(Problem(navigation(), None)), "discrete"),
    ],
)
def test_what_makes_no_strategy_is_refused(call, culprit):
    with pytest.raises(UsageError, match=culprit) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("pulls", "undiscounted"), [(10, True), (201, False)])
def test_every_candidate_builds_its_strategies(pulls, undiscounted):
    candidates = strategies.bandit_candidates(pulls)
    assert (1.0 in candidates["gittins"].grid) == undiscounted
    for candidate in candidates.values():
        for value in candidate.grid[:2]:
            candidate.factory(value)
        assert candidate.grid or candidate.factory()
