"""Examples on the device, grouped by class, and the named splits of a dataset."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from meta_jax.core import PyTree
from meta_jax.data.notes import some
from meta_jax.host import check_memory, device_memory, naming_dials
from meta_jax.lookup import UsageError

T = TypeVar("T")
_ALIGNMENT = 64  # bytes
_REMEDY = "use --tasks.placement=host"
_FRACTIONS = (0.64, 0.16, 0.20)
_EVALUATED_CLASSES = 5  # a usual number of ways


class DataError(UsageError):
    """The data at hand cannot serve the request; the message names the culprit and the remedy."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["examples", "starts", "counts", "groups"],
    meta_fields=["largest", "gathered"],
)
@dataclasses.dataclass(frozen=True)
class Dataset:
    """The labelled examples of one split, a pytree: pass it as an ARGUMENT of a jitted function.

    Closed over instead, the examples would be compiled into the program as a constant. Classes
    are stored one after another, without padding: class k is the rows starts[k] to
    starts[k] + counts[k] of every leaf of `examples`. Build it with `dataset_from_classes`.
    """

    examples: PyTree  # leaves [all, ...], of any dtype and example shape
    starts: jax.Array  # int32 [classes], the first row of each class
    counts: jax.Array  # int32 [classes], how many examples each class has
    groups: jax.Array  # int32 [classes], the class's group (alphabet, script); 0 without groups
    largest: int = 0  # the largest of `counts`, static; taken from them where it is not given
    gathered: bool = False  # whether the examples are those of one episode, in its order, static

    def __post_init__(self) -> None:
        """Takes `largest` from the counts."""
        if not self.largest:
            object.__setattr__(self, "largest", int(np.max(self.counts)))


@dataclasses.dataclass(frozen=True, eq=False)
class HostDataset(Dataset):
    """A `Dataset` whose examples stay on the host, which may be a file mapped into memory.

    It is no pytree, so that no jitted function takes all of it: `meta_jax.data.streams` gathers the
    examples of an episode, and gives a `Dataset` of them alone. Its examples are NumPy arrays.
    """

    device_bytes: int | None = None  # bytes of a device that gathered episodes may take

    # By identity: what is compiled for one is looked up by it.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def gather(self, examples: PyTree) -> Dataset:
        """The dataset that an episode is drawn from whose examples these are, in its order."""
        return Dataset(examples, self.starts, self.counts, self.groups, self.largest, gathered=True)


Placement = Literal["device", "host"]


class Storage(NamedTuple):
    """Where the examples of a dataset lie.

    Attributes:
      placement: 'device' for all of them on the device; 'host' for the machine's memory, or a file
        that is mapped into it, from where episodes are gathered.
      device_memory: Megabytes of a device that examples may take: all of them, or those of the
        episodes that are gathered ahead. None for what the device has.
    """

    placement: Placement = "device"
    device_memory: float | None = None

    @property
    def device_bytes(self) -> int | None:
        """Bytes of a device that examples may take, where a number is given."""
        return None if self.device_memory is None else int(self.device_memory * 1e6)


ON_DEVICE = Storage()


class Split(NamedTuple):
    """One split, with the names that the arrays cannot hold.

    Attributes:
      dataset: The examples, on the device.
      class_names: Names of the classes, unique.
      group_names: Names of the groups, indexed by `Dataset.groups`.
    """

    dataset: Dataset
    class_names: tuple[str, ...]
    group_names: tuple[str, ...]


class Splits(NamedTuple):
    """A dataset by split: 'train', 'val', 'test' (and 'trainval' where defined).

    Where a loader made it, each split is read when one of its entries is first asked for.

    Attributes:
      datasets: Dataset of each split.
      class_names: Names of the classes of each split.
      group_names: Names of the groups of each split.
    """

    datasets: Mapping[str, Dataset]
    class_names: Mapping[str, tuple[str, ...]]
    group_names: Mapping[str, tuple[str, ...]]


