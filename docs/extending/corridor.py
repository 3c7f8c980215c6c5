"""An environment of one's own: a corridor whose better end must be found, and then remembered.

python -m experiments.train --learner=rl2 --tasks=docs.extending.corridor:corridor_tasks
"""

import functools

import jax
import jax.numpy as jnp

from meta_jax.core import Array
from meta_jax.data import TaskSource
from meta_jax.reinforcement import Discrete, Environment, source_from_environment


def corridor(*, length: int = 5, episodes: int = 3) -> Environment:
    """Builds corridors: a task says which end has the prize, 1; the other one has nothing.

    An episode begins in the middle and lasts until an end is reached, or `length` steps.
    """
    observation = jax.ShapeDtypeStruct((1,), jnp.float32)
    return Environment(
        sample_task=lambda key: jax.random.bernoulli(key),
        reset=functools.partial(_reset, length),
        step=functools.partial(_step, length),
        actions=Discrete(2),
        observation=observation,
        horizon=length,
        episodes=episodes,
        optimal_return=lambda task: jnp.ones(()),
    )


def corridor_tasks(*, length: int = 5, episodes: int = 3) -> TaskSource:
    """Builds the source of corridors that --tasks names.

    Args:
      length: Number of places; an odd number.
      episodes: Number of episodes of a trial.
    """
    return source_from_environment(corridor(length=length, episodes=episodes))


def _reset(length: int, key: Array, task: Array) -> tuple[Array, Array]:
    place = jnp.int32(length // 2)
    return place, _see(length, place)


def _see(length: int, place: Array) -> Array:
    return (2 * place / (length - 1) - 1)[None].astype(jnp.float32)


def _step(
    length: int, key: Array, task: Array, place: Array, action: Array
) -> tuple[Array, Array, Array, Array]:
    place = place + 2 * action - 1
    at_end = (place == 0) | (place == length - 1)
    prize = jnp.where(task, length - 1, 0)
    reward = (place == prize).astype(jnp.float32)
    return place, _see(length, place), reward, at_end
