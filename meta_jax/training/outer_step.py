"""The outer step that serves every learner.

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

from meta_jax.concrete import check_finite
from meta_jax.core import Array, MetaLearner, Metrics, PyTree, Sample, Tasks, Update, with_loss
from meta_jax.data.dataset import HostDataset
from meta_jax.data.streams import (
    EpisodeStream,
    own_data,
    split_tasks,
    task_data,
)
from meta_jax.lookup import UsageError
from meta_jax.training import processes


class TrainState(NamedTuple):
    """All that training carries from step to step.

    Attributes:
      step: Number of outer steps done, an int32 scalar.
      params: Parameters of the learner.
      state: State of the learner; of scope 'task' with a leading axis [task_batch].
      opt_state: State of the outer optimizer.
      key: Random key, which never advances: step s draws from fold_in(key, s).
    """

    step: Array
    params: PyTree
    state: PyTree
    opt_state: PyTree
    key: Array


# (train state, data) -> (train state, metrics)
OuterStep = Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]


def init_train_state(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    tasks: Tasks,
    seed: int,
    *,
    task_batch: int = 1,
) -> TrainState:
    """Builds the state before the first step.

    Args:
      learner: The method.
      optimizer: The outer optimizer.
      tasks: Training tasks, one of which sizes the parameters.
      seed: Seed of everything: initial parameters and all tasks.
      task_batch: Tasks in a step; a learner of state scope 'task' has one state for each.

    Raises:
      UsageError: the learner was built for another objective than that of the tasks.
      ValueError: the tasks draw from numbers that are NaN or infinite.
    """
    _check_objective(learner, tasks)
    check_finite(tasks.data, "the tasks' data")

    @jax.jit  # operation by operation, a network takes seconds; and no two leaves share a buffer
    def start(key: Array, data: PyTree) -> TrainState:
        init_key, task_key, run_key = jax.random.split(key, 3)
        params, state = learner.init(init_key, tasks.sample(task_key, data))
        if learner.state_scope == "task":
            state = jax.tree.map(lambda s: jnp.broadcast_to(s, (task_batch, *s.shape)), state)
        return TrainState(jnp.zeros((), jnp.int32), params, state, optimizer.init(params), run_key)

    task_key = jax.random.split(jax.random.key(seed), 3)[1]
    return start(jax.random.key(seed), task_data(tasks.sample, tasks.data, task_key))


def _check_objective(learner: MetaLearner, tasks: Tasks) -> None:
    """Refuses a learner whose record names another objective, such as its default."""
    own = (learner.config or {}).get("objective")
    if own and tasks.objective.name and own != tasks.objective.name:
        raise UsageError(
            f"the learner was built for {own}, and its tasks ask for {tasks.objective.name}: build "
            "it with objective=tasks.objective"
        )


def default_task_chunk(task_batch: int, devices: int = 1) -> int:
    """One task for each device on a CPU, whose cache one task fills; all tasks elsewhere."""
    return devices if jax.default_backend() == "cpu" else task_batch


# ---- The gradient over a batch of tasks.


def task_gradients(
    learner: MetaLearner,
    sample: Sample,
    params: PyTree,
    state: PyTree,
    data: PyTree,
    keys: Array,
    *,
    task_chunk: int,
    mesh: Mesh | None = None,
) -> tuple[PyTree, PyTree, Metrics]:
    """Takes the gradient of the mean loss over a batch of freshly drawn tasks.

    Args:
      learner: The method.
      sample: Draws one task.
      params, state: The learner's; a state of scope 'task' has a leading axis [task_batch].
      data: What `sample` draws from, or examples gathered for these tasks, from `Buffer.group`.
      keys: One random key for each task, [task_batch].
      task_chunk: Tasks vmapped at a time, on all devices together; divides the task batch.
      mesh: Devices to share each chunk among, along an axis 'task'.

    Returns:
      The gradient; the state, averaged over tasks where its leaves are real and the first task's
      where they are integers (in scope 'task', one state for each task); and metrics averaged over
      tasks, with 'loss'.

    Raises:
      UsageError: a metric has a name of `RESERVED_METRICS`.
      ValueError: a metric is not a scalar.
    """
    shared, own = split_tasks(data)
    gradients = _gradients if mesh is None else functools.partial(_shared_gradients, mesh)
    return gradients(learner, sample, params, state, shared, _Draws(keys, own), task_chunk)


class _Draws(NamedTuple):
    """What each task of a batch is drawn by, leaves [tasks, ...]."""

    keys: Array
    own: PyTree  # its own examples; None where tasks are drawn from shared data alone


def _gradients(
    learner: MetaLearner,
    sample: Sample,
    params: PyTree,
    state: PyTree,
    data: PyTree,
    draws: _Draws,
    task_chunk: int,
) -> tuple[PyTree, PyTree, Metrics]:
    """`task_gradients` on one device."""
    per_task = learner.state_scope == "task"
    chunks = draws.keys.shape[0] // task_chunk
    gradient_of = jax.grad(functools.partial(_chunk_loss, learner, sample), has_aux=True)
    if chunks == 1:
        gradient, (state, metrics) = gradient_of(params, state, data, draws)
        return gradient, state, metrics

    def body(total: PyTree, inputs: tuple[_Draws, PyTree]) -> tuple[PyTree, PyTree]:
        chunk_draws, chunk_states = inputs
        states = chunk_states if per_task else state
        gradient, (states, metrics) = gradient_of(params, states, data, chunk_draws)
        total = jax.tree.map(_add, total, (gradient, {} if per_task else states))
        return total, (states if per_task else {}, metrics)

    inputs = jax.tree.map(
        lambda a: a.reshape(chunks, task_chunk, *a.shape[1:]), (draws, state if per_task else {})
    )
    start = jax.tree.map(_zeros, (params, {} if per_task else state))
    total, (states, metrics) = jax.lax.scan(body, start, inputs)
    gradient, shared = jax.tree.map(lambda t: t / chunks if _is_real(t) else t, total)
    if per_task:
        shared = jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), states)
    return gradient, shared, jax.tree.map(lambda m: m.mean(0), metrics)


def _task_loss(
    learner: MetaLearner, sample: Sample, params: PyTree, state: PyTree, data: PyTree, draw: _Draws
) -> tuple[Array, tuple[PyTree, Metrics]]:
    """(loss, (state, metrics)) of one freshly drawn task."""
    task_key, loss_key = jax.random.split(draw.keys)
    task = sample(task_key, own_data(data, draw.own))
    loss, aux = learner.loss(params, state, task, loss_key)
    for name, metric in aux.metrics.items():
        if jnp.ndim(metric):
            raise ValueError(
                f"metric '{name}' of the learner's loss has shape {list(jnp.shape(metric))}: "
                "reduce it to a scalar for each task"
            )
    return loss, (aux.state, with_loss(loss, aux.metrics))


def _chunk_loss(
    learner: MetaLearner, sample: Sample, params: PyTree, state: PyTree, data: PyTree, draws: _Draws
) -> tuple[Array, tuple[PyTree, Metrics]]:
    """(mean loss, (state, mean metrics)) of the tasks of one chunk."""
    per_task = learner.state_scope == "task"
    task = functools.partial(_task_loss, learner, sample)
    if draws.keys.shape[0] == 1:
        # A batch axis of one would cost the compiler its plain matrix products.
        one = jax.tree.map(lambda s: s[0], state) if per_task else state
        loss, (after, metrics) = task(params, one, data, jax.tree.map(lambda d: d[0], draws))
        return loss, (jax.tree.map(lambda s: s[None], after) if per_task else after, metrics)
    axes = (None, 0 if per_task else None, None, 0)
    losses, (states, metrics) = jax.vmap(task, axes)(params, state, data, draws)
    state = states if per_task else mean_state(states)
    return losses.mean(), (state, jax.tree.map(lambda m: m.mean(0), metrics))


def mean_state(states: PyTree) -> PyTree:
    """Averages a learner's state over tasks; integer leaves are counters, and the first's stay.

    Args:
      states: One state for each task, leaves [tasks, ...].

    Examples:
      >>> state = mean_state({"mean": jnp.array([1.0, 3.0]), "count": jnp.array([5, 5])})
      >>> float(state["mean"]), int(state["count"])
      (2.0, 5)
    """
    return jax.tree.map(lambda s: s.mean(0) if _is_real(s) else s[0], states)


def _shared_gradients(
    mesh: Mesh,
    learner: MetaLearner,
    sample: Sample,
    params: PyTree,
    state: PyTree,
    data: PyTree,
    draws: _Draws,
    task_chunk: int,
) -> tuple[PyTree, PyTree, Metrics]:
    """`task_gradients`, each chunk shared among devices."""
    per_task = learner.state_scope == "task"
    mean = functools.partial(jax.lax.pmean, axis_name="task")

    def share(params: PyTree, state: PyTree, data: PyTree, draws: _Draws) -> tuple:
        chunk = task_chunk // mesh.size
        gradient, state, metrics = _gradients(learner, sample, params, state, data, draws, chunk)
        if not per_task:  # counters are the same on every device
            state = jax.tree.map(lambda s: mean(s) if _is_real(s) else s, state)
        return mean(gradient), state, mean(metrics)

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
    )(params, state, data, draws)


def _is_real(leaf: Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _add(total: Array, new: Array) -> Array:
    return total + new if _is_real(total) else new


def _zeros(leaf: Array) -> Array:
    return jnp.zeros_like(leaf) if _is_real(leaf) else leaf


# ---- The step, and many of them.


def make_outer_step(
    learner: MetaLearner,
    optimizer: optax.GradientTransformation,
    sample: Sample,
    *,
    task_batch: int,
    task_chunk: int | None = None,
    mesh: Mesh | None = None,
) -> OuterStep:
    """Builds one outer step, a pure function (train state, data) -> (train state, metrics).

    Metrics are the learner's, averaged over the tasks, with 'loss' and 'gradient_norm'.

    Args:
      learner: The method.
      optimizer: The outer optimizer. One that takes `value=`, `grad=` or `value_fn=`, as
        `optax.contrib.reduce_on_plateau` and line searches do, gets the mean loss over the step's
        tasks, its gradient, and the loss as a function of the parameters.
      sample: Draws one task.
      task_batch: Tasks in a step.
      task_chunk: Tasks vmapped at a time, on all devices together; raised to the next number that
        they share evenly. By default `default_task_chunk`.
      mesh: Devices that share the tasks, from `task_mesh`.

    Raises:
      ValueError: the task batch or the chunk is below one, or the chunk or the number of devices
        does not divide the task batch.
    """
    chunk = shared_chunk(task_batch, task_chunk, 1 if mesh is None else mesh.size)
    optimizer = optax.with_extra_args_support(optimizer)
    if learner.update is not None:
        return functools.partial(_own_step, learner.update, optimizer, sample, task_batch, mesh)

    def outer_step(train_state: TrainState, data: PyTree) -> tuple[TrainState, Metrics]:
        step, params, state, opt_state, key = train_state
        keys = step_keys(task_batch, key, step)

        def gradients(params: PyTree) -> tuple[PyTree, PyTree, Metrics]:
            return task_gradients(
                learner, sample, params, state, data, keys, task_chunk=chunk, mesh=mesh
            )

        gradient, new_state, metrics = gradients(params)
        updates, opt_state = optimizer.update(
            gradient,
            opt_state,
            params,
            value=metrics["loss"],
            grad=gradient,
            value_fn=_loss_function(gradients),
        )
        params = optax.apply_updates(params, updates)
        metrics = {**metrics, "gradient_norm": gradient_norm(gradient)}
        return TrainState(step + 1, params, new_state, opt_state, key), metrics

    return outer_step


def _own_step(
    update: Update,
    optimizer: optax.GradientTransformationExtraArgs,
    sample: Sample,
    task_batch: int,
    mesh: Mesh | None,
    train_state: TrainState,
    data: PyTree,
) -> tuple[TrainState, Metrics]:
    """One outer step of a learner that has an update of its own."""
    step, params, state, opt_state, key = train_state
    if split_tasks(data)[1] is not None:
        raise UsageError(
            "a learner with an update of its own draws its tasks from all of the data, which must "
            "be on the device: use placement 'device'"
        )
    keys = step_keys(task_batch, key, step)
    params, state, opt_state, metrics = update(
        optimizer, sample, params, state, opt_state, data, keys, mesh=mesh
    )
    return TrainState(step + 1, params, state, opt_state, key), metrics


def step_keys(task_batch: int, key: Array, step: Array) -> Array:
    """The random keys of the tasks of a step, [task_batch].

    Args:
      task_batch: Tasks in a step.
      key: Key of the run.
      step: Number of the step.
    """
    return jax.random.split(jax.random.fold_in(key, step), task_batch)


def training_data(
    tasks: Tasks, *, task_batch: int, mesh: Mesh | None = None
) -> PyTree | EpisodeStream:
    """What outer steps draw their tasks from: the tasks' data, or a stream of those on the host.

    Args:
      tasks: Training tasks.
      task_batch: Tasks in a step.
      mesh: Devices that share the tasks, from `task_mesh`.

    Returns:
      What the function of `make_train_loop` takes as data, and `fit`. Tasks of a stream are those
      that are drawn on the device by the same key.

    Raises:
      UsageError: data are on the host, and grain is not installed, the tasks are of a sampler that
        cannot be streamed, or those of a step need more than the memory that data may take.
    """
    if not isinstance(tasks.data, HostDataset):
        return tasks.data
    keys = functools.partial(step_keys, task_batch)
    return EpisodeStream(tasks.sample, tasks.data, keys, task_batch, mesh=mesh)


def shared_chunk(task_batch: int, task_chunk: int | None, devices: int) -> int:
    """The task chunk that devices share: the one asked for, or the next that they share evenly.

    Args:
      task_batch: Tasks in a step.
      task_chunk: Tasks vmapped at a time; None for `default_task_chunk`.
      devices: Number of devices.

    Raises:
      ValueError: a number is below one, or does not divide the task batch.

    Examples:
      >>> shared_chunk(8, 1, 4)  # every device takes a task
      4
    """
    for name, value in (("task_batch", task_batch), ("task_chunk", task_chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if task_chunk is None:
        task_chunk = default_task_chunk(task_batch, devices)
    if task_batch % task_chunk:
        raise ValueError(f"task chunk {task_chunk} must divide the task batch {task_batch}")
    if task_batch % devices:
        raise ValueError(f"{devices} devices must divide the task batch {task_batch}")
    # A device takes one task at a time at least.
    share = task_batch // devices
    least = -(-task_chunk // devices)
    return devices * next(n for n in range(least, share + 1) if share % n == 0)


def _loss_function(
    gradients: Callable[[PyTree], tuple[PyTree, PyTree, Metrics]],
) -> Callable[[PyTree], Array]:
    """The loss as a function of the parameters, whose derivative is the gradient taken in chunks.

    It is traced only by an optimizer that calls it.
    """

    @jax.custom_vjp
    def loss(params: PyTree) -> Array:
        return gradients(params)[2]["loss"]

    def forward(params: PyTree) -> tuple[Array, PyTree]:
        gradient, _, metrics = gradients(params)
        return metrics["loss"], gradient

    def backward(gradient: PyTree, cotangent: Array) -> tuple[PyTree]:
        return (jax.tree.map(lambda g: cotangent.astype(g.dtype) * g, gradient),)

    loss.defvjp(forward, backward)
    return loss


def gradient_norm(gradient: PyTree) -> Array:
    """Euclidean norm over all leaves, in float32 at least: squares overflow sooner in less.

    Examples:
      >>> float(gradient_norm({"a": jnp.array([300.0, 400.0], jnp.float16)}))
      500.0
    """
    wide = (g.astype(jnp.promote_types(g.dtype, jnp.float32)) for g in jax.tree.leaves(gradient))
    return jnp.sqrt(sum(((g * g).sum() for g in wide), jnp.zeros((), jnp.float32)))


# ---- Several devices.


def place(
    train_state: TrainState, data: PyTree, mesh: Mesh, *, per_task: bool = False
) -> tuple[TrainState, PyTree]:
    """Puts a train state and the data on every device of a mesh.

    Args:
      train_state: State from `init_train_state`.
      data: What the tasks are drawn from, from `training_data`.
      mesh: Devices, from `task_mesh`.
      per_task: Whether the learner's state scope is 'task': each device has its own tasks' states.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = NamedSharding(mesh, PartitionSpec("task")) if per_task else everywhere
    placed = processes.put(train_state._replace(state=()), everywhere)
    placed = placed._replace(state=processes.put(train_state.state, state))
    if isinstance(data, EpisodeStream):  # its buffers are where it was told to put them
        return placed, data
    return placed, processes.put(data, everywhere)


def task_mesh(tasks: int, devices: list[jax.Device] | None = None) -> Mesh | None:
    """Builds a mesh with the one axis 'task', over as many devices as share the tasks evenly.

    Of several processes each has equally many devices in it. Where the processes cannot share the
    tasks evenly, the mesh has this process's devices alone, and each does all of them.

    Args:
      tasks: How many there are to share: a task batch, or the episodes of a test.
      devices: Candidates; by default all, of all processes.

    Returns:
      The mesh; None where one device does all.
    """
    devices = jax.devices() if devices is None else devices
    owners = sorted({device.process_index for device in devices})
    if tasks % len(owners):
        return task_mesh(tasks, [d for d in devices if d.process_index == jax.process_index()])
    of_each = [[d for d in devices if d.process_index == owner] for owner in owners]
    share = tasks // len(owners)
    most = max(n for n in range(1, min(map(len, of_each)) + 1) if share % n == 0)
    chosen = [device for owned in of_each for device in owned[:most]]
    return Mesh(np.array(chosen), ("task",)) if len(chosen) > 1 else None