class _View(Mapping[str, T]):
    """A mapping of known keys, whose values are computed when they are asked for."""

    def __init__(self, keys: Sequence[str], get: Callable[[str], T]) -> None:
        self._keys = tuple(keys)
        self._get = get

    def __getitem__(self, key: str) -> T:
        if key not in self._keys:
            raise KeyError(key)
        return self._get(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def lazy_splits(loaders: Mapping[str, Callable[[], Split]]) -> Splits:
    """Builds `Splits` whose splits are loaded once, when they are first asked for.

    Args:
      loaders: By split name, a function that loads the split.
    """
    load = functools.cache(lambda split: loaders[split]())
    return Splits(
        datasets=_View(tuple(loaders), lambda split: load(split).dataset),
        class_names=_View(tuple(loaders), lambda split: load(split).class_names),
        group_names=_View(tuple(loaders), lambda split: load(split).group_names),
    )


def dataset_from_classes(
    classes: Sequence[PyTree],
    groups: Sequence[int] | None = None,
    *,
    storage: Storage = ON_DEVICE,
) -> Dataset:
    """Builds a `Dataset` from the examples of each class.

    Args:
      classes: One array [n_i, ...] for each class, or one pytree of such arrays, n_i >= 1; all of
        one structure, dtype and example shape. For images uint8 [n_i, height, width, channels].
      groups: Group of each class; all 0 if None.
      storage: Where the examples lie; by default on the device.

    Returns:
      The dataset; a `HostDataset` where its examples stay on the host.

    Raises:
      DataError: there is no class, a class is empty, structures, shapes or dtypes differ, or an
        integer does not fit the 32 bits that JAX stores.
      UsageError: the examples are larger than the device.

    Examples:
      >>> data = dataset_from_classes([np.zeros((3, 8)), np.ones((2, 8))])  # features
      >>> data.examples.shape, data.starts.tolist(), data.counts.tolist()
      ((5, 8), [0, 3], [3, 2])
    """
    if not len(classes):
        raise DataError("a dataset needs at least one class, but none was given")
    classes = [jax.tree.map(np.asarray, examples) for examples in classes]
    groups = [0] * len(classes) if groups is None else groups
    if len(groups) != len(classes):
        raise DataError(f"{len(groups)} groups were given for {len(classes)} classes")
    counts = [_count(examples, classes[0], index) for index, examples in enumerate(classes)]
    return _dataset(jax.tree.map(_concatenate, *classes), counts, groups, storage)


def _dataset(
    examples: PyTree, counts: Sequence[int], groups: Sequence[int], storage: Storage
) -> Dataset:
    """A dataset of arrays that nobody else changes, [all, ...], one class after another."""
    sizes = np.array(counts, np.int32)
    index = (
        jnp.asarray(np.cumsum(sizes) - sizes, jnp.int32),
        jnp.asarray(sizes),
        jnp.asarray(np.asarray(groups, np.int32)),
        int(sizes.max()),
    )
    if storage.placement == "host":
        stored = jax.tree.map(_as_stored, examples)
        return HostDataset(stored, *index, device_bytes=storage.device_bytes)
    _check_fits_device(examples, int(sizes.sum()), storage)
    with naming_dials("a split on the device", _REMEDY):
        # Without a copy where the device is the host and the array aligned.
        return Dataset(jax.device_put(examples), *index)


def _as_stored(leaf: np.ndarray) -> np.ndarray:
    """The array in the type that JAX stores; a mapped file stays one."""
    return np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))


def _check_fits_device(examples: PyTree, count: int, storage: Storage) -> None:
    """Refuses examples that are larger than a device; on a CPU they are in its memory already."""
    available = storage.device_bytes
    if available is None and jax.default_backend() != "cpu":
        available = device_memory()
    if available is not None:
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(examples))
        what = f"a split of {count} examples on the device"
        check_memory(what, needed, _REMEDY, available=available)


