"""Sampling episodes: pure and jittable, on the device.

An episode is drawn in two parts: which rows of the dataset it has, and the examples in them. Where
these stay on the host, the first part is done for them alone (see `meta_jax.data.streams`).
"""

import dataclasses
import operator
from typing import Literal, NamedTuple, Protocol, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np

from meta_jax.core import Batch, Episode, PyTree
from meta_jax.data.dataset import DataError, Dataset

Rotations = Literal["none", "classes", "per_class", "per_episode"]
ROTATIONS: tuple[str, ...] = get_args(Rotations)


class EpisodeSpec(NamedTuple):
    """What an episode is made of. Hashable: pass it as a static argument.

    `rotations`, by quarter turns: 'none'; 'classes', a turned character is a class of its own
    (Snell et al. 2017); 'per_class', one random turn for each class of an episode (Finn et al.
    2017); 'per_episode', one for all of them (Sung et al. 2018).

    Attributes:
      ways: Classes in an episode.
      shots: Support examples of each class.
      queries: Query examples of each class.
      rotations: Quarter turns of square images, as above.
      within_group: Whether all classes of an episode are of one group (alphabet).
      shared_drawers: Whether every class has the same examples (drawers, in Omniglot).
    """

    ways: int
    shots: int
    queries: int
    rotations: Rotations = "none"
    within_group: bool = False
    shared_drawers: bool = False


def check_sizes(ways: int, shots: int, queries: int) -> None:
    """Raises DataError unless ways, shots and queries are positive."""
    for name, value in (("ways", ways), ("shots", shots), ("queries", queries)):
        if value < 1:
            raise DataError(f"{name}={value} is impossible: use at least 1")


def check_rotations(rotations: str) -> None:
    """Raises DataError unless the name is one of `ROTATIONS`."""
    if rotations not in ROTATIONS:
        raise DataError(f"unknown rotations '{rotations}': choose one of {', '.join(ROTATIONS)}")


def are_images(examples: PyTree) -> bool:
    """Whether examples are one array [all, height, width, channels]."""
    leaves = jax.tree.leaves(examples)
    return len(leaves) == 1 and jnp.ndim(leaves[0]) == 4


def check_spec(
    spec: EpisodeSpec, dataset: Dataset, split: str = "the dataset", advice: str = ""
) -> None:
    """Refuses, before anything is compiled, an episode that the data cannot serve.

    Args:
      spec: What an episode is made of.
      dataset: Where it is to come from.
      split: Name used in messages.
      advice: Further remedy for too few classes, added to the message.

    Raises:
      DataError: for unknown rotations, numbers below one, more ways than there are classes with
        shots + queries examples, or rotations of examples that are no square images.
    """
    check_rotations(spec.rotations)
    check_sizes(spec.ways, spec.shots, spec.queries)
    if spec.rotations != "none":
        _check_square_images(dataset.examples, split)
    needed = spec.shots + spec.queries
    counts, groups = np.asarray(dataset.counts), np.asarray(dataset.groups)
    usable = counts >= needed
    if not usable.any():
        raise DataError(
            f"shots + queries = {needed} is more than the {counts.max()} examples of the largest "
            f"class of {split}: lower shots or queries"
        )
    turns = 4 if spec.rotations == "classes" else 1
    if spec.within_group:
        available = int(np.unique(groups[usable], return_counts=True)[1].max()) * turns
        where = f"the largest group of {split}"
    else:
        available, where = int(usable.sum()) * turns, split
    if spec.ways > available:
        raise DataError(
            f"{spec.ways} ways are more than the {available} classes of {where} that have "
            f"{needed} examples (shots + queries): {_fewer_ways(available)}{advice}"
        )


def _fewer_ways(available: int) -> str:
    remedy = "lower shots or queries"
    return f"set ways={available}, or {remedy}" if available > 1 else f"{remedy}, or add classes"


def _check_square_images(examples: PyTree, split: str) -> None:
    if not are_images(examples):
        raise DataError(f"examples of {split} that are no images cannot be rotated: use 'none'")
    (images,) = jax.tree.leaves(examples)
    if images.shape[1] != images.shape[2]:
        raise DataError("images that are not square cannot be rotated: use rotations 'none'")


def sample_episode(key: jax.Array, dataset: Dataset, spec: EpisodeSpec) -> Episode:
    """Draws one episode: classes, examples, turns and labels, all uniformly at random.

    Examples come in random order, so that nothing can be read from a position, and no example is
    in both support and query. Classes with fewer than shots + queries examples are never drawn.

    Args:
      key: Random key.
      dataset: Where examples come from, on the device.
      spec: What an episode is made of; checked by `check_spec` beforehand.

    Returns:
      An episode with x [ways * shots, ...], a pytree as the examples are, and y one-hot
      [ways * shots, ways]; likewise, with queries, for the query set. Examples of dtype uint8
      become floats in [0, 1]; all others (features, token ids, masks) are as they are stored.
    """
    return read_drawn(dataset, draw_episode(key, dataset, spec))


