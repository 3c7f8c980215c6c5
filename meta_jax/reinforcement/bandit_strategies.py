"""Strategies for Bernoulli bandits: they know that p ~ U[0, 1], and count.

Those of Duan et al. (2016), appendix, each with its parameter. All start from one success and one
failure of every arm, the uniform prior.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from meta_jax.core import Array, PyTree
from meta_jax.lookup import UsageError
from meta_jax.reinforcement.environment import Problem
from meta_jax.reinforcement.gittins import (
    MOST_PULLS_WITHOUT_DISCOUNT,
    bayes_optimal_arms,
    finite_horizon_indices,
    gittins_indices,
)
from meta_jax.reinforcement.rollout import Agent, Percept
from meta_jax.reinforcement.strategy import (
    Candidate,
    Strategy,
    check_not_negative,
    check_share,
    number_of_actions,
    random_actions,
)


class Counts(NamedTuple):
    """What a strategy has seen of a trial.

    Attributes:
      successes: Number of rewards of 1 of each arm, [arms].
      failures: Number of rewards of 0 of each arm, [arms].
      pulls: Number of percepts so far, an int scalar: that of the pulls, and one.
    """

    successes: Array
    failures: Array
    pulls: Array

    @property
    def each(self) -> Array:
        """Successes and failures of each arm with the prior's, [arms]."""
        return self.successes + self.failures + 2

    @property
    def means(self) -> Array:
        """Posterior means, [arms]."""
        return (self.successes + 1) / self.each


def _agent(scores: Partial, problem: Problem) -> Agent:
    """Pulls the arm of the largest score; scores are a function (counts, key) -> [arms]."""
    environment = problem.environment
    arms = number_of_actions(environment)
    if environment.horizon != 1:
        raise UsageError(
            "the strategy is for bandits, whose episodes are one pull each: take one for MDPs"
        )
    start = Counts(jnp.zeros(arms), jnp.zeros(arms), jnp.zeros((), jnp.int32))
    return Agent(start, functools.partial(_act, scores))


def _act(
    scores: Partial, memory: Counts, percept: Percept, key: Array
) -> tuple[Array, Counts, PyTree]:
    # The first percept of a trial tells of no pull.
    pulled = jax.nn.one_hot(percept.action, len(memory.successes)) * (memory.pulls > 0)
    counts = Counts(
        memory.successes + pulled * percept.reward,
        memory.failures + pulled * (1 - percept.reward),
        memory.pulls + 1,
    )
    return jnp.argmax(scores(counts, key)).astype(jnp.int32), counts, ()


def greedy() -> Strategy:
    """Builds the strategy that pulls the arm of the largest posterior mean."""
    return epsilon_greedy(0.0)


def epsilon_greedy(epsilon: float = 0.1) -> Strategy:
    """Builds the greedy strategy that now and then pulls any arm.

    Args:
      epsilon: Probability of pulling any arm.

    Raises:
      UsageError: it is not in [0, 1].
    """
    check_share("epsilon", epsilon)
    return Partial(_agent, Partial(_epsilon_greedy, epsilon))


def _epsilon_greedy(epsilon: Array, counts: Counts, key: Array) -> Array:
    any_key, arm_key = jax.random.split(key)
    anything = jax.random.uniform(arm_key, counts.means.shape)
    return jnp.where(jax.random.bernoulli(any_key, epsilon), anything, counts.means)


def ucb1(scale: float = 1.0) -> Strategy:
    """Builds UCB1 (Auer et al. 2002): mean + scale * sqrt(2 ln t / n).

    t counts the pulls, and n those of the arm with the two of the prior.

    Args:
      scale: Factor of the bonus; the proofs are for 1, and less serves better.

    Raises:
      UsageError: it is negative.
    """
    check_not_negative("scale", scale)
    return Partial(_agent, Partial(_ucb1, scale))


def _ucb1(scale: Array, counts: Counts, key: Array) -> Array:
    del key
    return counts.means + scale * jnp.sqrt(2 * jnp.log(counts.pulls) / counts.each)


def thompson() -> Strategy:
    """Builds Thompson sampling: the arm whose draw from the posterior is largest."""
    return Partial(_agent, Partial(_thompson))


def _thompson(counts: Counts, key: Array) -> Array:
    return _posterior_draw(counts, key)


def _posterior_draw(counts: Counts, key: Array) -> Array:
    """Probabilities drawn from their posteriors, [arms]."""
    # Two gamma variates by their sum: a third of the time that jax.random.beta takes.
    win, lose = jax.random.gamma(key, 1 + jnp.stack([counts.successes, counts.failures]))
    return win / (win + lose)


def optimistic_thompson() -> Strategy:
    """Builds optimistic Thompson sampling (May et al. 2012): a draw is never below the mean."""
    return Partial(_agent, Partial(_optimistic_thompson))


