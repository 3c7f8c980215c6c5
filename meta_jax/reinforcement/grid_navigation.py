"""Navigation on a grid to a goal that the agent does not see."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from meta_jax.core import Array
from meta_jax.lookup import UsageError
from meta_jax.ranges import PositiveInt
from meta_jax.reinforcement.environment import Discrete, Environment
from meta_jax.reinforcement.rollout import Trajectory
from meta_jax.reinforcement.source import environment_tasks

_MOVES = np.array([[0, 0], [0, 1], [1, 0], [0, -1], [-1, 0]])  # stay, up, right, down, left
_STEP_REWARD, _GOAL_REWARD = -0.1, 1.0


class Visit(NamedTuple):
    """Where an episode is.

    Attributes:
      cell: Column and row of the agent, ints [2].
      time: Number of steps taken, an int scalar.
    """

    cell: Array
    time: Array


@environment_tasks("grid_navigation")
def grid_navigation(
    *, size: PositiveInt = 5, episodes: PositiveInt = 4, horizon: PositiveInt = 15
) -> Environment:
    """Builds the grid navigation (GridNavi) of Zintgraf et al. (2020), section 5.1.

    An episode begins in the corner (0, 0). The goal is a cell of its own in each task, uniform
    among those that do not touch the corner, not even diagonally, as in the authors' code. Actions
    are to stay and to move up, right, down or left, and a move off the grid stays. The reward is 1
    for a step that ends on the goal and -0.1 for any other; an episode goes on at the goal, to its
    horizon. The observation is the cell, one-hot, and does not show the goal.

    Args:
      size: Number of rows and of columns.
      episodes: Number of episodes of a trial.
      horizon: Number of steps of an episode.

    Returns:
      The environment; its tasks are the column and row of the goal, ints [2]. Regret and optimal
      return are those of an agent that knows the goal.

    Raises:
      UsageError: a grid with fewer than 3 rows, or episodes or horizon below 1.

    Examples:
      >>> environment = grid_navigation()
      >>> goal = jnp.array([4, 4])  # seven steps on the way, and eight on the goal
      >>> round(float(environment.optimal_return(goal)), 4)
      7.3
    """
    if size < 3:
        raise UsageError(f"size={size} of the grid must be at least 3: all cells touch the start")
    return Environment(
        functools.partial(_sample, size),
        functools.partial(_reset, size),
        functools.partial(_step, size, horizon),
        Discrete(len(_MOVES)),
        jax.ShapeDtypeStruct((size * size,), jnp.result_type(float)),
        horizon=horizon,
        episodes=episodes,
        expected_reward=functools.partial(_expected_reward, size),
        regret=functools.partial(_regret, size, horizon),
        optimal_return=functools.partial(_optimal_return, horizon),
        draw=functools.partial(_draw, size, horizon),
    )


def _sample(size: int, key: Array) -> Array:
    cells = np.indices((size, size)).reshape(2, -1).T
    return jax.random.choice(key, jnp.asarray(cells[cells.max(1) > 1]))


def _one_hot(size: int, cell: Array) -> Array:
    return jax.nn.one_hot(cell[0] * size + cell[1], size * size)


def _reset(size: int, key: Array, goal: Array) -> tuple[Visit, Array]:
    del key, goal
    cell = jnp.zeros(2, jnp.int32)
    return Visit(cell, jnp.zeros((), jnp.int32)), _one_hot(size, cell)


def _moved(size: int, cell: Array, action: Array) -> Array:
    return jnp.clip(cell + jnp.asarray(_MOVES, cell.dtype)[action], 0, size - 1)


def _reward(goal: Array, cell: Array) -> Array:
    return jnp.where((cell == goal).all(), _GOAL_REWARD, _STEP_REWARD)


def _step(
    size: int, horizon: int, key: Array, goal: Array, visit: Visit, action: Array
) -> tuple[Visit, Array, Array, Array]:
    del key
    after = Visit(_moved(size, visit.cell, action), visit.time + 1)
    observation = _one_hot(size, after.cell)
    return after, observation, _reward(goal, after.cell), after.time >= horizon


def _expected_reward(size: int, goal: Array, visit: Visit, action: Array) -> Array:
    return _reward(goal, _moved(size, visit.cell, action))


def _value(goal: Array, cell: Array, steps: Array) -> Array:
    """Largest return of the steps that are left."""
    distance = jnp.abs(cell - goal).sum()
    # From the goal itself a step that stays is rewarded at once, as one from beside it.
    on_the_way = jnp.minimum(jnp.maximum(distance, 1) - 1, steps)
    return _STEP_REWARD * on_the_way + _GOAL_REWARD * (steps - on_the_way)


def _regret(size: int, horizon: int, goal: Array, visit: Visit, action: Array) -> Array:
    steps = horizon - visit.time
    cell = _moved(size, visit.cell, action)
    taken = _reward(goal, cell) + _value(goal, cell, steps - 1)
    return jnp.maximum(_value(goal, visit.cell, steps) - taken, 0)  # rounding may fall below


def _optimal_return(horizon: int, goal: Array) -> Array:
    return _value(goal, jnp.zeros(2, jnp.int32), jnp.asarray(horizon))


def _draw(size: int, horizon: int, figure: Any, goal: np.ndarray, trajectory: Trajectory) -> None:
    """The path of each episode on the grid, from the corner to where it ends."""
    episodes = len(trajectory.reward) // horizon
    panels = np.ravel(figure.subplots(1, episodes, sharey=True))
    cells = trajectory.percept.observation.argmax(1)
    for episode, axes in enumerate(panels):
        steps = slice(episode * horizon, (episode + 1) * horizon)
        path = np.stack(np.divmod(cells[steps], size), 1)
        end = np.clip(path[-1] + _MOVES[trajectory.action[steps][-1]], 0, size - 1)
        axes.add_patch(_square(goal, "#bfe3c5"))
        axes.plot(*np.concatenate([path, end[None]]).T, marker=".", color="#1f77b4", linewidth=1.2)
        axes.plot(*end, "s", color="#d95f02", markersize=5)
        axes.set_title(f"episode {episode + 1}: {trajectory.reward[steps].sum():.1f}", fontsize=9)
        axes.set(xlim=(-0.5, size - 0.5), ylim=(-0.5, size - 0.5), aspect="equal")
        axes.set_xticks(np.arange(-0.5, size), [])
        axes.set_yticks(np.arange(-0.5, size), [])
        axes.grid(alpha=0.4)


def _square(cell: np.ndarray, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((cell[0] - 0.5, cell[1] - 0.5), 1, 1, color=colour)
