"""Episodes whose examples stay on the host: gathered there ahead of their use, and sent.

The rows of an episode are drawn by its own random key, as on the device, in a small program of the
CPU. Their examples are then gathered into a buffer for some steps, by workers of grain, while the
device computes. Labels, turns and augmentation are drawn on the device, by the same key.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from meta_jax.core import Array, PyTree, Sample, Tasks
from meta_jax.data.dataset import Dataset, HostDataset
from meta_jax.host import check_memory, naming_dials
from meta_jax.lookup import UsageError, import_extra
from meta_jax.ranges import LARGEST_INT

_AHEAD = 2  # buffers that are filled while one is in use
_BUFFERS_BYTES = 256 * 10**6  # of a device, for all of them, where no limit is given
_MOST_GROUPS = 64  # in a buffer
_KEYS = "threefry2x32"  # the random keys that draw the same on every kind of device

# (key, number) -> the keys of a group of tasks, [tasks]
GroupKeys = Callable[[Array, Array], Array]


# ---- One task.


def task_data(sample: Sample, data: PyTree, key: Array) -> PyTree:
    """What a task is drawn from: the data, or of those on the host its own examples.

    Args:
      sample: Draws the task.
      data: Data of the tasks.
      key: The key by which `sample` draws it.
    """
    if not isinstance(data, HostDataset):
        return data
    rows = np.asarray(jax.jit(_rows_of(sample))(key, _index(data)))
    return data.gather(jax.tree.map(lambda leaf: jnp.asarray(leaf[rows]), data.examples))


def task_shapes(tasks: Tasks) -> Any:
    """Shapes of a task, as `jax.eval_shape` gives them."""
    key, data = jax.random.key(0), tasks.data
    if isinstance(data, HostDataset):
        rows = jax.eval_shape(_rows_of(tasks.sample), key, _index(data)).size
        data = data.gather(
            jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype),
                data.examples,
            )
        )
    return jax.eval_shape(tasks.sample, key, data)


def _index(data: HostDataset) -> Dataset:
    """The dataset without its examples, from which rows are drawn."""
    return data.gather(None)


def _with_examples(data: Dataset, examples: PyTree) -> Dataset:
    return dataclasses.replace(data, examples=examples)


def _rows_of(sample: Sample) -> Callable[[Array, Dataset], Array]:
    rows = getattr(sample, "rows", None)
    if rows is None:
        raise UsageError(
            "this sampler does not say which rows it reads, so its examples cannot stay on the "
            "host: use placement 'device', or a source of labelled examples"
        )
    return rows


def split_tasks(data: PyTree) -> tuple[PyTree, PyTree]:
    """What all tasks of a group are drawn from, and what each has of its own, leaves [tasks, ...].

    Args:
      data: Data of the tasks, or the dataset of a group from `Buffer.group`.
    """
    if isinstance(data, Dataset) and data.gathered:
        return _with_examples(data, None), data.examples
    return data, None


def own_data(shared: PyTree, own: PyTree) -> PyTree:
    """What one task is drawn from, of the two parts that `split_tasks` gave."""
    return shared if own is None else _with_examples(shared, own)


# ---- Many tasks.


class Buffer(NamedTuple):
    """The examples of some groups of tasks, on the device.

    Attributes:
      first: Number of the first group, int32.
      data: The dataset, with examples [groups, tasks, n, ...].
    """

    first: Any
    data: Dataset

    def group(self, number: Array) -> Dataset:
        """The dataset of one group, with examples [tasks, n, ...]."""
        examples = jax.tree.map(lambda leaf: leaf[number - self.first], self.data.examples)
        return _with_examples(self.data, examples)


def tasks_that_fit(sample: Sample, data: HostDataset, most: int) -> int:
    """How many tasks can be streamed at a time in the memory that data may take, at least 1.

    Args:
      sample: Draws a task.
      data: The examples.
      most: The largest number.
    """
    limit = data.device_bytes or _BUFFERS_BYTES
    return max(1, min(most, limit // _buffered_bytes(sample, data)))


def _buffered_bytes(sample: Sample, data: HostDataset) -> int:
    """Bytes of a task's examples, in all buffers that there are at a time."""
    rows = jax.eval_shape(_rows_of(sample), jax.random.key(0), _index(data)).size
    row = sum(leaf[:1].nbytes for leaf in jax.tree.leaves(data.examples))
    return (_AHEAD + 1) * rows * row