class Rows(NamedTuple):
    """Which examples a batch has, and what becomes of them."""

    rows: jax.Array  # int [n], of the dataset
    label: jax.Array  # int [n]
    turn: jax.Array | None  # quarter turns, int [n]; None without rotations


class Drawn(NamedTuple):
    """An episode before its examples are read."""

    support: Rows
    query: Rows
    classes: int  # among which it is labelled


def draw_episode(key: jax.Array, dataset: Dataset, spec: EpisodeSpec) -> Drawn:
    """Draws what `sample_episode` reads; the examples themselves are not looked at."""
    chex.assert_rank([dataset.starts, dataset.counts, dataset.groups], 1)
    class_key, example_key, turn_key, order_key = jax.random.split(key, 4)
    drawn, turn = _draw_classes(class_key, turn_key, dataset, spec)
    example = _draw_examples(example_key, dataset, spec, drawn)
    rows = dataset.starts[drawn][:, None] + example  # [ways, shots + queries]
    support_key, query_key = jax.random.split(order_key)
    return Drawn(
        _shuffled(support_key, rows[:, : spec.shots], turn),
        _shuffled(query_key, rows[:, spec.shots :], turn),
        spec.ways,
    )


def sample_batch(key: jax.Array, dataset: Dataset, spec: EpisodeSpec) -> Episode:
    """Draws an ordinary batch: examples uniformly at random, labelled among all classes.

    Args:
      key: Random key.
      dataset: Where examples come from, on the device.
      spec: Gives their number, that of its episode, and the turns; with the rotations 'classes' a
        turned example is of a class of its own, with others it is turned by itself.

    Returns:
      The examples as support [ways * shots, ...] and query [ways * queries, ...], y one-hot among
      all classes, four times as many with the rotations 'classes'.
    """
    return read_drawn(dataset, draw_batch(key, dataset, spec))


def draw_batch(key: jax.Array, dataset: Dataset, spec: EpisodeSpec) -> Drawn:
    """Draws what `sample_batch` reads; of the examples only their number is looked at."""
    n, classes = spec.ways * (spec.shots + spec.queries), dataset.starts.size
    row_key, turn_key = jax.random.split(key)
    rows = jax.random.randint(row_key, (n,), 0, dataset.counts.sum())
    label = jnp.searchsorted(dataset.starts, rows, side="right") - 1
    turn = None if spec.rotations == "none" else jax.random.randint(turn_key, (n,), 0, 4)
    if turn is not None and spec.rotations == "classes":
        label, classes = label + classes * turn, 4 * classes
    batch, first = Rows(rows, label, turn), spec.ways * spec.shots
    return Drawn(
        jax.tree.map(lambda leaf: leaf[:first], batch),
        jax.tree.map(lambda leaf: leaf[first:], batch),
        classes,
    )


def read_drawn(dataset: Dataset, drawn: Drawn) -> Episode:
    """Reads the examples of an episode, turns them and labels them.

    Args:
      dataset: Where they come from. If it is `gathered`, its examples are those of this episode
        alone, first the support set's and then the queries'.
      drawn: The rows, from `draw_episode` or `draw_batch`.
    """
    first = drawn.support.rows.size
    places = (slice(None, first), slice(first, None))
    batches = []
    for place, (rows, label, turn) in zip(places, drawn[:2], strict=True):
        index = place if dataset.gathered else rows
        x = jax.tree.map(operator.itemgetter(index), dataset.examples)
        batches.append(_labelled(x, label, drawn.classes, turn))
    return Episode(*batches)


class DrawRows(Protocol):
    """(key, dataset, spec) -> rows."""

    def __call__(self, key: jax.Array, dataset: Dataset, spec: EpisodeSpec, /) -> Drawn:
        """Draws an episode without reading its examples."""
        ...


@dataclasses.dataclass(frozen=True)
class EpisodeSampler:
    """A `Sample` of labelled examples that also says which rows of the dataset it reads.

    Attributes:
      draw: `draw_episode` or `draw_batch`.
      spec: What an episode is made of.
    """

    draw: DrawRows
    spec: EpisodeSpec

    def __call__(self, key: jax.Array, data: Dataset, /) -> Episode:
        """Draws an episode."""
        return read_drawn(data, self.draw(key, data, self.spec))

    def rows(self, key: jax.Array, data: Dataset, /) -> jax.Array:
        """Rows of the episode that the same key draws, int [n]: support set, then queries."""
        drawn = self.draw(key, data, self.spec)
        return jnp.concatenate([drawn.support.rows, drawn.query.rows])


