"""Environments of gymnax (https://github.com/RobertTLange/gymnax), where it is installed."""

import functools
from importlib import metadata
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from meta_jax.core import Array, PyTree
from meta_jax.lookup import UsageError, import_extra
from meta_jax.ranges import PositiveInt
from meta_jax.reinforcement.environment import Actions, Continuous, Discrete, Environment
from meta_jax.reinforcement.source import environment_tasks


class SampleParameters(Protocol):
    """(key, parameters) -> parameters."""

    def __call__(self, key: Array, parameters: Any, /) -> Any:
        """Parameters of one task, from the usual ones of an environment."""
        ...


@environment_tasks("gymnax")
def gymnax_environment(
    name: str,
    /,
    *,
    episodes: PositiveInt = 2,
    horizon: PositiveInt | None = None,
    sample_parameters: SampleParameters | None = None,
) -> Environment:
    """Builds an environment of gymnax 1.0 or later.

    A task is the environment's parameters, such as lengths and masses. Observations are flattened
    to float vectors. `done` is True where gymnax terminates or truncates an episode, and at the
    horizon.

    Args:
      name: Name in gymnax, such as 'CartPole-v1'.
      episodes: Number of episodes of a trial.
      horizon: Largest number of steps of an episode; the environment's own by default.
      sample_parameters: Function (key, parameters) -> parameters that draws a task from the usual
        parameters, with their `replace`; all tasks are the usual ones by default.

    Returns:
      The environment.

    Raises:
      UsageError: gymnax is not installed or older than 1.0, it has no such environment, the
        environment has no limit of steps and none is given, or its actions or observations are
        neither numbers nor arrays.
    """
    made, parameters = _make(name)
    parameters = jax.tree.map(jnp.asarray, parameters)
    if horizon is None:
        horizon = int(getattr(parameters, "max_steps_in_episode", 0))
    if min(episodes, horizon) < 1:
        raise UsageError(
            f"{name} of gymnax needs at least 1 episode and a horizon of at least 1: "
            f"episodes={episodes}, horizon={horizon}"
        )
    space = made.action_space(parameters)
    observed = jax.eval_shape(made.reset, jax.random.key(0), parameters)[0]
    if not hasattr(observed, "size"):
        raise UsageError(f"{name} of gymnax observes {type(observed).__name__}: take one of arrays")
    return Environment(
        functools.partial(_sample, parameters, sample_parameters),
        functools.partial(_reset, made),
        functools.partial(_step, made, horizon, space.shape),
        _actions(name, space),
        jax.ShapeDtypeStruct((observed.size,), jnp.float32),
        horizon=horizon,
        episodes=episodes,
    )


def _make(name: str) -> tuple[Any, Any]:
    """An environment of gymnax and its usual parameters."""
    gymnax = import_extra("gymnax", "gymnax", name)
    version = metadata.version("gymnax")
    if int(version.split(".")[0]) < 1:
        raise UsageError(
            f"{name} needs gymnax 1.0 or later, not {version}: pip install 'meta_jax[gymnax]'"
        )
    try:
        return gymnax.make(name)
    except ValueError as error:
        raise UsageError(
            f"gymnax has no environment '{name}': take one of {', '.join(gymnax.registered_envs)}"
        ) from error


def _actions(name: str, space: Any) -> Actions:
    if hasattr(space, "n"):
        return Discrete(space.n)
    if not hasattr(space, "low"):
        raise UsageError(f"{name} of gymnax has actions of {space}: take one of numbers or vectors")
    size = 1
    for length in space.shape:
        size *= length
    return Continuous(size)


def _sample(parameters: Any, sample_parameters: SampleParameters | None, key: Array) -> Any:
    return parameters if sample_parameters is None else sample_parameters(key, parameters)


def _strong(tree: PyTree) -> PyTree:
    """The same arrays with types that no operation changes: Python's numbers have weak ones."""
    return jax.tree.map(_strong_array, tree)


def _strong_array(leaf: Any) -> Array:
    array = jnp.asarray(leaf)
    return jax.lax.convert_element_type(array, array.dtype)


def _vector(observation: Array) -> Array:
    return jnp.ravel(observation).astype(jnp.float32)


def _reset(made: Any, key: Array, task: Any) -> tuple[PyTree, Array]:
    observation, state = made.reset(key, task)
    return (_strong(state), jnp.zeros((), jnp.int32)), _vector(observation)


def _step(
    made: Any,
    horizon: int,
    shape: tuple[int, ...],
    key: Array,
    task: Any,
    state: PyTree,
    action: Array,
) -> tuple[PyTree, Array, Array, Array]:
    inner, time = state
    _, inner, reward, terminated, truncated, info = made.step(
        key, inner, jnp.reshape(action, shape), task
    )
    time = time + 1
    # Gymnax has reset itself where the episode is done; the last observation is apart.
    observation = _vector(info["final_observation"])
    done = jnp.asarray(terminated | truncated, bool) | (time >= horizon)
    return (_strong(inner), time), observation, jnp.asarray(reward, jnp.float32), done
