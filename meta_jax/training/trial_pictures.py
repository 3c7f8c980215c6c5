"""Pictures of reinforcement learning: trials as a person would look at them, and regret."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from meta_jax.reinforcement.environment import Problem
from meta_jax.reinforcement.evaluation import Trials
from meta_jax.reinforcement.rollout import Trajectory
from meta_jax.training.evaluation import confidence_interval
from meta_jax.training.figures import finish_axes, finish_figure, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure


def trial_picture(
    problem: Problem, trajectories: Mapping[str, Trajectory], path: Path | str | None = None
) -> "Figure":
    """Draws trials of one task side by side, as the environment draws them.

    An environment without a `draw` gets its actions and rewards over time.

    Args:
      problem: The task.
      trajectories: Trials by their titles, such as those before and after adaptation.
      path: The PNG to write, in place of an older one; none by default.

    Returns:
      The figure, which a notebook shows.

    Raises:
      ValueError: there is no trial.
    """
    if not trajectories:
        raise ValueError("there is no trial to draw")
    draw = problem.environment.draw or draw_steps
    task = jax.tree.map(np.asarray, problem.task)
    figure = new_figure(6.4 * len(trajectories), 4.0)
    parts = figure.subfigures(1, len(trajectories), squeeze=False)[0]
    for part, (title, trajectory) in zip(parts, trajectories.items(), strict=True):
        found = jax.tree.map(np.asarray, trajectory)
        part.suptitle(f"{title}: return {found.reward.sum():.4g}")
        draw(part, task, found)
    return finish_figure(figure, path)


def draw_steps(figure: "Figure | SubFigure", task: object, trajectory: Trajectory) -> None:
    """Draws actions and rewards of a trial over its steps; lines mark where episodes begin.

    Args:
      figure: Empty matplotlib figure.
      task: The task, which is not looked at.
      trajectory: The trial, its leaves NumPy arrays.
    """
    del task
    real = trajectory.mask
    above, below = figure.subplots(2, 1, sharex=True)
    actions, rewards = trajectory.action[real], trajectory.reward[real]
    marker, line = (".", "none") if actions.ndim == 1 else ("", "-")
    above.plot(actions, marker=marker, linestyle=line)
    below.plot(rewards, linewidth=1.2)
    for axes, label in ((above, "action"), (below, "reward")):
        for step in np.flatnonzero(trajectory.percept.begins[real])[1:]:
            axes.axvline(step - 0.5, color="0.8", linewidth=0.6)
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    below.set_xlabel("step")


def regret_curves(trials: Mapping[str, Trials], path: Path | str | None = None) -> "Figure":
    """Draws the mean regret up to each step, each with its 95 % interval as a band.

    Args:
      trials: Trials by the name of who played them; those without regret are left out.
      path: The PNG to write, in place of an older one; none by default.

    Returns:
      The figure, which a notebook shows.

    Raises:
      ValueError: there is nothing to draw.
    """
    regrets = {name: found.regret for name, found in trials.items() if found.regret is not None}
    if not regrets:
        raise ValueError("there is no regret to draw")
    figure = new_figure(6.0, 4.2)
    axes = figure.subplots()
    for name, regret in regrets.items():
        mean, ci95 = np.array([confidence_interval(values) for values in regret.T]).T
        steps = np.arange(1, len(mean) + 1)
        (line,) = axes.plot(steps, mean, label=name, linewidth=1.6)
        axes.fill_between(
            steps, mean - ci95, mean + ci95, color=line.get_color(), alpha=0.2, linewidth=0
        )
    axes.set(xlabel="step of the trial", ylabel="regret so far")
    finish_axes(axes)
    return finish_figure(figure, path)