def _optimistic_thompson(counts: Counts, key: Array) -> Array:
    return jnp.maximum(_posterior_draw(counts, key), counts.means)


def likeliest_thompson(samples: int = 7) -> Strategy:
    """Builds Thompson sampling with the likeliest of several draws.

    It is what the authors of Duan et al. (2016) ran as 'optimistic Thompson sampling' (OTS): of
    joint draws for all arms the one with the largest posterior density counts. With more draws it
    comes closer to the greedy strategy on the posterior's mode.

    Args:
      samples: Number of draws.

    Raises:
      UsageError: there is none.
    """
    if samples < 1:
        raise UsageError(f"samples={samples} of Thompson sampling must be at least 1")
    return Partial(_agent, Partial(_likeliest_thompson, samples))


def _likeliest_thompson(samples: Array, counts: Counts, key: Array) -> Array:
    start = (jnp.zeros_like(counts.means), -jnp.inf)
    body = functools.partial(_likelier, counts, key)
    return jax.lax.fori_loop(0, samples, body, start)[0]


def _likelier(
    counts: Counts, key: Array, i: Array, best: tuple[Array, Array]
) -> tuple[Array, Array]:
    drawn = _posterior_draw(counts, jax.random.fold_in(key, i))
    # The posterior's constant is the same for all draws.
    terms = counts.successes * jnp.log(drawn) + counts.failures * jnp.log1p(-drawn)
    density = jnp.where(counts.each > 2, terms, 0).sum()
    likelier = density > best[1]
    return jnp.where(likelier, drawn, best[0]), jnp.where(likelier, density, best[1])


def gittins(pulls: int, discount: float = 1.0) -> Strategy:
    """Builds the strategy of the largest Gittins index.

    With a discount below 1 it is Bayes-optimal for the discounted sum of rewards of an endless
    trial. For a trial of n pulls it comes close with a discount near 1 - 1/n, to be tuned.

    Args:
      pulls: Number of pulls of a trial.
      discount: Discount of a pull; 1 for indices of the pulls that remain, without discount.

    Raises:
      UsageError: no pull, more than 200 pulls without discount, or a discount outside [0, 1].
    """
    if discount == 1:
        return Partial(
            _agent, Partial(_remaining_index, jnp.asarray(finite_horizon_indices(pulls)))
        )
    return Partial(_agent, Partial(_index, jnp.asarray(gittins_indices(discount, pulls))))


def _index(indices: Array, counts: Counts, key: Array) -> Array:
    del key
    return indices[counts.successes.astype(jnp.int32), counts.failures.astype(jnp.int32)]


def _remaining_index(indices: Array, counts: Counts, key: Array) -> Array:
    return _index(indices[len(indices) - counts.pulls], counts, key)


def bayes_optimal(arms: int, pulls: int) -> Strategy:
    """Builds the strategy of the largest mean return, for small bandits.

    Args:
      arms: Number of arms.
      pulls: Number of pulls of a trial.

    Raises:
      UsageError: pulls ** (2 * arms) is more than 200,000, or a number is below 1.
    """
    return Partial(_agent, Partial(_optimal, jnp.asarray(bayes_optimal_arms(arms, pulls))))


def _optimal(table: Array, counts: Counts, key: Array) -> Array:
    del key
    state = jnp.concatenate([counts.successes, counts.failures]).astype(jnp.int32)
    return jax.nn.one_hot(table[tuple(state)], len(counts.successes))


def best_arm() -> Strategy:
    """Builds the oracle: it knows the task and pulls its best arm."""
    return Partial(_best_arm_agent)


def _best_arm_agent(problem: Problem) -> Agent:
    return _agent(Partial(_known, problem.task), problem)


def _known(probabilities: Array, counts: Counts, key: Array) -> Array:
    del counts, key
    return probabilities


def bandit_candidates(pulls: int) -> dict[str, Candidate]:
    """The strategies for bandits by name, with the values of the parameter to choose from.

    Args:
      pulls: Number of pulls of a trial.
    """
    discounts = tuple(round(1 - share / pulls, 5) for share in (4, 2, 1, 0.5))
    if pulls <= MOST_PULLS_WITHOUT_DISCOUNT:
        discounts += (1.0,)
    return {
        "random": Candidate(random_actions),
        "gittins": Candidate(functools.partial(gittins, pulls), discounts),
        "thompson": Candidate(thompson),
        "optimistic_thompson": Candidate(optimistic_thompson),
        "likeliest_thompson": Candidate(likeliest_thompson, (2, 4, 7, 12, 20)),
        "ucb1": Candidate(ucb1, (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 1.0)),
        "epsilon_greedy": Candidate(epsilon_greedy, (0.01, 0.02, 0.05, 0.1, 0.2)),
        "greedy": Candidate(greedy),
        "best_arm": Candidate(best_arm),
    }
