"""Strategies for tabular decision processes: they know the prior, count, and plan.

Those of Duan et al. (2016), table 2. At the beginning of an episode each turns what it has seen
into values of all actions, by value iteration over the steps of an episode, and acts on them until
the episode ends. The state after the last step of an episode is not seen.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from meta_jax.core import Array, PyTree
from meta_jax.lookup import UsageError
from meta_jax.reinforcement.environment import Problem
from meta_jax.reinforcement.rollout import Agent, Percept
from meta_jax.reinforcement.strategy import (
    Candidate,
    Strategy,
    best_action,
    check_not_negative,
    check_share,
    number_of_actions,
    random_actions,
)
from meta_jax.reinforcement.tabular_mdp import TabularMDP, finite_horizon_values

_CONFIDENCE = 0.05  # UCRL2's delta: probability that a bound fails


class Prior(NamedTuple):
    """What is believed of every state and action before it is seen.

    Attributes:
      mean: Mean of the normal prior of the mean reward.
      precision: Number of rewards that this prior is worth; a reward's variance is 1.
      concentration: Number of transitions to each state that the Dirichlet prior is worth.
    """

    mean: float = 1.0
    precision: float = 1.0
    concentration: float = 1.0


EXACT = Prior()  # of the tasks of `tabular_mdp`
# Rewards are shrunk to 0: the default of the library of agents that Duan et al. (2016) ran (PSRL,
# optimistic PSRL and BEB). Their epsilon-greedy, greedy and UCRL2 had hardly any prior.
PUBLISHED = Prior(mean=0.0)
EMPIRICAL = Prior(mean=0.0, precision=1e-4, concentration=1e-4)


class Seen(NamedTuple):
    """What a strategy has seen of a trial, and what it makes of it.

    Attributes:
      transitions: Number of transitions, [states, actions, states].
      rewards: Sum of the rewards, [states, actions].
      visits: Number of rewards, [states, actions].
      state: State of the step before, an int scalar; -1 before the first step.
      time: Number of steps taken in the episode, an int scalar.
      values: Values of the actions, [horizon, states, actions].
    """

    transitions: Array
    rewards: Array
    visits: Array
    state: Array
    time: Array
    values: Array


def _agent(plan: Partial, epsilon: Array | float, problem: Problem) -> Agent:
    """Acts on the values of a plan, a function (seen, key) -> [horizon, states, actions].

    Epsilon is the probability of taking any action.
    """
    environment = problem.environment
    actions = number_of_actions(environment)
    states = environment.observation.size
    if not states:
        raise UsageError(
            "the strategy is for tabular MDPs, which show their state one-hot: take one for bandits"
        )
    start = Seen(
        jnp.zeros((states, actions, states)),
        jnp.zeros((states, actions)),
        jnp.zeros((states, actions)),
        jnp.full((), -1, jnp.int32),
        jnp.zeros((), jnp.int32),
        jnp.zeros((environment.horizon, states, actions)),
    )
    return Agent(start, functools.partial(_act, plan, epsilon))


def _act(
    plan: Partial, epsilon: Array | float, memory: Seen, percept: Percept, key: Array
) -> tuple[Array, Seen, PyTree]:
    plan_key, any_key, action_key = jax.random.split(key, 3)
    seen = _take_in(memory, percept)
    # All tasks of a vmapped trial begin their episodes together, so this stays a branch.
    values = jax.lax.cond(percept.begins, plan, _kept, seen, plan_key)
    here = values[seen.time, seen.state]
    explores = jax.random.bernoulli(any_key, epsilon)
    action = best_action(jnp.where(explores, 0.0, here), action_key)
    return action.astype(jnp.int32), seen._replace(values=values), ()


def _kept(seen: Seen, key: Array) -> Array:
    del key
    return seen.values


def _take_in(memory: Seen, percept: Percept) -> Seen:
    """Counts the step before; at the beginning of an episode its next state was not seen."""
    state = jnp.argmax(percept.observation).astype(jnp.int32)
    known = (memory.state >= 0).astype(jnp.float32)
    at = (memory.state, percept.action)
    return Seen(
        memory.transitions.at[(*at, state)].add(known * ~percept.begins),
        memory.rewards.at[at].add(known * percept.reward),
        memory.visits.at[at].add(known),
        state,
        jnp.where(percept.begins, 0, memory.time + 1),
        memory.values,
    )


def _mean_process(prior: Prior, seen: Seen) -> tuple[Array, Array]:
    """Posterior means of transitions, [states, actions, states], and rewards, [states, actions]."""
    counts = prior.concentration + seen.transitions
    rewards = (prior.precision * prior.mean + seen.rewards) / (prior.precision + seen.visits)
    return counts / counts.sum(-1, keepdims=True), rewards


def _drawn_process(prior: Prior, seen: Seen, key: Array) -> tuple[Array, Array]:
    """Transitions and mean rewards drawn from the posterior."""
    transition_key, reward_key = jax.random.split(key)
    transitions = jax.random.dirichlet(transition_key, prior.concentration + seen.transitions)
    _, means = _mean_process(prior, seen)
    noise = jax.random.normal(reward_key, means.shape)
    return transitions, means + noise / jnp.sqrt(prior.precision + seen.visits)


# ---- The strategies.


def greedy_plan(*, prior: Prior = EXACT) -> Strategy:
    """Builds the strategy that is optimal for the posterior's mean process.

    Args:
      prior: What is believed before anything is seen.
    """
    return epsilon_greedy_plan(0.0, prior=prior)


def epsilon_greedy_plan(epsilon: float = 0.1, *, prior: Prior = EXACT) -> Strategy:
    """Builds the strategy that is optimal for the mean process, but now and then takes any action.

    Args:
      epsilon: Probability of taking any action, at every step.
      prior: What is believed before anything is seen.

    Raises:
      UsageError: epsilon is not in [0, 1].
    """
    check_share("epsilon", epsilon)
    return Partial(_agent, Partial(_plan_for_mean, prior), epsilon)


def _plan_for_mean(prior: Prior, seen: Seen, key: Array) -> Array:
    del key
    return finite_horizon_values(*_mean_process(prior, seen), len(seen.values))


def psrl(*, prior: Prior = EXACT) -> Strategy:
    """Builds posterior sampling (Strens 2000, Osband et al. 2013): optimal for a process drawn.

    Args:
      prior: What is believed before anything is seen.
    """
    return Partial(_agent, Partial(_plan_for_drawn, prior), 0.0)


def _plan_for_drawn(prior: Prior, seen: Seen, key: Array) -> Array:
    return finite_horizon_values(*_drawn_process(prior, seen, key), len(seen.values))


def optimistic_psrl(samples: int = 5, *, prior: Prior = EXACT) -> Strategy:
    """Builds optimistic posterior sampling: the largest value over several processes drawn.

    The largest is taken for each action, state and step, as the authors of Duan et al. (2016) did.

    Args:
      samples: Number of processes drawn for an episode.
      prior: What is believed before anything is seen.

    Raises:
      UsageError: there is no process.
    """
    if samples < 1:
        raise UsageError(f"samples={samples} of optimistic PSRL must be at least 1")
    return Partial(_agent, Partial(_plan_for_several, samples, prior), 0.0)


def _plan_for_several(samples: Array, prior: Prior, seen: Seen, key: Array) -> Array:
    body = functools.partial(_larger_values, prior, seen, key)
    return jax.lax.fori_loop(0, samples, body, jnp.full_like(seen.values, -jnp.inf))


def _larger_values(prior: Prior, seen: Seen, key: Array, i: Array, values: Array) -> Array:
    drawn = _plan_for_drawn(prior, seen, jax.random.fold_in(key, i))
    return jnp.maximum(values, drawn)


def beb(bonus: float = 1.0, *, prior: Prior = EXACT) -> Strategy:
    """Builds the Bayesian exploration bonus (Kolter and Ng 2009) on the mean process.

    The reward of an action seen n times grows by 1 / (1 + precision + n), and what follows it by
    bonus / (1 + states * concentration + n) for each step that is left: the form of the library
    that Duan et al. (2016) ran. Kolter and Ng have the second term alone, once.

    Args:
      bonus: Factor of the bonus on what follows.
      prior: What is believed before anything is seen.

    Raises:
      UsageError: the bonus is negative.
    """
    check_not_negative("bonus", bonus)
    return Partial(_agent, Partial(_plan_with_bonus, bonus, prior), 0.0)


def _plan_with_bonus(bonus: Array, prior: Prior, seen: Seen, key: Array) -> Array:
    del key
    transitions, rewards = _mean_process(prior, seen)
    rewards += 1 / (1 + prior.precision + seen.visits)
    counts = (prior.concentration + seen.transitions).sum(-1)
    left = jnp.arange(len(seen.values))[::-1, None, None]
    rewards += bonus * left / (1 + counts)
    return finite_horizon_values(transitions, rewards, len(rewards))


def ucrl2(scale: float = 0.1) -> Strategy:
    """Builds UCRL2 (Jaksch et al. 2010) for episodes: optimal for the best plausible process.

    After n visits in t steps a reward may be larger than its observed mean by
    scale * sqrt(7 ln(2 S A t / delta) / 2 n), and transitions differ from the observed ones in the
    L1 norm by scale * sqrt(14 S ln(2 A t / delta) / n), where delta = 0.05. The proofs are for a
    scale of 1 and rewards in [0, 1].

    Args:
      scale: Factor of both widths.

    Raises:
      UsageError: it is negative.
    """
    check_not_negative("scale", scale)
    return Partial(_agent, Partial(_plan_for_best, scale), 0.0)


def _plan_for_best(scale: Array, seen: Seen, key: Array) -> Array:
    del key
    states, actions = seen.visits.shape
    transitions, rewards = _mean_process(EMPIRICAL, seen)
    steps = 1 + seen.visits.sum()
    rewards += scale * jnp.sqrt(
        3.5 * jnp.log(2 * states * actions * steps / _CONFIDENCE) / jnp.maximum(seen.visits, 1)
    )
    observed = jnp.maximum(seen.transitions.sum(-1), 1)
    width = scale * jnp.sqrt(14 * states * jnp.log(2 * actions * steps / _CONFIDENCE) / observed)
    backup = functools.partial(_optimistic_backup, transitions, rewards, width)
    return jax.lax.scan(backup, jnp.zeros(states), None, length=len(seen.values), reverse=True)[1]


def _optimistic_backup(
    transitions: Array, rewards: Array, width: Array, later: Array, _: None
) -> tuple[Array, Array]:
    values = rewards + most_favourable(transitions, width, later) @ later
    return values.max(-1), values


def most_favourable(transitions: Array, width: Array, values: Array) -> Array:
    """The probabilities of the largest mean value within an L1 distance (Jaksch et al., figure 2).

    Half the distance is given to the best state and taken from the worst ones.

    Args:
      transitions: Probabilities of the next state, [..., states].
      width: Largest L1 distance, [...].
      values: Values of the states, [states].

    Returns:
      Probabilities [..., states].
    """
    order = jnp.argsort(values)
    p = transitions[..., order]
    given = jnp.minimum(width / 2, 1 - p[..., -1])[..., None]
    # Of the states before this one, in ascending order, at most all they have was taken.
    before = jnp.cumsum(p, -1) - p
    left = jnp.maximum(p - jnp.maximum(given - before, 0), 0)
    left = left.at[..., -1].set(p[..., -1] + given[..., 0])
    return left[..., jnp.argsort(order)]


def known_process() -> Strategy:
    """Builds the oracle: it knows the task and takes the optimal actions."""
    return Partial(_oracle_agent)


def _oracle_agent(problem: Problem) -> Agent:
    return _agent(Partial(_known_values, problem.task), 0.0, problem)


def _known_values(task: TabularMDP, seen: Seen, key: Array) -> Array:
    del seen, key
    return task.action_values


def mdp_candidates(*, published: bool = False) -> dict[str, Candidate]:
    """The strategies for tabular MDPs by name, with the values of the parameter to choose from.

    Args:
      published: Whether they have the priors that the authors of Duan et al. (2016) gave them,
        instead of that of the tasks. UCRL2 has none.
    """
    bayesian, greedy = (PUBLISHED, EMPIRICAL) if published else (EXACT, EXACT)
    bonuses = tuple(float(f"{value:.2g}") for value in np.geomspace(0.5, 30, 10))
    return {
        "random": Candidate(random_actions),
        "psrl": Candidate(functools.partial(psrl, prior=bayesian)),
        "optimistic_psrl": Candidate(
            functools.partial(optimistic_psrl, prior=bayesian), (3, 6, 10, 15, 20)
        ),
        "ucrl2": Candidate(ucrl2, (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)),
        "beb": Candidate(functools.partial(beb, prior=bayesian), bonuses),
        "epsilon_greedy": Candidate(
            functools.partial(epsilon_greedy_plan, prior=greedy), (0.02, 0.05, 0.1, 0.2)
        ),
        "greedy": Candidate(functools.partial(greedy_plan, prior=greedy)),
        "known_process": Candidate(known_process),
    }
