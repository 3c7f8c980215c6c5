"""The outer step that serves every learner, and many of them in one compiled call.

A step draws its tasks on the device, takes the gradient of the mean loss over the task batch and
updates with optax. Its one dial is the task chunk: tasks are vmapped within a chunk and scanned
over chunks with the gradient taken INSIDE the scan's body and accumulated, so memory does not grow
with the task batch and, on a CPU, activations stay in the cache.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from meta_jax.core import Array, Episode, MetaLearner, PyTree

Sampler = Callable[[Array, PyTree], Episode]  # (key, data) -> one episode


class TrainState(NamedTuple):
    """All that training carries from step to step."""

    step: Array  # int32 scalar, outer steps done
    params: PyTree
    state: PyTree
    opt_state: PyTree
    key: Array  # never advances: step s draws from fold_in(key, s)


def init_train_state(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    sampler: Sampler,
    data: PyTree,
    seed: int,
) -> TrainState:
    """The state before the first step.

    Args:
      learner: the method.
      optimizer: the outer optimizer.
      sampler: draws one episode, whose shapes size the parameters.
      data: the sampler's second argument.
      seed: of everything: initial parameters and all tasks.
    """
    key = jax.random.key(seed)
    init_key, episode_key, run_key = jax.random.split(key, 3)
    params, state = learner.init(init_key, sampler(episode_key, data))
    train_state = TrainState(
        jnp.zeros((), jnp.int32), params, state, optimizer.init(params), run_key
    )
    # Leaves may share a buffer (two biases, both zero), which cannot be donated twice.
    return jax.tree.map(jnp.copy, train_state)


def default_task_chunk(task_batch: int, devices: int = 1) -> int:
    """One task for each device on a CPU, whose cache one task fills; all tasks elsewhere."""
    return devices if jax.default_backend() == "cpu" else task_batch


def task_gradients(
    learner: MetaLearner,
    sampler: Sampler,
    params: PyTree,
    state: PyTree,
    data: PyTree,
    keys: Array,
    *,
    task_chunk: int,
    mesh: Mesh | None = None,
) -> tuple[PyTree, PyTree, dict[str, Array]]:
    """Gradient of the mean loss over a batch of freshly drawn tasks.

    Args:
      learner: the method; its `state_scope` must be 'shared'.
      sampler: draws one episode.
      params, state: the learner's.
      data: the sampler's second argument.
      keys: one random key for each task, [task_batch].
      task_chunk: tasks vmapped at a time, on all devices together; divides the task batch.
      mesh: devices to share each chunk among, along an axis 'task'.

    Returns:
      The gradient, the state averaged over tasks, and metrics averaged over tasks (with 'loss').
    """
    if mesh is not None:

        def share(params: PyTree, state: PyTree, data: PyTree, keys: Array) -> tuple:
            chunk = task_chunk // mesh.size
            found = task_gradients(learner, sampler, params, state, data, keys, task_chunk=chunk)
            return jax.lax.pmean(found, "task")

        # Every device runs the program of one, and they meet once. With the default check, JAX
        # would sum gradients of replicated parameters over the devices, the INNER ones too.
        everywhere = PartitionSpec()
        return jax.shard_map(
            share,
            mesh=mesh,
            in_specs=(everywhere, everywhere, everywhere, PartitionSpec("task")),
            out_specs=everywhere,
            check_vma=False,
        )(params, state, data, keys)

    def task(params: PyTree, key: Array) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
        episode_key, loss_key = jax.random.split(key)
        loss, aux = learner.loss(params, state, sampler(episode_key, data), loss_key)
        return loss, (aux.state, {"loss": loss, **aux.metrics})

    def chunk(params: PyTree, keys: Array) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
        losses, aux = jax.vmap(task, (None, 0))(params, keys)
        return losses.mean(), jax.tree.map(lambda a: a.mean(0), aux)

    def one(params: PyTree, keys: Array) -> tuple[Array, tuple[PyTree, dict[str, Array]]]:
        return task(params, keys[0])

    def gradients(keys: Array) -> tuple[PyTree, tuple[PyTree, dict[str, Array]]]:
        # A batch axis of one would cost the compiler its plain matrix products.
        return jax.grad(one if task_chunk == 1 else chunk, has_aux=True)(params, keys)

    chunks = keys.shape[0] // task_chunk
    keys = keys.reshape(chunks, task_chunk)
    if chunks == 1:
        gradient, (state, metrics) = gradients(keys[0])
        return gradient, state, metrics

    def body(total: PyTree, keys: Array) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, gradients(keys)), None

    shapes = jax.eval_shape(gradients, keys[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, keys)
    gradient, (state, metrics) = jax.tree.map(lambda t: t / chunks, total)
    return gradient, state, metrics


def make_outer_step(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    sampler: Sampler,
    *,
    task_batch: int,
    task_chunk: int | None = None,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, PyTree], tuple[TrainState, dict[str, Array]]]:
    """One outer step as a pure function (train state, data) -> (train state, metrics).

    Args:
      learner: the method.
      optimizer: the outer optimizer.
      sampler: draws one episode.
      task_batch: tasks in a step.
      task_chunk: tasks vmapped at a time; by default `default_task_chunk`.
      mesh: from `task_mesh`, to share the tasks among several devices.

    Raises:
      ValueError: where the chunk does not divide the task batch, or the devices the chunk.
    """
    devices = 1 if mesh is None else mesh.size
    task_chunk = task_chunk or default_task_chunk(task_batch, devices)
    if task_batch % task_chunk:
        raise ValueError(f"task chunk {task_chunk} must divide the task batch {task_batch}")
    if task_chunk % devices:
        raise ValueError(f"{devices} devices must divide the task chunk {task_chunk}")

    def outer_step(train_state: TrainState, data: PyTree) -> tuple[TrainState, dict[str, Array]]:
        step, params, state, opt_state, key = train_state
        keys = jax.random.split(jax.random.fold_in(key, step), task_batch)
        gradient, state, metrics = task_gradients(
            learner, sampler, params, state, data, keys, task_chunk=task_chunk, mesh=mesh
        )
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        return TrainState(step + 1, params, state, opt_state, key), metrics

    return outer_step


def make_run(
    outer_step: Callable[[TrainState, PyTree], tuple[TrainState, dict[str, Array]]],
) -> Callable[[TrainState, PyTree, int], tuple[TrainState, dict[str, Array], Array]]:
    """Many outer steps in one compiled call, however many are asked for.

    Args:
      outer_step: from `make_outer_step`.

    Returns:
      A jitted function (train state, data, until) -> (train state, mean metrics, finite). It runs
      up to step `until` and donates the train state it is given. Where a loss is not finite it
      stops behind that step and `finite` is False.
    """

    def run(
        train_state: TrainState, data: PyTree, until: Array
    ) -> tuple[TrainState, dict[str, Array], Array]:
        first = train_state.step

        def body(carry: tuple) -> tuple:
            train_state, total, _ = carry
            train_state, metrics = outer_step(train_state, data)
            finite = jnp.isfinite(metrics["loss"])
            return train_state, jax.tree.map(jnp.add, total, metrics), finite

        metrics = jax.eval_shape(outer_step, train_state, data)[1]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), metrics)
        train_state, total, finite = jax.lax.while_loop(
            lambda carry: (carry[0].step < until) & carry[2],
            body,
            (train_state, zeros, jnp.bool_(True)),
        )
        done = jnp.maximum(train_state.step - first, 1)
        return train_state, jax.tree.map(lambda t: t / done, total), finite

    return jax.jit(run, donate_argnums=0)


def task_mesh(tasks: int, devices: list[jax.Device] | None = None) -> Mesh | None:
    """A mesh with the one axis 'task', over as many devices as share the tasks evenly.

    Args:
      tasks: how many there are to share: a task batch, or the episodes of a test.
      devices: by default all.

    Returns:
      The mesh; None where one device does all.
    """
    devices = jax.devices() if devices is None else devices
    most = max(n for n in range(1, len(devices) + 1) if tasks % n == 0)
    return Mesh(np.array(devices[:most]), ("task",)) if most > 1 else None
