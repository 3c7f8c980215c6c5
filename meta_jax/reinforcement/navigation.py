"""Navigation on the plane to a goal that the agent does not see."""

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from meta_jax.core import Array
from meta_jax.lookup import UsageError
from meta_jax.ranges import PositiveInt
from meta_jax.reinforcement.environment import Continuous, Environment
from meta_jax.reinforcement.rollout import Trajectory
from meta_jax.reinforcement.source import environment_tasks

Start = Literal["fixed", "varying"]
_LARGEST_MOVE = 0.1  # of each coordinate in one step
_ARRIVED = 0.01  # distance to the goal below which an episode ends


class Navigation(NamedTuple):
    """One goal.

    Attributes:
      start: Position where every episode begins, [2].
      goal: Position of the goal, [2].
    """

    start: Array
    goal: Array


class Point(NamedTuple):
    """Where an episode is.

    Attributes:
      position: Position of the agent, [2].
      time: Number of steps taken, an int scalar.
    """

    position: Array
    time: Array


@environment_tasks("navigation")
def navigation(
    *, episodes: PositiveInt = 1, horizon: PositiveInt = 100, start: Start = "fixed"
) -> Environment:
    """Builds the 2-D navigation tasks of Finn et al. (2017), section 5.3.

    The goal is uniform in [-0.5, 0.5]^2. An action is a move, each coordinate clipped to ±0.1; the
    reward is minus the distance to the goal after the move, and an episode ends within 0.01 of the
    goal. The observation is the position.

    Args:
      episodes: Number of episodes of a trial.
      horizon: Largest number of steps of an episode.
      start: Position where episodes begin: 'fixed' for the origin, 'varying' for one of each task,
        uniform in [-0.5, 0.5]^2.

    Returns:
      The environment; its tasks are `Navigation`. Its optimal return is that of steps straight to
      the goal in each coordinate, which leave the smallest distance possible at every time.

    Raises:
      UsageError: episodes or horizon below 1, or an unknown start.

    Examples:
      >>> environment = navigation()
      >>> task = Navigation(start=jnp.zeros(2), goal=jnp.array([0.2, 0.0]))
      >>> round(float(environment.optimal_return(task)), 4)  # 0.1 after one step, 0 after two
      -0.1
    """
    if start not in get_args(Start):
        raise UsageError(
            f"start '{start}' of the navigation must be one of {', '.join(get_args(Start))}"
        )
    return Environment(
        functools.partial(_sample, start == "varying"),
        _reset,
        functools.partial(_step, horizon),
        Continuous(2),
        jax.ShapeDtypeStruct((2,), jnp.result_type(float)),
        horizon=horizon,
        episodes=episodes,
        optimal_return=functools.partial(_optimal_return, horizon),
        draw=functools.partial(_draw, horizon),
    )


def _sample(varying: bool, key: Array) -> Navigation:
    start, goal = jax.random.uniform(key, (2, 2), minval=-0.5, maxval=0.5)
    return Navigation(start if varying else jnp.zeros(2), goal)


def _reset(key: Array, task: Navigation) -> tuple[Point, Array]:
    del key
    return Point(task.start, jnp.zeros((), jnp.int32)), task.start


def _step(
    horizon: int, key: Array, task: Navigation, point: Point, action: Array
) -> tuple[Point, Array, Array, Array]:
    del key
    position = point.position + jnp.clip(action, -_LARGEST_MOVE, _LARGEST_MOVE)
    distance = jnp.linalg.norm(position - task.goal)
    after = Point(position, point.time + 1)
    return after, position, -distance, (distance < _ARRIVED) | (after.time >= horizon)


def _optimal_return(horizon: int, task: Navigation) -> Array:
    moved = _LARGEST_MOVE * jnp.arange(1, horizon + 1)[:, None]
    left = jnp.linalg.norm(jnp.maximum(jnp.abs(task.goal - task.start) - moved, 0), axis=1)
    # Where less than 0.01 was left the next distance is 0, so that to end there changes nothing.
    return -left.sum()


def _draw(horizon: int, figure: Any, task: Navigation, trajectory: Trajectory) -> None:
    """The path of each episode on the plane."""
    axes = figure.subplots()
    positions, actions = trajectory.percept.observation, trajectory.action
    for begin in range(0, len(positions), horizon):
        real = begin + np.flatnonzero(trajectory.mask[begin : begin + horizon])
        last = positions[real[-1]] + np.clip(actions[real[-1]], -_LARGEST_MOVE, _LARGEST_MOVE)
        path = np.concatenate([positions[real], last[None]])
        axes.plot(*path.T, marker=".", markersize=3, linewidth=0.8, alpha=0.8)
    axes.plot(*task.start, "o", color="0.3", label="start")
    axes.plot(*task.goal, "*", color="#2a9d3f", markersize=13, label="goal")
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
