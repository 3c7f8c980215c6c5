"""The environments against their definitions, brute force and other formulations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.lookup import UsageError
from meta_jax.reinforcement.bandits import bandit, dependent_bandit
from meta_jax.reinforcement.environment import Problem, check_environment
from meta_jax.reinforcement.grid_navigation import Visit, grid_navigation
from meta_jax.reinforcement.navigation import Navigation, Point, navigation
from meta_jax.reinforcement.rollout import Agent, run_trial
from meta_jax.reinforcement.tabular_mdp import Place, finite_horizon_values, tabular_mdp

KEYS = jax.random.split(jax.random.key(0), 4000)
SMALL = {"states": 3, "actions": 2, "horizon": 2, "episodes": 2}
ENVIRONMENTS = {
    "bandit": bandit(),
    "dependent_bandit": dependent_bandit(),
    "tabular_mdp": tabular_mdp(),
    "navigation": navigation(),
    "navigation_varying": navigation(start="varying", episodes=2),
    "grid_navigation": grid_navigation(),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_functions_fit_each_other(name):
    check_environment(ENVIRONMENTS[name])


@pytest.mark.parametrize(
    "build", [bandit, dependent_bandit, tabular_mdp, navigation, grid_navigation]
)
def test_the_functions_fit_each_other_in_double_precision(build):
    with jax.enable_x64(True):
        environment = build(**({"pulls": 2} if build in (bandit, dependent_bandit) else {}))
        check_environment(environment)
        agent = Agent((), lambda memory, percept, key: (jnp.zeros_like(percept.action), (), ()))
        key = jax.random.key(0)
        run = functools.partial(
            run_trial, problem=Problem(environment, environment.sample_task(key))
        )
        found = jax.eval_shape(functools.partial(run, agent=agent), key)
        assert found.reward.dtype == found.percept.observation.dtype == jnp.float64


@pytest.mark.parametrize(
    ("build", "culprit"),
    [
        (functools.partial(bandit, arms=0), "arms=0"),
        (functools.partial(dependent_bandit, pulls=0), "pulls=0"),
        (functools.partial(dependent_bandit, difficulty="none"), "'none'.*uniform, easy"),
        (functools.partial(tabular_mdp, states=0), "states=0"),
        (functools.partial(tabular_mdp, actions=0), "actions=0"),
        (functools.partial(tabular_mdp, episodes=0), "episodes=0"),
        (functools.partial(tabular_mdp, horizon=-1), "horizon=-1"),
        (functools.partial(navigation, horizon=0), "horizon=0"),
        (functools.partial(navigation, start="here"), "'here'.*fixed, varying"),
        (functools.partial(grid_navigation, size=2), "size=2"),
        (functools.partial(grid_navigation, episodes=0), "episodes=0"),
    ],
)
def test_numbers_that_make_no_environment_are_refused(build, culprit):
    with pytest.raises(UsageError, match=culprit) as error:
        build()
    assert "\n" not in str(error.value)


# ---- Dependent bandits.


@pytest.mark.parametrize(("difficulty", "worse"), [("easy", 0.1), ("medium", 0.25), ("hard", 0.4)])
def test_one_of_two_arms_is_better_by_the_difficulty(difficulty, worse):
    sample = dependent_bandit(difficulty=difficulty).sample_task
    tasks = np.asarray(jax.jit(jax.vmap(sample))(KEYS))
    np.testing.assert_allclose(np.sort(tasks, 1), np.tile([worse, 1 - worse], (4000, 1)), rtol=1e-6)
    assert abs((tasks[:, 0] < 0.5).mean() - 0.5) < 0.04  # five standard errors


def test_dependent_arms_add_up_to_one_and_are_uniform():
    tasks = np.asarray(jax.jit(jax.vmap(dependent_bandit().sample_task))(KEYS))
    np.testing.assert_allclose(tasks.sum(1), 1, rtol=1e-6)
    quartiles = np.quantile(tasks[:, 0], [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quartiles, [0.25, 0.5, 0.75], atol=0.04)


# ---- Tabular decision processes.


def process(seed=0, states=3, actions=2):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(states), (states, actions)), rng.normal(1, 1, (states, actions))


def return_of(policy, transitions, rewards):
    """Expected return from state 0 of a policy, actions [horizon, states], by forward sums."""
    at, total = np.eye(len(rewards))[0], 0.0
    for actions in policy:
        each = np.arange(len(rewards)), actions
        total += at @ rewards[each]
        at = at @ transitions[each]
    return total


def test_the_optimal_value_is_that_of_the_best_of_all_policies():
    transitions, rewards = process()
    found = jax.jit(finite_horizon_values, static_argnums=2)(transitions, rewards, 2)
    policies = itertools.product(itertools.product(range(2), repeat=3), repeat=2)
    best = max(return_of(np.array(policy), transitions, rewards) for policy in policies)
    np.testing.assert_allclose(found[0, 0].max(), best, rtol=1e-6)


def test_regret_is_what_a_policy_loses_of_the_optimal_return():
    environment = tabular_mdp(states=4, actions=3, horizon=5)
    task = jax.jit(environment.sample_task)(KEYS[0])
    regret = jax.jit(lambda t, s, a: environment.regret(task, Place(s, t), a))
    policy = np.random.default_rng(0).integers(3, size=(5, 4))
    transitions, rewards = np.asarray(task.transitions), np.asarray(task.rewards)
    at, lost = np.eye(4)[0], 0.0
    for t, actions in enumerate(policy):
        lost += sum(at[s] * regret(t, s, a) for s, a in enumerate(actions))
        at = at @ transitions[np.arange(4), actions]
    optimum = float(environment.optimal_return(task))
    assert lost > 0.1
    np.testing.assert_allclose(optimum - lost, return_of(policy, transitions, rewards), rtol=1e-5)


def test_processes_are_drawn_from_their_prior():
    task = jax.jit(jax.vmap(tabular_mdp(**SMALL).sample_task))(KEYS)
    np.testing.assert_allclose(task.transitions.sum(-1), 1, rtol=1e-5)
    # A flat Dirichlet of 3: mean 1/3, variance (1/3)(2/3)/4.
    shares = np.asarray(task.transitions).reshape(-1, 3)
    np.testing.assert_allclose(shares.mean(0), 1 / 3, atol=0.01)
    np.testing.assert_allclose(shares.var(0), 1 / 18, rtol=0.05)
    assert abs(task.rewards.mean() - 1) < 0.04
    assert abs(task.rewards.std() - 1) < 0.03


def test_steps_follow_the_process_until_the_horizon():
    environment = tabular_mdp(**SMALL)
    task = jax.jit(environment.sample_task)(KEYS[0])
    step = jax.jit(jax.vmap(environment.step, in_axes=(0, None, None, None)))
    place = Place(jnp.array(2), jnp.array(0))
    after, observation, reward, done = step(KEYS, task, place, jnp.array(1))
    shares = np.bincount(after.state, minlength=3) / len(KEYS)
    np.testing.assert_allclose(shares, task.transitions[2, 1], atol=0.04)
    np.testing.assert_array_equal(observation, np.eye(3)[np.asarray(after.state)])
    assert abs(reward.mean() - environment.expected_reward(task, place, 1)) < 0.08
    assert abs(reward.std() - 1) < 0.06
    assert not done.any()
    assert step(KEYS, task, Place(jnp.array(0), jnp.array(1)), jnp.array(1))[3].all()


# ---- Navigation on the plane.


def test_a_move_is_clipped_and_rewarded_by_the_distance():
    environment = navigation(horizon=3)
    task = Navigation(jnp.zeros(2), jnp.array([0.3, 0.4]))
    step = jax.jit(environment.step)
    state, seen = environment.reset(KEYS[0], task)
    np.testing.assert_array_equal(seen, 0)
    state, seen, reward, done = step(KEYS[0], task, state, jnp.array([-5.0, 0.05]))
    np.testing.assert_allclose(seen, [-0.1, 0.05], rtol=1e-6)
    np.testing.assert_allclose(reward, -np.hypot(0.4, 0.35), rtol=1e-6)
    assert not done
    near = Point(jnp.array([0.3, 0.33]), jnp.array(0))
    assert step(KEYS[0], task, near, jnp.array([0.0, 0.065]))[3]  # 0.005 from the goal
    assert not step(KEYS[0], task, near, jnp.array([0.0, 0.055]))[3]  # 0.015
    assert step(KEYS[0], task, Point(seen, jnp.array(2)), jnp.zeros(2))[3]  # the horizon


def straight(goal, memory, percept, key):
    return goal - percept.observation, memory, ()


def astray(goal, memory, percept, key):
    return goal - percept.observation + 0.1 * jax.random.normal(key, (2,)), memory, ()


@pytest.mark.parametrize("start", ["fixed", "varying"])
def test_the_optimal_return_is_that_of_going_straight(start):
    environment = navigation(start=start, horizon=12, episodes=2)

    @jax.jit
    @jax.vmap
    def trial(key):
        problem = Problem(environment, environment.sample_task(key))
        ways = (straight, astray)
        agents = [Agent((), functools.partial(way, problem.task.goal)) for way in ways]
        runs = [run_trial(key, problem, agent) for agent in agents]
        return problem.task, environment.optimal_return(problem.task), runs

    task, optimum, (best, worse) = trial(KEYS[:100])
    assert (abs(task.goal) <= 0.5).all()
    assert (np.asarray(task.start) != 0).any() == (start == "varying")
    assert (abs(task.start) <= 0.5).all()
    for episode in (0, 12):  # both begin at the task's own place
        np.testing.assert_array_equal(best.percept.observation[:, episode], task.start)
    np.testing.assert_allclose(best.reward.sum(1), 2 * optimum, rtol=1e-4, atol=1e-5)
    assert best.done.sum() == 2 * len(optimum)
    assert (worse.reward.sum(1) <= 2 * optimum + 0.02).all()  # who ends 0.01 away saves a step


# ---- Navigation on a grid.


def test_goals_are_all_cells_that_do_not_touch_the_start():
    goals = np.asarray(jax.jit(jax.vmap(grid_navigation().sample_task))(KEYS))
    cells, counts = np.unique(goals, axis=0, return_counts=True)
    assert len(cells) == 25 - 4
    assert (cells.max(1) >= 2).all()
    np.testing.assert_allclose(counts / len(KEYS), 1 / 21, atol=0.017)


@pytest.fixture(scope="module")
def grid():
    """A grid as a tabular process, from its step alone."""
    environment = grid_navigation(size=4, horizon=6)
    goal = jnp.array([2, 1])
    cells = jnp.asarray(np.indices((4, 4)).reshape(2, -1).T)
    visits = jax.vmap(Visit, in_axes=(0, None))(cells, jnp.array(0))
    by_cell = jax.vmap(jax.vmap(environment.step, (None, None, None, 0)), (None, None, 0, None))
    _, seen, rewards, _ = jax.jit(by_cell)(KEYS[0], goal, visits, jnp.arange(5))
    return environment, goal, cells, np.asarray(seen), np.asarray(rewards)


def test_moves_stay_on_the_grid(grid):
    _, _, cells, seen, rewards = grid
    moves = ([0, 0], [0, 1], [1, 0], [0, -1], [-1, 0])
    for cell, (column, row) in enumerate(np.asarray(cells)):
        for action, (right, up) in enumerate(moves):
            to = np.clip(column + right, 0, 3), np.clip(row + up, 0, 3)
            assert seen[cell, action].argmax() == to[0] * 4 + to[1]
            np.testing.assert_allclose(rewards[cell, action], 1 if to == (2, 1) else -0.1)


def test_regret_and_optimal_return_are_those_of_value_iteration(grid):
    environment, goal, cells, transitions, rewards = grid
    values = np.asarray(finite_horizon_values(jnp.asarray(transitions), jnp.asarray(rewards), 6))

    def regret(time, cell, action):
        return environment.regret(goal, Visit(cell, time), action)

    over = jax.vmap(jax.vmap(jax.vmap(regret, (None, None, 0)), (None, 0, None)), (0, None, None))
    found = jax.jit(over)(jnp.arange(6), cells, jnp.arange(5))
    np.testing.assert_allclose(found, values.max(-1, keepdims=True) - values, atol=1e-5)
    np.testing.assert_allclose(environment.optimal_return(goal), values[0, 0].max(), rtol=1e-6)


def test_an_episode_goes_on_at_the_goal():
    environment = grid_navigation(horizon=4)
    goal = jnp.array([0, 2])
    step = jax.jit(environment.step)
    state, _ = environment.reset(KEYS[0], goal)
    rewards, ends = [], []
    for action in (1, 1, 0, 0):  # up, up, stay, stay
        state, _, reward, done = step(KEYS[0], goal, state, jnp.array(action))
        rewards.append(float(reward))
        ends.append(bool(done))
    np.testing.assert_allclose(rewards, [-0.1, 1, 1, 1])
    assert ends == [False, False, False, True]
    np.testing.assert_allclose(environment.optimal_return(goal), 2.9, rtol=1e-6)
