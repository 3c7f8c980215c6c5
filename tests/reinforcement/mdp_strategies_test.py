"""What strategies for tabular MDPs have seen and plan, computed by hand; bounds by the optimum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.lookup import UsageError
from meta_jax.reinforcement import mdp_strategies as strategies
from meta_jax.reinforcement.bandits import bandit
from meta_jax.reinforcement.environment import Problem
from meta_jax.reinforcement.mdp_strategies import EMPIRICAL, Prior, Seen, most_favourable
from meta_jax.reinforcement.rollout import Agent, Percept, run_trial
from meta_jax.reinforcement.tabular_mdp import tabular_mdp

STATES, ACTIONS, HORIZON, EPISODES = 4, 3, 5, 3
MDP = tabular_mdp(states=STATES, actions=ACTIONS, horizon=HORIZON, episodes=EPISODES)
PRIOR = Prior(mean=0.5, precision=2.0, concentration=0.7)
KEYS = jax.random.split(jax.random.key(0), 200)


def remembering(act, memory, percept, key):
    """The agent's own act, whose memory is kept in the trajectory."""
    action, memory, _ = act(memory, percept, key)
    return action, memory, memory


@jax.jit
def trials(strategy, keys):
    def trial(key):
        problem = Problem(MDP, MDP.sample_task(key))
        agent = strategy(problem)
        agent = Agent(agent.memory, functools.partial(remembering, agent.act))
        return problem.task, run_trial(key, problem, agent)

    return jax.vmap(trial)(keys)


@pytest.fixture(scope="module")
def one_trial():
    """A trial of a greedy strategy that now and then explores, without the axis of tasks."""
    strategy = strategies.epsilon_greedy_plan(0.5, prior=PRIOR)
    return jax.tree.map(lambda leaf: np.asarray(leaf[0]), trials(strategy, KEYS[:2])[1])


def counted(run, steps):
    """Transitions, sums of rewards and visits of the first steps of a trial."""
    states = run.percept.observation.argmax(1)
    transitions = np.zeros((STATES, ACTIONS, STATES))
    rewards, visits = np.zeros((STATES, ACTIONS)), np.zeros((STATES, ACTIONS))
    for t in range(steps):
        at = states[t], run.action[t]
        rewards[at] += run.reward[t]
        visits[at] += 1
        if (t + 1) % HORIZON:  # after the last step of an episode another one begins
            transitions[(*at, states[t + 1])] += 1
    return transitions, rewards, visits


def test_the_memory_counts_what_was_seen(one_trial):
    memory = one_trial.extras
    for step in range(EPISODES * HORIZON):
        transitions, rewards, visits = counted(one_trial, step)
        np.testing.assert_array_equal(memory.transitions[step], transitions)
        np.testing.assert_allclose(memory.rewards[step], rewards, atol=1e-5)
        np.testing.assert_array_equal(memory.visits[step], visits)
        assert memory.time[step] == step % HORIZON


def posterior_mean(prior, transitions, rewards, visits):
    counts = prior.concentration + transitions
    means = (prior.precision * prior.mean + rewards) / (prior.precision + visits)
    return counts / counts.sum(-1, keepdims=True), means


def value_iteration(transitions, rewards):
    later, values = np.zeros(STATES), []
    for _ in range(HORIZON):
        values.append(rewards + transitions @ later)
        later = values[-1].max(1)
    return np.stack(values[::-1])


def test_plans_are_made_of_the_posterior_mean_where_an_episode_begins(one_trial):
    values = one_trial.extras.values
    for episode in range(EPISODES):
        begin = episode * HORIZON
        seen = counted(one_trial, begin)
        expected = value_iteration(*posterior_mean(PRIOR, *seen))
        for step in range(begin, begin + HORIZON):
            np.testing.assert_allclose(values[step], expected, atol=1e-4)


