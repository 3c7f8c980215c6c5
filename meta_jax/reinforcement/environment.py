"""The environment of reinforcement learning: a family of decision problems, as pure functions.

One decision problem is a task. An episode is one run through it; a trial is several episodes of the
same task, over which a learner keeps what it has learned.
"""

from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp

from meta_jax.core import Array, Config, PyTree
from meta_jax.lookup import UsageError


class Discrete(NamedTuple):
    """Actions 0, 1, ..., n - 1.

    Attributes:
      n: Number of actions.
    """

    n: int


class Continuous(NamedTuple):
    """Actions that are vectors of real numbers.

    Attributes:
      size: Length of the vector.
    """

    size: int


Actions = Discrete | Continuous


class SampleTask(Protocol):
    """(key) -> task."""

    def __call__(self, key: Array, /) -> PyTree:
        """Draws one decision problem: arrays, without a task axis."""
        ...


class Reset(Protocol):
    """(key, task) -> (state, observation)."""

    def __call__(self, key: Array, task: PyTree, /) -> tuple[PyTree, Array]:
        """The start of an episode."""
        ...


class Step(Protocol):
    """(key, task, state, action) -> (state, observation, reward, done)."""

    def __call__(
        self, key: Array, task: PyTree, state: PyTree, action: Array, /
    ) -> tuple[PyTree, Array, Array, Array]:
        """One step of an episode: what the action leads to."""
        ...


class OfAction(Protocol):
    """(task, state, action) -> scalar."""

    def __call__(self, task: PyTree, state: PyTree, action: Array, /) -> Array:
        """A number that is known of an action before it is taken."""
        ...


class OfTask(Protocol):
    """(task) -> scalar."""

    def __call__(self, task: PyTree, /) -> Array:
        """A number that is known of a task."""
        ...


class Draw(Protocol):
    """(figure, task, trajectory)."""

    def __call__(self, figure: Any, task: PyTree, trajectory: Any, /) -> None:
        """Draws a trial into an empty matplotlib figure; leaves are NumPy arrays."""
        ...


class Environment(NamedTuple):
    """A family of decision problems, as pure functions of one task.

    Attributes:
      sample_task: Function (key) -> task.
      reset: Function (key, task) -> (state, observation), the start of an episode.
      step: Function (key, task, state, action) -> (state, observation, reward, done); reward is a
        float scalar, done a bool scalar that is True at the last step of an episode.
      actions: Actions there are.
      observation: Shape and type of an observation; float vectors [size].
      horizon: Largest number of steps of an episode.
      episodes: Number of episodes of a trial.
      expected_reward: Function (task, state, action) -> mean of the reward; None if unknown.
      regret: Function (task, state, action) -> what the action loses of the best return that is
        left in the episode, at least 0; None if unknown.
      optimal_return: Function (task) -> largest expected return of an episode, for a policy that
        knows the task; None if unknown.
      draw: Function (figure, task, trajectory) that draws a trial into a matplotlib figure; None
        for a picture of actions and rewards over time.
      config: Name and settings of the environment, where a registered factory built it.
    """

    sample_task: SampleTask
    reset: Reset
    step: Step
    actions: Actions
    observation: jax.ShapeDtypeStruct
    horizon: int
    episodes: int
    expected_reward: OfAction | None = None
    regret: OfAction | None = None
    optimal_return: OfTask | None = None
    draw: Draw | None = None
    config: Config | None = None


@jax.tree_util.register_pytree_node_class
class Problem:
    """One task of reinforcement learning: a decision problem and the environment it is of.

    Its leaves are those of the decision problem, so that it is mapped over tasks as any task; the
    environment, a tuple of functions, is part of its structure.

    Attributes:
      environment: The environment.
      task: The decision problem, from the environment's `sample_task`.
    """

    def __init__(self, environment: Environment, task: PyTree) -> None:
        """Joins a decision problem and its environment."""
        self.environment = environment
        self.task = task

    def tree_flatten(self) -> tuple[tuple[PyTree], Environment]:
        """Splits it into leaves and structure."""
        return (self.task,), self.environment

    @classmethod
    def tree_unflatten(cls, environment: Environment, children: tuple[PyTree]) -> "Problem":
        """Puts it together again."""
        return cls(environment, *children)


def check_environment(environment: Environment) -> None:
    """Refuses an environment whose functions do not fit each other.

    Args:
      environment: The environment.

    Raises:
      UsageError: its numbers are below one, or an observation, a reward or `done` has another shape
        or type than said.
    """
    for name in ("horizon", "episodes"):
        if getattr(environment, name) < 1:
            raise UsageError(
                f"{name} of an environment must be at least 1, not {getattr(environment, name)}"
            )
    key = jax.random.key(0)
    action = jnp.maximum(no_action(environment.actions), 0)

    def start(key: Array) -> tuple[PyTree, Any, Any]:
        task = environment.sample_task(key)
        state, observation = environment.reset(key, task)
        return state, observation, environment.step(key, task, state, action)

    state, observation, after = jax.eval_shape(start, key)
    next_state, next_observation, reward, done = after
    for what, found in (("reset", observation), ("step", next_observation)):
        wanted = environment.observation
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise UsageError(
                f"{what} of the environment gives observations {found.dtype}{list(found.shape)}, "
                f"and the environment says {wanted.dtype}{list(wanted.shape)}"
            )
    if reward.shape or not jnp.issubdtype(reward.dtype, jnp.floating):
        raise UsageError(f"a reward must be a float scalar, not {reward.dtype}{list(reward.shape)}")
    if done.shape or done.dtype != bool:
        raise UsageError(f"done must be a bool scalar, not {done.dtype}{list(done.shape)}")
    try:
        chex.assert_trees_all_equal_shapes_and_dtypes(state, next_state)
    except AssertionError as error:
        raise UsageError(
            "step must keep the structure, shapes and types of the environment's state"
        ) from error


def no_action(actions: Actions) -> Array:
    """What stands for the last action where there was none: -1, or zeros."""
    if isinstance(actions, Discrete):
        return jnp.full((), -1, jnp.int32)
    return jnp.zeros(actions.size)
