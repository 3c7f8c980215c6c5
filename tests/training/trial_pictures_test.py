"""What pictures of trials show."""

import jax
import numpy as np
import pytest

from meta_jax.reinforcement.bandits import bandit
from meta_jax.reinforcement.environment import Problem
from meta_jax.reinforcement.evaluation import Trials, by_strategy
from meta_jax.reinforcement.grid_navigation import grid_navigation
from meta_jax.reinforcement.navigation import navigation
from meta_jax.reinforcement.rollout import Agent
from meta_jax.reinforcement.strategy import random_actions
from meta_jax.reinforcement.tabular_mdp import tabular_mdp
from meta_jax.training.figures import new_figure
from meta_jax.training.trial_pictures import draw_steps, regret_curves, trial_picture

KEY = jax.random.key(0)


def played(environment, strategy):
    """A task, its trial and the panels of its picture."""
    problem = Problem(environment, environment.sample_task(KEY))
    trial = jax.jit(by_strategy(strategy))(problem, KEY)
    task, trial = jax.tree.map(np.asarray, (problem.task, trial))
    figure = new_figure(4, 4)
    (environment.draw or draw_steps)(figure, task, trial)
    return task, trial, figure.axes


def wander(problem):
    """Moves at random in the plane."""
    return Agent((), lambda memory, percept, key: (0.2 * jax.random.normal(key, (2,)), memory, ()))


def test_a_bandit_shows_each_pull_and_whether_it_paid():
    task, trial, (axes,) = played(bandit(arms=3, pulls=30), random_actions())
    paid, unpaid = (np.asarray(points.get_offsets()) for points in axes.collections)
    pulls = np.stack([np.arange(1, 31), trial.action], 1)
    np.testing.assert_array_equal(paid, pulls[trial.reward == 1])
    np.testing.assert_array_equal(unpaid, pulls[trial.reward == 0])
    assert [f"{p:.2f}" for p in task] == [t.get_text()[-4:] for t in axes.get_yticklabels()]


def test_a_path_leads_from_the_start_to_where_the_last_reward_was_given():
    task, trial, (axes,) = played(navigation(episodes=2, horizon=6), wander)
    for episode, line in enumerate(axes.lines[:2]):
        path = line.get_xydata()
        np.testing.assert_allclose(path[0], task.start)
        rewards = trial.reward[6 * episode : 6 * (episode + 1)]
        np.testing.assert_allclose(-np.linalg.norm(path[1:] - task.goal, axis=1), rewards, 1e-5)


def test_a_grid_shows_the_path_of_each_episode():
    task, trial, panels = played(grid_navigation(size=3, episodes=2, horizon=5), random_actions())
    assert len(panels) == 2
    for episode, axes in enumerate(panels):
        path = axes.lines[0].get_xydata()
        np.testing.assert_array_equal(path[0], [0, 0])
        rewards = trial.reward[5 * episode : 5 * (episode + 1)]
        np.testing.assert_array_equal((path[1:] == task).all(1), rewards > 0)


def test_other_environments_show_actions_and_rewards():
    environment = tabular_mdp(states=2, actions=2, episodes=2, horizon=3)
    _, trial, (above, below) = played(environment, random_actions())
    np.testing.assert_array_equal(above.lines[0].get_ydata(), trial.action)
    np.testing.assert_array_equal(below.lines[0].get_ydata(), trial.reward)
    assert above.lines[1].get_xdata()[0] == 2.5  # where the second episode begins


def test_pictures_are_written(tmp_path):
    environment = bandit(arms=2, pulls=3)
    problem = Problem(environment, environment.sample_task(KEY))
    trial = jax.jit(by_strategy(random_actions()))(problem, KEY)
    trial_picture(problem, {"a": trial, "b": trial}, tmp_path / "trial.png")
    regret = np.random.default_rng(0).uniform(size=(5, 3)).cumsum(1)
    unknown = Trials(np.zeros(5), None)
    regret_curves({"ours": Trials(np.zeros(5), regret), "x": unknown}, tmp_path / "regret.png")
    for name in ("trial.png", "regret.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no regret"):
        regret_curves({"x": unknown}, tmp_path / "none.png")
    with pytest.raises(ValueError, match="no trial"):
        trial_picture(problem, {}, tmp_path / "none.png")