def test_actions_are_greedy_or_any(one_trial):
    _, runs = trials(strategies.epsilon_greedy_plan(0.5, prior=PRIOR), KEYS[:100])
    states = np.asarray(runs.percept.observation).argmax(-1)
    values, actions = np.asarray(runs.extras.values), np.asarray(runs.action)
    time = np.tile(np.arange(HORIZON), EPISODES)
    each = np.arange(100)[:, None], np.arange(EPISODES * HORIZON), time, states
    best = (values[each].argmax(-1) == actions)[:, HORIZON:].mean()  # at first all are equal
    assert abs(best - (0.5 + 0.5 / ACTIONS)) < 0.08


def test_the_greedy_strategy_takes_equal_actions_alike():
    _, runs = trials(strategies.greedy_plan(prior=PRIOR), KEYS)
    shares = np.bincount(np.asarray(runs.action)[:, 0], minlength=ACTIONS) / len(KEYS)
    np.testing.assert_allclose(shares, 1 / ACTIONS, atol=0.17)


# ---- Plans from what was seen.


def seen(scale=1):
    """Beliefs after some steps, some actions never taken."""
    rng = np.random.default_rng(0)
    transitions = scale * rng.integers(0, 4, size=(STATES, ACTIONS, STATES)).astype(float)
    transitions[0, 1] = 0
    visits = transitions.sum(-1)
    rewards = visits * rng.normal(1, 1, visits.shape)
    zero = jnp.zeros((), jnp.int32)
    arrays = (jnp.asarray(each, jnp.float32) for each in (transitions, rewards, visits))
    return Seen(*arrays, zero, zero, jnp.zeros((HORIZON, STATES, ACTIONS)))


@jax.jit
def plan(strategy, seen, key):
    """Values of a strategy that begins an episode in state 0 with what it has seen."""
    agent = strategy(Problem(MDP, None))
    percept = Percept(
        jnp.eye(STATES)[0], jnp.zeros(STATES), jnp.array(0), jnp.array(0.0), jnp.bool_(True)
    )
    before = seen._replace(state=jnp.full((), -1, jnp.int32))
    return agent.act(before, percept, key)[1].values


def of(seen):
    return tuple(np.asarray(each) for each in (seen.transitions, seen.rewards, seen.visits))


def test_posterior_sampling_comes_to_the_mean_process():
    # With a million visits each the posterior is a point.
    many = seen(10**6)._replace(rewards=seen(10**6).visits * 0.5)
    expected = value_iteration(*posterior_mean(PRIOR, *of(many)))
    found = plan(strategies.psrl(prior=PRIOR), many, KEYS[0])
    taken = np.asarray(many.visits) > 0
    np.testing.assert_allclose(found[-1][taken], expected[-1][taken], atol=0.02)


def test_drawn_processes_have_the_moments_of_the_posterior():
    # At the last step a value is the drawn mean reward alone; one step before, the largest of them
    # by the drawn transitions.
    few = seen()
    found = jax.vmap(functools.partial(plan, strategies.psrl(prior=PRIOR)), (None, 0))(
        few, jax.random.split(jax.random.key(1), 3000)
    )
    shares, means = posterior_mean(PRIOR, *of(few))
    last = np.asarray(found[:, -1])
    deviation = 1 / np.sqrt(PRIOR.precision + np.asarray(few.visits))
    np.testing.assert_allclose(last.mean(0), means, atol=0.08)
    np.testing.assert_allclose(last.std(0), deviation, rtol=0.1)
    before = np.asarray(found[:, -2]) - last  # transitions @ largest rewards, drawn apart
    expected = (shares @ last.max(2).T).transpose(2, 0, 1).mean(0)
    np.testing.assert_allclose(before.mean(0), expected, atol=0.08)


def test_more_processes_are_more_optimistic():
    one, several = (
        np.asarray(plan(strategies.optimistic_psrl(samples, prior=PRIOR), seen(), KEYS[0]))
        for samples in (1, 4)
    )
    assert (several >= one).all()
    assert (several > one).mean() > 0.5


def test_the_bonus_is_that_of_its_formula():
    few = seen()
    transitions, means = posterior_mean(PRIOR, *of(few))
    visits = np.asarray(few.visits)
    alpha = PRIOR.concentration * STATES + visits
    later, expected = np.zeros(STATES), []
    for left in range(HORIZON):
        bonus = 1 / (1 + PRIOR.precision + visits) + 3.0 * left / (1 + alpha)
        expected.append(means + bonus + transitions @ later)
        later = expected[-1].max(1)
    found = plan(strategies.beb(3.0, prior=PRIOR), few, KEYS[0])
    np.testing.assert_allclose(found, expected[::-1], rtol=1e-4)


