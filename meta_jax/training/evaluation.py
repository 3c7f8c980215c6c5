"""Testing a learner: fixed seed, many episodes, a mean with its confidence interval."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meta_jax.concrete import check_finite
from meta_jax.core import (
    Array,
    MetaLearner,
    Metrics,
    Objective,
    PyTree,
    Sample,
    Tasks,
    supervised_evaluate,
)
from meta_jax.data.dataset import HostDataset
from meta_jax.data.streams import (
    Buffer,
    EpisodeStream,
    key_bits,
    own_data,
    split_tasks,
    tasks_that_fit,
)
from meta_jax.host import naming_dials
from meta_jax.training import processes
from meta_jax.training.optimizers import averaged_params
from meta_jax.training.outer_step import TrainState

# (params, state, data, key) -> metrics, each [episodes]
EvaluateEpisodes = Callable[[PyTree, PyTree, PyTree, Array], dict[str, np.ndarray]]

_DIALS = "lower --eval_chunk (--val_chunk of a validation), give --query_chunk, or take fewer shots"
_LARGEST_CHUNK = 32  # episodes at a time where none is given: more do not make a GPU faster
# Bytes of temporaries that these may take: half of a GPU of 12 GB. JAX claims three quarters of it,
# and parameters and data lie there too.
_MEMORY = 6 * 10**9


class MeanCI(NamedTuple):
    """A mean over episodes and the half-width of its 95 % confidence interval.

    Attributes:
      mean: Mean over the episodes.
      ci95: Half-width of the interval.
    """

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
    learner: MetaLearner,
    sample: Sample,
    *,
    episodes: int,
    mesh: Mesh | None = None,
    chunk: int | None = None,
) -> EvaluateEpisodes:
    """Builds a compiled test of a learner on freshly drawn tasks; parameters stay as they are.

    Args:
      learner: The method, whose own `evaluate` says what is measured on a task.
      sample: Draws one test task.
      episodes: How many are drawn.
      mesh: Devices that share the episodes, from `task_mesh`.
      chunk: Episodes that a device evaluates at a time; the result does not depend on it. By
        default 1 on a CPU, whose cache one fills, and elsewhere up to 32, as many as fit 12 GB.

    Returns:
      A function (params, state, data, key) -> metrics, each [episodes]. The same key draws the
      same tasks. Data may be a `HostDataset`, whose episodes are gathered while others are tested.

    Raises:
      ValueError: there is no episode, the devices do not share them evenly, or a chunk has none.
        The function raises `OutOfMemoryError` where a chunk needs more memory than there is.
    """
    devices = 1 if mesh is None else mesh.size
    if episodes < 1 or episodes % devices:
        raise ValueError(f"{devices} devices must divide {episodes} episodes, of at least 1")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 episode")
    build = functools.cache(
        functools.partial(_in_chunks, learner, sample, episodes=episodes, mesh=mesh)
    )
    most = episodes // devices
    chosen = [] if chunk is None else [min(chunk, most)]
    if not chosen and jax.default_backend() == "cpu":
        chosen = [1]
    streams = functools.cache(
        functools.partial(_stream, sample, episodes=episodes, chunk=chunk, mesh=mesh)
    )

    place = processes.local
    if mesh is not None:
        place = functools.partial(processes.put, sharding=NamedSharding(mesh, PartitionSpec()))

    def evaluate(params: PyTree, state: PyTree, data: PyTree, key: Array) -> dict[str, np.ndarray]:
        if isinstance(data, HostDataset):
            blocks = _gathered_blocks(streams(data), key, episodes)
        else:
            blocks = [place(data)]
        params, state, key = place((params, state, key))
        parts = []
        for number, block in enumerate(blocks):
            arguments = (params, state, block, key, number)
            with naming_dials("testing the episodes", _DIALS):
                if not chosen:
                    chosen.append(fitting_chunk(build, arguments, min(_LARGEST_CHUNK, most)))
                parts.append(jax.tree.map(processes.gathered, build(chosen[0])(*arguments)))
        return jax.tree.map(lambda *values: np.concatenate(values)[:episodes], *parts)

    return evaluate


def _stream(
    sample: Sample, data: HostDataset, *, episodes: int, chunk: int | None, mesh: Mesh | None
) -> EpisodeStream:
    """The episodes of a test in blocks, which follow each other."""
    devices = 1 if mesh is None else mesh.size
    at_once = chunk or tasks_that_fit(sample, data, _LARGEST_CHUNK)
    block = devices * min(at_once, episodes // devices)
    keys = functools.partial(_block_keys, episodes, block)
    return EpisodeStream(sample, data, keys, block, mesh=mesh, most_groups=1)


def _gathered_blocks(stream: EpisodeStream, key: Array, episodes: int) -> Iterator[PyTree]:
    bits = key_bits(key)
    for number in range(-(-episodes // stream.tasks)):
        yield stream.at(bits, number)[1]
    stream.close()


def _block_keys(episodes: int, block: int, key: Array, number: Array) -> Array:
    """The random keys of a block of a test's episodes; the last block is filled with the first."""
    rows = (number * block + jnp.arange(block)) % episodes
    return jax.random.split(key, episodes)[rows]


