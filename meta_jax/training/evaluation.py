"""Testing a learner: fixed seed, many episodes, a mean with its confidence interval."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meta_jax.core import Array, MetaLearner, Metrics, PyTree, Sample, Tasks
from meta_jax.training.optimizers import averaged_params
from meta_jax.training.outer_step import TrainState

# (params, state, data, key) -> metrics, each [episodes]
EvaluateEpisodes = Callable[[PyTree, PyTree, PyTree, Array], dict[str, np.ndarray]]


class MeanCI(NamedTuple):
    """A mean over episodes and the half-width of its 95 % confidence interval."""

    mean: float
    ci95: float


def confidence_interval(values: np.ndarray) -> MeanCI:
    """Mean and 1.96 s / sqrt(n) of one value for each episode.

    Args:
      values: [n], n at least 2.

    Raises:
      ValueError: the values are no vector of at least two.

    Examples:
      >>> mean, ci95 = confidence_interval(np.array([0.0, 1.0, 0.0, 1.0]))
      >>> mean, round(ci95, 4)
      (0.5, 0.5658)
    """
    values = np.asarray(values)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(
            f"values must be [n] with one for each of at least 2 episodes, not {list(values.shape)}"
        )
    return MeanCI(float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(len(values))))


def make_evaluate(
    learner: MetaLearner, sample: Sample, *, episodes: int, mesh: Mesh | None = None
) -> EvaluateEpisodes:
    """Builds a compiled test of a learner on freshly drawn tasks; parameters stay as they are.

    Args:
      learner: The method, whose own `evaluate` says what is measured on a task.
      sample: Draws one test task.
      episodes: How many are drawn.
      mesh: Devices that share the episodes, from `task_mesh`.

    Returns:
      A function (params, state, data, key) -> metrics, each [episodes]. The same key draws the
      same tasks.

    Raises:
      ValueError: there is no episode, or the devices do not share them evenly.
    """
    devices = 1 if mesh is None else mesh.size
    if episodes < 1 or episodes % devices:
        raise ValueError(f"{devices} devices must divide {episodes} episodes, of at least 1")
    chunk = 1 if jax.default_backend() == "cpu" else min(32, episodes)

    def share(params: PyTree, state: PyTree, data: PyTree, keys: Array) -> Metrics:
        def episode(key: Array) -> Metrics:
            task_key, evaluate_key = jax.random.split(key)
            return learner.evaluate(params, state, sample(task_key, data), evaluate_key)

        return jax.lax.map(episode, keys, batch_size=None if chunk == 1 else chunk)

    if mesh is not None:
        everywhere, each = PartitionSpec(), PartitionSpec("task")
        share = jax.shard_map(
            share,
            mesh=mesh,
            in_specs=(everywhere, everywhere, everywhere, each),
            out_specs=each,
            check_vma=False,
        )

    @jax.jit
    def evaluate(params: PyTree, state: PyTree, data: PyTree, key: Array) -> Metrics:
        return share(params, state, data, jax.random.split(key, episodes))

    def placed(params: PyTree, state: PyTree, data: PyTree, key: Array) -> dict[str, np.ndarray]:
        arguments = (params, state, data, key)
        if mesh is not None:
            arguments = jax.device_put(arguments, NamedSharding(mesh, PartitionSpec()))
        return jax.tree.map(np.asarray, evaluate(*arguments))

    return placed


def make_validate(
    learner: MetaLearner, tasks: Tasks, *, episodes: int, seed: int = 0, mesh: Mesh | None = None
) -> Callable[[TrainState], dict[str, float]]:
    """Builds the validation that `fit` takes: means over the same tasks at every call.

    Where the optimizer averages the parameters, the averages are tested.

    Args:
      learner: The method.
      tasks: Validation tasks.
      episodes: How many are drawn.
      seed: Seed of the tasks.
      mesh: Devices that share the episodes, from `task_mesh`.

    Returns:
      A function train state -> metrics.
    """
    evaluate = make_evaluate(learner, tasks.sample, episodes=episodes, mesh=mesh)

    def validate(train_state: TrainState) -> dict[str, float]:
        # Folded, so that no test with the same seed has the same tasks.
        key = jax.random.fold_in(jax.random.key(seed), 0)
        metrics = evaluate(averaged_params(train_state), train_state.state, tasks.data, key)
        return {name: float(values.mean()) for name, values in metrics.items()}

    return validate