def test_ucrl2_without_width_is_greedy_on_what_was_observed_and_grows_with_it():
    few = seen()
    none, some = (np.asarray(plan(strategies.ucrl2(s), few, KEYS[0])) for s in (0.0, 0.1))
    expected = value_iteration(*posterior_mean(EMPIRICAL, *of(few)))
    np.testing.assert_allclose(none, expected, rtol=1e-3, atol=1e-3)
    assert (some > none).all()
    steps = 1 + np.asarray(few.visits).sum()
    width = 0.1 * np.sqrt(3.5 * np.log(2 * STATES * ACTIONS * steps / 0.05))
    width /= np.sqrt(np.maximum(few.visits, 1))
    np.testing.assert_allclose(some[-1] - none[-1], width, rtol=1e-4)


@pytest.mark.parametrize("width", [0.0, 0.3, 0.9, 2.5])
def test_the_most_favourable_transitions_are_the_best_within_their_distance(width):
    rng = np.random.default_rng(1)
    p, values = rng.dirichlet(np.ones(3), 5), rng.normal(size=3)
    found = np.asarray(jax.jit(most_favourable)(p, jnp.full(5, width), values))
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    assert (found >= 0).all()
    assert (abs(found - p).sum(1) <= width + 1e-5).all()
    # All distributions on a grid of steps of 1/100.
    first, second = np.indices((101, 101)).reshape(2, -1) / 100
    grid = np.stack([first, second, 1 - first - second], 1)
    grid = grid[grid[:, 2] > -1e-9]
    for mine, own in zip(found, p, strict=True):
        near = grid[abs(grid - own).sum(1) <= width]
        best = (near @ values).max() if len(near) else own @ values
        assert best - 1e-5 <= mine @ values <= max(best, own @ values) + 0.06


# ---- Bounds.


def test_the_oracle_loses_nothing():
    task, runs = trials(strategies.known_process(), KEYS)
    np.testing.assert_array_equal(runs.regret, 0)
    optimum = EPISODES * np.asarray(jax.vmap(MDP.optimal_return)(task))
    difference = np.asarray(runs.reward).sum(1) - optimum
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(KEYS))


def test_value_iteration_bounds_a_learner_by_its_regret():
    task, runs = trials(strategies.psrl(), KEYS)
    optimum = EPISODES * np.asarray(jax.vmap(MDP.optimal_return)(task))
    lost = np.asarray(runs.regret).sum(1)
    assert (np.asarray(runs.regret) >= 0).all()
    assert lost.mean() > 1
    # What is lost is the optimum less the return, but for chance.
    difference = optimum - lost - np.asarray(runs.reward).sum(1)
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(KEYS))


def test_a_plan_is_made_once_for_an_episode_under_vmap():
    branches = str(jax.make_jaxpr(lambda keys: trials(strategies.psrl(), keys))(KEYS)).count(
        "cond["
    )
    assert branches > 0  # a branch that vmap had turned into a choice would plan at every step


@pytest.mark.parametrize(
    ("call", "culprit"),
    [
        (lambda: strategies.epsilon_greedy_plan(-0.5), "epsilon=-0.5"),
        (lambda: strategies.optimistic_psrl(0), "samples=0"),
        (lambda: strategies.beb(-1.0), "bonus=-1.0"),
        (lambda: strategies.ucrl2(float("inf")), "scale=inf"),
        (lambda: strategies.greedy_plan()(Problem(bandit(), None)), "for tabular MDPs"),
    ],
)
def test_what_makes_no_strategy_is_refused(call, culprit):
    with pytest.raises(UsageError, match=culprit) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("published", [False, True])
def test_every_candidate_builds_its_strategies(published):
    for candidate in strategies.mdp_candidates(published=published).values():
        for value in candidate.grid:
            candidate.factory(value)
        assert candidate.grid or candidate.factory()