def _in_chunks(
    learner: MetaLearner, sample: Sample, chunk: int, *, episodes: int, mesh: Mesh | None
) -> Any:
    """The jitted test of some episodes, `chunk` of them vmapped at a time on each device."""

    def share(params: PyTree, state: PyTree, data: PyTree, draws: tuple[Array, PyTree]) -> Metrics:
        def episode(draw: tuple[Array, PyTree]) -> Metrics:
            key, own = draw
            task_key, evaluate_key = jax.random.split(key)
            task = sample(task_key, own_data(data, own))
            return learner.evaluate(params, state, task, evaluate_key)

        return jax.lax.map(episode, draws, batch_size=None if chunk == 1 else chunk)

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
    def evaluate(params: PyTree, state: PyTree, data: PyTree, key: Array, number: Array) -> Metrics:
        whole, own = split_tasks(data.group(number) if isinstance(data, Buffer) else data)
        block = episodes if own is None else jax.tree.leaves(own)[0].shape[0]
        return share(params, state, whole, (_block_keys(episodes, block, key, number), own))

    return evaluate


def in_query_chunks(learner: MetaLearner, objective: Objective, chunk: int) -> MetaLearner:
    """A learner whose tests answer some queries at a time: less memory, the same answers.

    It is for learners whose answers do not depend on the other queries, and whose test is the
    objective of the answers.

    Args:
      learner: The method.
      objective: Objective of the tests.
      chunk: Queries that are answered at a time; the last ones are filled up with zeros.

    Returns:
      The learner; its `predict` gives no state.

    Raises:
      ValueError: a chunk has no query.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1 query")

    def predict(
        params: PyTree,
        adapted: Any,
        x: PyTree,
        key: Array,
        *,
        train: bool,
        mask: Array | None = None,
    ) -> tuple[PyTree, PyTree]:
        count = jax.tree.leaves(x)[0].shape[0]

        def chunked(leaf: Array) -> Array:
            padding = [(0, -count % chunk), *[(0, 0)] * (leaf.ndim - 1)]
            return jnp.pad(leaf, padding).reshape(-1, chunk, *leaf.shape[1:])

        def answer(some: tuple[PyTree, Array | None]) -> PyTree:
            return learner.predict(params, adapted, some[0], key, train=train, mask=some[1])[0]

        outputs = jax.lax.map(answer, jax.tree.map(chunked, (x, mask)))
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], outputs)
        return flat, {}

    evaluate = supervised_evaluate(learner.adapt, predict, objective)
    return learner._replace(predict=predict, evaluate=evaluate)


def evaluate_each(
    learner: MetaLearner, params: PyTree, state: PyTree, tasks: PyTree, key: Array
) -> dict[str, np.ndarray]:
    """Tests a learner on given tasks, one after another.

    Args:
      learner: The method.
      params, state: Its parameters and state, which stay as they are.
      tasks: The tasks, stacked: leaves [n, ...].
      key: Random key.

    Returns:
      Metrics, each [n].
    """
    count = jax.tree.leaves(tasks)[0].shape[0]

    @jax.jit
    def run(params: PyTree, state: PyTree, tasks: PyTree, keys: Array) -> Metrics:
        return jax.lax.map(lambda each: learner.evaluate(params, state, *each), (tasks, keys))

    return jax.tree.map(np.asarray, run(params, state, tasks, jax.random.split(key, count)))


def fitting_chunk(
    build: Callable[[int], Any], arguments: tuple, most: int, memory: int = _MEMORY
) -> int:
    """Finds how many episodes at a time fit the memory, from what the compiler plans to use.

    Args:
      build: Function from a chunk to the jitted test.
      arguments: What the test is called with.
      most: Largest chunk.
      memory: Bytes that temporaries may take.

    Returns:
      The largest chunk that was found to fit; 1 where none does.
    """
    chunk = most
    while chunk > 1:
        # The call that follows uses what is compiled here.
        planned = build(chunk).lower(*arguments).compile().memory_analysis()
        taken = 0 if planned is None else planned.temp_size_in_bytes
        if taken <= memory:
            break
        chunk = max(1, min(chunk - 1, chunk * memory // taken))
    return chunk


def make_validate(
    learner: MetaLearner,
    tasks: Tasks,
    *,
    episodes: int,
    seed: int = 0,
    mesh: Mesh | None = None,
    chunk: int | None = None,
) -> Callable[[TrainState], dict[str, float]]:
    """Builds the validation that `fit` takes: means over the same tasks at every call.

    Where the optimizer averages the parameters, the averages are tested.

    Args:
      learner: The method.
      tasks: Validation tasks.
      episodes: How many are drawn.
      seed: Seed of the tasks.
      mesh: Devices that share the episodes, from `task_mesh`.
      chunk: Episodes that a device evaluates at a time, as in `make_evaluate`.

    Returns:
      A function train state -> metrics.

    Raises:
      ValueError: the tasks draw from numbers that are NaN or infinite.
    """
    check_finite(tasks.data, "the tasks' data")
    evaluate = make_evaluate(learner, tasks.sample, episodes=episodes, mesh=mesh, chunk=chunk)

    def validate(train_state: TrainState) -> dict[str, float]:
        # Folded, so that no test with the same seed has the same tasks.
        key = jax.random.fold_in(jax.random.key(seed), 0)
        metrics = evaluate(averaged_params(train_state), train_state.state, tasks.data, key)
        return {name: float(values.mean()) for name, values in metrics.items()}

    return validate