def _concatenate(*arrays: np.ndarray) -> np.ndarray:
    shape = (sum(map(len, arrays)), *arrays[0].shape[1:])
    return np.concatenate(arrays, out=aligned_empty(shape, arrays[0].dtype))


def aligned_empty(shape: Sequence[int], dtype: np.typing.DTypeLike) -> np.ndarray:
    """An array of undefined content, at an address that JAX can use on a CPU without a copy.

    Args:
      shape: Shape of the array.
      dtype: Type of its elements.
    """
    dtype = np.dtype(dtype)
    size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    buffer = np.empty(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _count(examples: PyTree, first: PyTree, index: int) -> int:
    """The number of examples of a class, which must look like those of the first class."""
    leaves, structure = jax.tree.flatten(examples)
    if structure != jax.tree.structure(first) or not leaves:
        raise DataError(
            f"class {index} has examples of structure {structure}, but the first class fixes "
            f"{jax.tree.structure(first)}"
        )
    for leaf, expected in zip(leaves, jax.tree.leaves(first), strict=True):
        if leaf.ndim < 1 or leaf.dtype != expected.dtype or leaf.shape[1:] != expected.shape[1:]:
            wanted = ", ".join(["n", *map(str, expected.shape[1:])])
            raise DataError(
                f"class {index} has {leaf.dtype} examples of shape {leaf.shape}, but the first "
                f"class fixes {expected.dtype} [{wanted}]"
            )
        if not (np.issubdtype(leaf.dtype, np.number) or leaf.dtype == bool) and (
            not jnp.issubdtype(leaf.dtype, jnp.floating)  # bfloat16 is no number of numpy's
        ):
            raise DataError(
                f"class {index} has examples of dtype {leaf.dtype}: turn them into numbers"
            )
        _check_integers(leaf, index)
    sizes = {len(leaf) for leaf in leaves}
    if len(sizes) > 1:
        raise DataError(f"class {index} has leaves of {sorted(sizes)} examples: give all the same")
    if 0 in sizes:
        raise DataError(f"class {index} has no examples: leave it out")
    return sizes.pop()


def _check_integers(leaf: np.ndarray, index: int) -> None:
    """Refuses integers that JAX, without 64 bits, would cut off in silence."""
    stored = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if stored == leaf.dtype or not np.issubdtype(stored, np.integer) or not leaf.size:
        return
    least, largest = np.iinfo(stored).min, np.iinfo(stored).max
    for value in (int(leaf.min()), int(leaf.max())):
        if not least <= value <= largest:
            raise DataError(
                f"class {index} has the {leaf.dtype} {value}, which {stored} cannot hold: give "
                "smaller numbers or floats, or set jax_enable_x64"
            )


def class_examples(dataset: Dataset, index: int) -> PyTree:
    """All examples of one class, leaves [n, ...], as they are stored."""
    start = int(dataset.starts[index])
    stop = start + int(dataset.counts[index])
    return jax.tree.map(lambda leaf: leaf[start:stop], dataset.examples)


def split_from_classes(
    classes: Sequence[Any],
    class_names: Sequence[str],
    groups: Sequence[str],
    *,
    storage: Storage = ON_DEVICE,
) -> Split:
    """Builds a `Split` from the examples of each class and the names of class and group.

    Args:
      classes: Examples of each class, as `dataset_from_classes` takes them.
      class_names: Name of each class, unique.
      groups: Name of each class's group.
      storage: Where the examples lie; by default on the device.

    Raises:
      DataError, UsageError: as `dataset_from_classes` does.
    """
    group_names = sorted(set(groups))
    rows = [group_names.index(group) for group in groups]
    dataset = dataset_from_classes(classes, rows, storage=storage)
    return Split(dataset, tuple(class_names), tuple(group_names))


def split_from_array(
    examples: np.ndarray,
    counts: Sequence[int],
    class_names: Sequence[str],
    groups: Sequence[str],
    *,
    storage: Storage = ON_DEVICE,
) -> Split:
    """Builds a `Split` from one array, without a copy of it where the device is the host.

    Args:
      examples: Examples [all, ...], one class after another; not to be changed afterwards.
      counts: Number of examples of each class, at least 1.
      class_names: Name of each class, unique.
      groups: Name of each class's group.
      storage: Where the examples lie; by default on the device.

    Raises:
      UsageError: the examples are larger than the device.
    """
    group_names = sorted(set(groups))
    rows = [group_names.index(group) for group in groups]
    dataset = _dataset(examples, counts, rows, storage)
    return Split(dataset, tuple(class_names), tuple(group_names))


def random_class_split(
    n_classes: int, seed: int, fractions: tuple[float, float, float] | None = None
) -> dict[str, np.ndarray]:
    """Splits class indices at random into disjoint 'train', 'val' and 'test' that cover them all.

    The default fractions are those of miniImageNet's 64/16/20 classes (Ravi and Larochelle 2017),
    but val and test get at least 5 classes each, or a third of all where there are fewer than 15.

    Args:
      n_classes: Number of classes, at least 3.
      seed: Seed of the split: the same always gives the same.
      fractions: Shares of train, val and test, positive, summing to 1, which are then kept as they
        are; every split gets at least one class.

    Returns:
      By split, the sorted indices, int [classes of the split].

    Raises:
      DataError: fewer than 3 classes, or fractions that are no shares of 1.
    """
    if n_classes < 3:
        raise DataError(
            f"{n_classes} class(es) cannot be split into train, val and test: at least 3 are needed"
        )
    least = 1 if fractions else min(_EVALUATED_CLASSES, n_classes // 3)
    shares = fractions or _FRACTIONS
    positive = len(shares) == 3 and all(share > 0 for share in shares)  # NaN is not
    if not positive or abs(sum(shares) - 1) > 1e-6:
        raise DataError(f"split fractions must be three positive numbers of sum 1: {shares}")
    n_val, n_test = (max(least, round(share * n_classes)) for share in shares[1:])
    # Small sets round up to more than all classes; train, then val, is served first.
    n_test = min(n_test, n_classes - 2)
    n_val = min(n_val, n_classes - n_test - 1)
    order = np.random.default_rng(seed).permutation(n_classes)
    test, val, train = np.split(order, [n_test, n_test + n_val])
    return {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}


def read_fractions(text: str | None) -> tuple[float, float, float] | None:
    """Reads shares of train, val and test, separated by commas.

    Raises:
      DataError: they are not three numbers.

    Examples:
      >>> read_fractions("0.6,0.1,0.3")
      (0.6, 0.1, 0.3)
    """
    if text is None:
        return None
    try:
        train, val, test = map(float, text.split(","))
    except ValueError as error:
        raise DataError(
            f"split_fractions '{text}' are not three numbers: write such as 0.6,0.1,0.3"
        ) from error
    return train, val, test


def split_advice(splits: Mapping[str, Sequence[Any]]) -> str:
    """What to do where a random split gives a split too few classes, for the end of an error."""
    sizes = ", ".join(f"{len(classes)} {split}" for split, classes in splits.items())
    total = sum(map(len, splits.values()))
    return (
        f" ({total} classes were split at random into {sizes}: split_fractions=TRAIN,VAL,TEST "
        "changes the shares, and a class list or folders train, val and test replace the random "
        "split)"
    )


def check_disjoint(class_names: Mapping[str, Sequence[str]], where: str) -> None:
    """Refuses classes that are in two splits.

    Args:
      class_names: Names of the classes of each split.
      where: Name of the data in the error.

    Raises:
      DataError: some class is in two splits.
    """
    for first, second in itertools.combinations(class_names, 2):
        others = set(class_names[second])
        shared = [name for name in class_names[first] if name in others]
        if shared:
            raise DataError(
                f"{len(shared)} classes of {where} are in {first} and in {second}: {some(shared)}; "
                "tests would ask for classes trained on: move or rename them, or set "
                "allow_shared_classes"
            )
