"""The outer step that serves every learner, and many of them in one compiled call.

A step draws its tasks on the device, takes the gradient of the mean loss over the task batch and
updates with optax. Its one dial is the task chunk: tasks are vmapped within a chunk and scanned
over chunks with the gradient taken INSIDE the scan's body and accumulated, so memory does not grow
with the task batch and, on a CPU, activations stay in the cache.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meta_jax.core import Array, Episode, MetaLearner, PyTree

Sampler = Callable[[Array, PyTree], Episode]  # (key, data) -> one episode


class TrainState(NamedTuple):
    """All that training carries from step to step."""

    step: Array  # int32 scalar, outer steps done
    params: PyTree
    state: PyTree  # the learner's; of scope 'task' with a leading axis [task_batch]
    opt_state: PyTree
    key: Array  # never advances: step s draws from fold_in(key, s)


def init_train_state(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    sampler: Sampler,
    data: PyTree,
    seed: int,
    *,
    task_batch: int = 1,
) -> TrainState:
    """The state before the first step.

    Args:
      learner: the method.
      optimizer: the outer optimizer.
      sampler: draws one episode, whose shapes size the parameters.
      data: the sampler's second argument.
      seed: of everything: initial parameters and all tasks.
      task_batch: tasks in a step; a learner of state scope 'task' has one state for each.
    """

    @jax.jit  # operation by operation, a network takes seconds; and no two leaves share a buffer
    def start(key: Array, data: PyTree) -> TrainState:
        init_key, episode_key, run_key = jax.random.split(key, 3)
        params, state = learner.init(init_key, sampler(episode_key, data))
        if learner.state_scope == "task":
            state = jax.tree.map(lambda s: jnp.broadcast_to(s, (task_batch, *s.shape)), state)
        return TrainState(jnp.zeros((), jnp.int32), params, state, optimizer.init(params), run_key)

    return start(jax.random.key(seed), data)


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
      learner: the method.
      sampler: draws one episode.
      params, state: the learner's; a state of scope 'task' has a leading axis [task_batch].
      data: the sampler's second argument.
      keys: one random key for each task, [task_batch].
      task_chunk: tasks vmapped at a time, on all devices together; divides the task batch.
      mesh: devices to share each chunk among, along an axis 'task'.

    Returns:
      The gradient, the state (averaged over tasks, or one for each in scope 'task'), and metrics
      averaged over tasks (with 'loss').
    """
    per_task = learner.state_scope == "task"
    if mesh is not None:

        def share(params: PyTree, state: PyTree, data: PyTree, keys: Array) -> tuple:
            chunk = task_chunk // mesh.size
            found = task_gradients(learner, sampler, params, state, data, keys, task_chunk=chunk)
            mean = functools.partial(jax.lax.pmean, axis_name="task")
            gradient, state, metrics = found
            return mean(gradient), state if per_task else mean(state), mean(metrics)

        # Every device runs the program of one, and they meet once. With the default check, JAX
        # would sum gradients of replicated parameters over the devices, the INNER ones too.
        everywhere, each = PartitionSpec(), PartitionSpec("task")
        of_state = each if per_task else everywhere
        return jax.shard_map(
            share,
            mesh=mesh,
            in_specs=(everywhere, of_state, everywhere, each),
            out_specs=(everywhere, of_state, everywhere),
            check_vma=False,
        )(params, state, data, keys)

    def task(params: PyTree, state: PyTree, key: Array) -> tuple[Array, tuple]:
        episode_key, loss_key = jax.random.split(key)
        loss, aux = learner.loss(params, state, sampler(episode_key, data), loss_key)
        return loss, (aux.state, {"loss": loss, **aux.metrics})

    def chunk(params: PyTree, states: PyTree, keys: Array) -> tuple[Array, tuple]:
        axes = (None, 0 if per_task else None, 0)
        losses, (states, metrics) = jax.vmap(task, axes)(params, states, keys)
        mean = functools.partial(jax.tree.map, lambda a: a.mean(0))
        return losses.mean(), (states if per_task else mean(states), mean(metrics))

    def one(params: PyTree, states: PyTree, keys: Array) -> tuple[Array, tuple]:
        first = jax.tree.map(lambda s: s[0], states) if per_task else states
        loss, (after, metrics) = task(params, first, keys[0])
        return loss, (jax.tree.map(lambda s: s[None], after) if per_task else after, metrics)

    def gradients(keys: Array, states: PyTree) -> tuple[PyTree, PyTree, dict[str, Array]]:
        # A batch axis of one would cost the compiler its plain matrix products.
        grad = jax.grad(one if task_chunk == 1 else chunk, has_aux=True)
        gradient, (states, metrics) = grad(params, states if per_task else state, keys)
        return gradient, states, metrics

    chunks = keys.shape[0] // task_chunk

    def split(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda a: a.reshape(chunks, task_chunk, *a.shape[1:]), tree)

    inputs = split((keys, state if per_task else {}))
    if chunks == 1:
        return gradients(*jax.tree.map(lambda a: a[0], inputs))

    def body(total: PyTree, inputs: tuple[Array, PyTree]) -> tuple[PyTree, PyTree]:
        gradient, states, metrics = gradients(*inputs)
        summed = gradient, {} if per_task else states
        return jax.tree.map(jnp.add, total, summed), (states if per_task else {}, metrics)

    zeros = jax.tree.map(jnp.zeros_like, (params, {} if per_task else state))
    total, (states, metrics) = jax.lax.scan(body, zeros, inputs)
    gradient, shared = jax.tree.map(lambda t: t / chunks, total)
    if per_task:
        shared = jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), states)
    return gradient, shared, jax.tree.map(lambda m: m.mean(0), metrics)


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
        # Traced once for the shapes and the loop alike.
        traced_step = jax.jit(outer_step, inline=True)

        def body(carry: tuple) -> tuple:
            train_state, total, _ = carry
            train_state, metrics = traced_step(train_state, data)
            finite = jnp.isfinite(metrics["loss"])
            return train_state, jax.tree.map(jnp.add, total, metrics), finite

        metrics = jax.eval_shape(traced_step, train_state, data)[1]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), metrics)
        train_state, total, finite = jax.lax.while_loop(
            lambda carry: (carry[0].step < until) & carry[2],
            body,
            (train_state, zeros, jnp.bool_(True)),
        )
        done = jnp.maximum(train_state.step - first, 1)
        return train_state, jax.tree.map(lambda t: t / done, total), finite

    return jax.jit(run, donate_argnums=0)


def place(
    train_state: TrainState, data: PyTree, mesh: Mesh, *, per_task: bool = False
) -> tuple[TrainState, PyTree]:
    """Puts a train state and the data on every device of a mesh.

    Args:
      train_state: of `init_train_state`.
      data: the sampler's second argument.
      mesh: of `task_mesh`.
      per_task: whether the learner's state scope is 'task': each device has its own tasks' states.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = NamedSharding(mesh, PartitionSpec("task")) if per_task else everywhere
    placed = jax.device_put(train_state._replace(state=()), everywhere)
    placed = placed._replace(state=jax.device_put(train_state.state, state))
    return placed, jax.device_put(data, everywhere)


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