def _draw_classes(
    class_key: jax.Array, turn_key: jax.Array, dataset: Dataset, spec: EpisodeSpec
) -> tuple[jax.Array, jax.Array | None]:
    """Classes [ways], in random order, and their quarter turns [ways]; None without rotations."""
    needed, classes = spec.shots + spec.queries, dataset.counts.size
    turns = 4 if spec.rotations == "classes" else 1
    usable = jnp.tile(dataset.counts >= needed, turns)
    if spec.within_group:
        usable &= jnp.tile(_draw_group(class_key, dataset, needed, spec.ways, turns), turns)
    drawn = _draw_without_replacement(class_key, usable, spec.ways)
    if spec.rotations == "classes":
        return drawn % classes, drawn // classes
    if spec.rotations == "per_class":
        return drawn, jax.random.randint(turn_key, (spec.ways,), 0, 4)
    if spec.rotations == "per_episode":
        return drawn, jnp.full(spec.ways, jax.random.randint(turn_key, (), 0, 4))
    return drawn, None


def _draw_examples(
    key: jax.Array, dataset: Dataset, spec: EpisodeSpec, drawn: jax.Array
) -> jax.Array:
    """Distinct examples [ways, shots + queries] of each class drawn, counted within the class."""
    needed = spec.shots + spec.queries
    real = jnp.arange(dataset.largest)[None] < dataset.counts[drawn][:, None]
    if spec.shared_drawers:
        shared = _draw_without_replacement(key, real.all(0), needed)
        return jnp.broadcast_to(shared, (spec.ways, needed))
    return _draw_without_replacement(key, real, needed)


def _shuffled(key: jax.Array, rows: jax.Array, turn: jax.Array | None) -> Rows:
    """Rows [ways, n], labelled by way, in random order."""
    ways, n = rows.shape
    label = jnp.repeat(jnp.arange(ways), n)
    order = jax.random.permutation(key, label.size)
    label, rows = label[order], rows.reshape(-1)[order]
    return Rows(rows, label, None if turn is None else turn[label])


def _labelled(x: PyTree, label: jax.Array, classes: int, turn: jax.Array | None) -> Batch:
    """Examples [n, ...] turned and scaled, with one-hot labels [n, classes]."""
    if turn is not None:
        x = jax.tree.map(lambda leaf: rotate_90(leaf, turn), x)
    return Batch(
        jax.tree.map(_unit_scaled, x), jax.nn.one_hot(label, classes, dtype=jnp.result_type(float))
    )


def _unit_scaled(x: jax.Array) -> jax.Array:
    """Floats in [0, 1] of uint8; anything else unchanged."""
    return x.astype(jnp.result_type(float)) / 255 if x.dtype == jnp.uint8 else x


def rotate_90(images: jax.Array, turns: jax.Array) -> jax.Array:
    """Rotates each image counter-clockwise by its own number of quarter turns.

    Args:
      images: Images [n, side, side, channels].
      turns: Numbers of quarter turns, int [n], 0 to 3.

    Returns:
      [n, side, side, channels]; image i is `jnp.rot90(images[i], turns[i])`.

    Raises:
      ValueError: images are not [n, side, side, channels], or turns not [n].
    """
    if images.ndim != 4 or images.shape[1] != images.shape[2]:
        raise ValueError(f"images must be [n, side, side, channels], not {list(images.shape)}")
    if turns.shape != images.shape[:1]:
        raise ValueError(f"turns must be [{len(images)}], not {list(turns.shape)}")
    turns = turns[:, None, None, None]
    images = jnp.where(turns % 2 == 1, images.swapaxes(1, 2), images)
    images = jnp.where((turns == 1) | (turns == 2), images[:, ::-1], images)
    return jnp.where(turns >= 2, images[:, :, ::-1], images)


def _draw_without_replacement(key: jax.Array, allowed: jax.Array, n: int) -> jax.Array:
    """Indices [..., n] of n distinct True entries of `allowed` [..., m], in random order."""
    # The largest of independent uniform scores are a uniform draw in uniform order.
    scores = jnp.where(allowed, jax.random.uniform(key, allowed.shape), -1)
    return jax.lax.top_k(scores, n)[1]


def _draw_group(key: jax.Array, dataset: Dataset, needed: int, ways: int, turns: int) -> jax.Array:
    """Mask [classes] of one group, drawn uniformly from those that can serve the episode."""
    same = dataset.groups[:, None] == dataset.groups[None]
    size = (same & (dataset.counts >= needed)[None]).sum(1)
    # One representative of each group, its first class, keeps the draw uniform over groups.
    first = jnp.argmax(same, 1) == jnp.arange(size.size)
    chosen = _draw_without_replacement(
        jax.random.fold_in(key, 1), first & (size * turns >= ways), 1
    )
    return same[chosen[0]]
