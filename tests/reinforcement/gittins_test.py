"""Gittins indices and Bayes-optimal values against published ones and other formulations."""

import functools
from fractions import Fraction

import numpy as np
import pytest

from meta_jax.lookup import UsageError
from meta_jax.reinforcement.gittins import (
    bayes_optimal_arms,
    bayes_optimal_return,
    finite_horizon_indices,
    gittins_indices,
)


def test_indices_are_the_published_ones():
    # Gittins (1979), tables for discounts 0.9 and 0.99: by successes, then failures.
    at_90 = [[0.7029, 0.5001, 0.3796], [0.8001, 0.6346, 0.5163], [0.8452, 0.7072, 0.6010]]
    np.testing.assert_allclose(gittins_indices(0.9, 5)[:3, :3], at_90, atol=1.1e-4)
    at_99 = [[0.8699, 0.7005, 0.5671], [0.9102, 0.7844, 0.6726]]
    np.testing.assert_allclose(gittins_indices(0.99, 4)[:2, :3], at_99, atol=1.1e-4)


def restart_value(successes, failures, discount, pulls=120):
    """(1 - discount) times the value of an arm that may be set back to its state at any time."""
    wins, losses = np.indices((pulls, pulls))
    p = (successes + wins + 1) / (successes + failures + wins + losses + 2)
    value = np.zeros((pulls + 1, pulls + 1))
    for _ in range(300):
        # Beyond the table an arm gives what it is expected to.
        value[-1, :-1], value[:-1, -1] = p[-1] / (1 - discount), p[:, -1] / (1 - discount)
        goes_on = p * (1 + discount * value[1:, :-1]) + (1 - p) * discount * value[:-1, 1:]
        value[:-1, :-1] = np.maximum(goes_on, goes_on[0, 0])
    return (1 - discount) * value[0, 0]


@pytest.mark.parametrize(("successes", "failures"), [(0, 0), (3, 1), (0, 4), (2, 7)])
def test_indices_are_those_of_the_restart_formulation(successes, failures):
    # Katehakis and Veinott (1987).
    expected = restart_value(successes, failures, 0.9)
    found = gittins_indices(0.9, 10)[successes, failures]
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_without_a_future_the_index_is_the_mean():
    indices = gittins_indices(0.0, 4)
    for successes in range(4):
        for failures in range(4 - successes):
            mean = (successes + 1) / (successes + failures + 2)
            np.testing.assert_allclose(indices[successes, failures], mean, atol=1e-9)
    assert np.isnan(indices[1, 3])


def stopping_rules(successes, failures, remaining):
    """(expected rewards, expected pulls) of all rules that stop after some of the pulls."""
    if not remaining:
        return {(Fraction(0), Fraction(0))}
    p = Fraction(successes + 1, successes + failures + 2)
    after_win = stopping_rules(successes + 1, failures, remaining - 1)
    after_loss = stopping_rules(successes, failures + 1, remaining - 1)
    return {(Fraction(0), Fraction(0))} | {
        (p * (1 + win) + (1 - p) * loss, 1 + p * win_pulls + (1 - p) * loss_pulls)
        for win, win_pulls in after_win
        for loss, loss_pulls in after_loss
    }


@pytest.mark.parametrize(("successes", "failures", "remaining"), [(0, 0, 4), (1, 0, 3), (0, 2, 2)])
def test_an_index_without_discount_is_the_best_rate_of_all_stopping_rules(
    successes, failures, remaining
):
    rules = stopping_rules(successes, failures, remaining)
    best = max(rewards / pulls for rewards, pulls in rules if pulls)
    found = finite_horizon_indices(4)[remaining - 1, successes, failures]
    np.testing.assert_allclose(found, float(best), atol=2e-4)


def test_an_arm_is_worth_more_the_more_pulls_remain():
    indices = finite_horizon_indices(30)
    at_first = indices[:, 0, 0]
    assert (np.diff(at_first) > 0).all()
    np.testing.assert_allclose(at_first[0], 0.5, atol=1e-9)
    assert np.isnan(indices[29, 1, 0])


def exhaustive(arms, pulls):
    """The largest mean return by trying every arm after every history, in fractions."""

    def value(counts, remaining):
        if not remaining:
            return Fraction(0)
        returns = []
        for arm, (wins, losses) in enumerate(counts):
            p = Fraction(wins + 1, wins + losses + 2)
            won, lost = (
                [*counts[:arm], after, *counts[arm + 1 :]]
                for after in ((wins + 1, losses), (wins, losses + 1))
            )
            won, lost = value(won, remaining - 1), value(lost, remaining - 1)
            returns.append(p * (1 + won) + (1 - p) * lost)
        return max(returns)

    return value([(0, 0)] * arms, pulls)


@pytest.mark.parametrize(("arms", "pulls"), [(1, 4), (2, 1), (2, 5), (3, 4)])
def test_the_bayes_optimal_return_is_that_of_exhaustive_search(arms, pulls):
    expected = float(exhaustive(arms, pulls))
    np.testing.assert_allclose(bayes_optimal_return(arms=arms, pulls=pulls), expected, rtol=1e-12)


@pytest.mark.parametrize(("arms", "pulls"), [(2, 10), (3, 5)])
def test_the_table_of_arms_reaches_the_bayes_optimal_return(arms, pulls):
    table = bayes_optimal_arms(arms, pulls)

    @functools.cache
    def follow(wins, losses):
        if sum(wins) + sum(losses) == pulls:
            return 0.0
        arm = table[wins + losses]
        p = (wins[arm] + 1) / (wins[arm] + losses[arm] + 2)
        one = np.eye(arms, dtype=int)[arm]
        won = follow(tuple(wins + one), losses)
        return p * (1 + won) + (1 - p) * follow(wins, tuple(losses + one))

    found = follow((0,) * arms, (0,) * arms)
    np.testing.assert_allclose(found, bayes_optimal_return(arms=arms, pulls=pulls), rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (lambda: gittins_indices(1.0, 5), "discount=1.0"),
        (lambda: gittins_indices(-0.1, 5), "discount=-0.1"),
        (lambda: gittins_indices(0.9, 0), "pulls=0"),
        (lambda: finite_horizon_indices(0), "pulls=0"),
        (lambda: finite_horizon_indices(201), "pulls=201.*give a discount"),
        (lambda: bayes_optimal_return(arms=0), "arms=0"),
        (lambda: bayes_optimal_return(pulls=0), "pulls=0"),
        (lambda: bayes_optimal_arms(2, 0), "pulls=0"),
        (lambda: bayes_optimal_arms(5, 10), "5 arms and 10 pulls"),
    ],
)
def test_what_makes_no_index_is_refused(call, culprit):
    with pytest.raises(UsageError, match=culprit) as error:
        call()
    assert "\n" not in str(error.value)
