"""Bernoulli bandits: arms that pay 1 with a probability of their own."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from meta_jax.core import Array, PyTree
from meta_jax.lookup import UsageError
from meta_jax.ranges import PositiveInt
from meta_jax.reinforcement.environment import Discrete, Environment, SampleTask
from meta_jax.reinforcement.rollout import Trajectory
from meta_jax.reinforcement.source import environment_tasks

Difficulty = Literal["uniform", "easy", "medium", "hard"]
_WORSE_ARM = {"easy": 0.1, "medium": 0.25, "hard": 0.4}  # its probability; the other has the rest


@environment_tasks("bandit")
def bandit(*, arms: PositiveInt = 5, pulls: PositiveInt = 10) -> Environment:
    """Builds Bernoulli bandits (Duan et al. 2016, table 1).

    A task is a probability for each arm, p_i ~ U[0, 1]. One pull is one episode, and nothing is
    observed but its reward.

    Args:
      arms: Number of arms.
      pulls: Number of pulls of a trial.

    Returns:
      The environment; its tasks are floats [arms].

    Raises:
      UsageError: no arm, or no pull.

    Examples:
      >>> environment = bandit(arms=3)
      >>> task = jnp.array([0.1, 0.75, 0.25])
      >>> float(environment.regret(task, (), jnp.array(2))), environment.episodes
      (0.5, 10)
    """
    return _environment(functools.partial(_uniform_arms, arms), arms, pulls)


@environment_tasks("dependent_bandit")
def dependent_bandit(
    *, difficulty: Difficulty = "uniform", pulls: PositiveInt = 100
) -> Environment:
    """Builds bandits of two arms that pay with probabilities p and 1 - p (Wang et al. 2016, 3.1).

    What one arm pays tells of the other, which strategies for independent arms do not use. Pulls
    are episodes, as in `bandit`.

    Args:
      difficulty: Distribution of p: 'uniform' for U[0, 1]; 'easy' for 0.1 or 0.9, 'medium' for 0.25
        or 0.75, and 'hard' for 0.4 or 0.6, both equally likely.
      pulls: Number of pulls of a trial.

    Returns:
      The environment; its tasks are floats [2].

    Raises:
      UsageError: an unknown difficulty, or no pull.

    Examples:
      >>> task = dependent_bandit(difficulty="medium").sample_task(jax.random.key(0))
      >>> sorted(task.tolist())
      [0.25, 0.75]
    """
    if difficulty not in get_args(Difficulty):
        raise UsageError(
            f"difficulty '{difficulty}' of a dependent bandit must be one of "
            f"{', '.join(get_args(Difficulty))}"
        )
    sample = functools.partial(_dependent_arms, _WORSE_ARM.get(difficulty))
    return _environment(sample, 2, pulls)


def _environment(sample_task: SampleTask, arms: int, pulls: int) -> Environment:
    return Environment(
        sample_task,
        _reset,
        _pull,
        Discrete(arms),
        jax.ShapeDtypeStruct((0,), jnp.result_type(float)),
        horizon=1,
        episodes=pulls,
        expected_reward=_probability,
        regret=_regret,
        optimal_return=jnp.max,
        draw=_draw,
    )


def _uniform_arms(arms: int, key: Array) -> Array:
    return jax.random.uniform(key, (arms,))


def _dependent_arms(worse: float | None, key: Array) -> Array:
    if worse is None:
        p = jax.random.uniform(key)
    else:
        p = jnp.where(jax.random.bernoulli(key), worse, 1 - worse)
    return jnp.stack([p, 1 - p])


def _reset(key: Array, task: PyTree) -> tuple[tuple, Array]:
    del key, task
    return (), jnp.zeros(0)


def _pull(
    key: Array, task: Array, state: tuple, action: Array
) -> tuple[tuple, Array, Array, Array]:
    reward = jax.random.bernoulli(key, task[action]).astype(task.dtype)
    return state, jnp.zeros(0), reward, jnp.bool_(True)


def _probability(task: Array, state: tuple, action: Array) -> Array:
    del state
    return task[action]


def _regret(task: Array, state: tuple, action: Array) -> Array:
    return task.max() - _probability(task, state, action)


def _draw(figure: Any, task: np.ndarray, trajectory: Trajectory) -> None:
    """The pulls of each arm over time; full where they paid."""
    axes = figure.subplots()
    paid = trajectory.reward > 0
    pulls = np.arange(1, len(paid) + 1)
    axes.scatter(pulls[paid], trajectory.action[paid], s=18, color="#1f77b4", label="paid")
    axes.scatter(
        pulls[~paid], trajectory.action[~paid], s=18, facecolors="none", edgecolors="#d62728",
        label="did not pay",
    )  # fmt: skip
    axes.set_yticks(range(len(task)), [f"arm {i + 1}, p = {p:.2f}" for i, p in enumerate(task)])
    axes.set_ylim(-0.5, len(task) - 0.5)
    axes.set_xlabel("pull")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