class EpisodeStream:
    """The tasks of one step after another, gathered on the host while the device computes.

    It takes the place of the data: `make_train_loop`'s function takes it, and so does `fit`. What
    it gives depends on the key and the number of a step alone, so that a run which is resumed has
    the tasks of one that was not stopped.
    """

    def __init__(
        self,
        sample: Sample,
        data: HostDataset,
        group_keys: GroupKeys,
        tasks: int,
        *,
        mesh: Mesh | None = None,
        most_groups: int = _MOST_GROUPS,
    ) -> None:
        """Gathers nothing yet.

        Args:
          sample: Draws one task, and says which rows it reads.
          data: The examples.
          group_keys: Function (key, number) -> the keys of the tasks of a group.
          tasks: How many tasks a group has.
          mesh: Devices that share the tasks of a group, where they can evenly, or else all have
            them.
          most_groups: Groups in a buffer, at most.

        Raises:
          UsageError: grain is not installed, the sampler cannot be streamed, or a group is larger
            than the memory that the data may take of a device.
        """
        self._grain = import_extra("grain", "streams", "placement=host")
        self._sharding, shares = _sharding(tasks, mesh)
        self._data, self.tasks = data, tasks
        read = _rows_of(sample)
        group = tasks // shares * _buffered_bytes(sample, data)
        if data.device_bytes is not None:
            what = f"streaming {tasks // shares} tasks at a time"
            remedy = (
                "raise --tasks.device_memory, or lower the tasks (--task_batch, --eval_chunk) or "
                "the size of an episode"
            )
            check_memory(what, group, remedy, available=data.device_bytes)
        self.groups = max(1, min(most_groups, (data.device_bytes or _BUFFERS_BYTES) // group))
        self._plan = jax.jit(functools.partial(_plan, read, group_keys, self.groups))
        self._host = _cpu()
        self._host_index = jax.device_put(_index(data), self._host)
        self._index = jax.tree.map(functools.partial(_put_whole, mesh), _index(data))
        self._key = b""
        self._first, self._buffer = 0, None
        self._buffers: Any = None  # the next ones, from grain

    def at(self, bits: np.ndarray, number: int) -> tuple[int, Buffer]:
        """The buffer that holds a group; the next ones are being filled from then on.

        Args:
          bits: Key of the run, from `key_bits`.
          number: Number of the group.

        Returns:
          How many groups of the buffer there are from this one on, and the buffer.
        """
        goes_on = self._buffers is not None and bits.tobytes() == self._key
        if not (goes_on and self._first <= number <= self._first + self.groups):
            self._start(bits, number)
        elif number == self._first + self.groups:
            self._first, self._buffer = next(self._buffers)
        assert self._buffer is not None
        return self._first + self.groups - number, self._buffer

    def close(self) -> None:
        """Stops filling buffers and drops those that are full; `at` begins anew."""
        if self._buffers is not None:
            self._buffers.close()
        self._buffers = self._buffer = None

    def _start(self, bits: np.ndarray, number: int) -> None:
        """Fills buffers from a group on, and takes the first."""
        self.close()
        self._key = bits.tobytes()
        firsts = self._grain.MapDataset.range(number, LARGEST_INT, self.groups)
        options = self._grain.ReadOptions(num_threads=_AHEAD, prefetch_buffer_size=_AHEAD)
        gather = functools.partial(self._gather, bits)
        self._buffers = iter(firsts.map(gather).to_iter_dataset(options))
        self._first, self._buffer = next(self._buffers)

    def _gather(self, bits: np.ndarray, first: int) -> tuple[int, Buffer]:
        """The buffer that begins with a group, and the group's number."""
        bits, number = jax.device_put((bits, np.int32(first)), self._host)
        rows = np.asarray(self._plan(bits, number, self._host_index))  # [groups, tasks, n]
        send = functools.partial(_gathered, rows, self._sharding)
        with naming_dials("what is sent ahead", "give a lower --tasks.device_memory"):
            examples = jax.tree.map(send, self._data.examples)
        return int(first), Buffer(np.int32(first), _with_examples(self._index, examples))


def key_bits(key: Array) -> np.ndarray:
    """A random key on the host, as `EpisodeStream.at` takes it.

    Raises:
      UsageError: the key is of a kind that draws differently on each kind of device.
    """
    kind = str(jax.random.key_impl(key))
    if kind != _KEYS:
        raise UsageError(
            f"placement=host needs random keys of the kind {_KEYS}, not {kind}: set "
            "jax_default_prng_impl to it"
        )
    return np.asarray(jax.random.key_data(key))


def _plan(
    read: Callable[[Array, Dataset], Array],
    group_keys: GroupKeys,
    groups: int,
    bits: Array,
    first: Array,
    index: Dataset,
) -> Array:
    """The rows that the tasks of some groups read, [groups, tasks, n]."""
    key = jax.random.wrap_key_data(bits, impl=_KEYS)
    keys = jax.vmap(functools.partial(group_keys, key))(first + jnp.arange(groups))
    # A task's key is split in two: by the first it is drawn, by the other it is learned.
    draw = jax.vmap(lambda key: read(jax.random.split(key)[0], index))
    return jax.vmap(draw)(keys)


def _sharding(tasks: int, mesh: Mesh | None) -> tuple[Sharding | None, int]:
    """Where the examples [groups, tasks, n, ...] go, and how many devices share them."""
    if mesh is None:
        return None, 1
    if tasks % mesh.size:
        return NamedSharding(mesh, PartitionSpec()), 1
    return NamedSharding(mesh, PartitionSpec(None, "task")), mesh.size


def _gathered(rows: np.ndarray, sharding: Sharding | None, leaf: np.ndarray) -> Array:
    """Examples of rows [groups, tasks, n] on the devices, each of which reads its own alone."""
    if sharding is None:
        return jax.device_put(np.take(leaf, rows, axis=0))

    def read(place: Any) -> np.ndarray:
        return np.take(leaf, rows[place[: rows.ndim]], axis=0)

    return jax.make_array_from_callback((*rows.shape, *leaf.shape[1:]), sharding, read)


def _put_whole(mesh: Mesh | None, leaf: Array) -> Array:
    """A small array on all devices."""
    if mesh is None:
        return leaf
    whole = np.asarray(leaf)
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.make_array_from_callback(whole.shape, everywhere, lambda place: whole[place])


def _cpu() -> jax.Device:
    """The device that draws rows: a core, where JAX was not told to do without."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
