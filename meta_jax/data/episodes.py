"""Sampling episodes on the device: pure, jittable, nothing left to the host."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import Batch, Episode
from meta_jax.data.dataset import DataError, ImageDataset

ROTATIONS = ("none", "classes", "per_class", "per_episode")


class EpisodeSpec(NamedTuple):
    """What an episode is made of. Hashable: pass it as a static argument.

    `rotations`, by quarter turns: 'none'; 'classes', a turned character is a class of its own
    (Snell et al. 2017); 'per_class', one random turn for each class of an episode (Finn et al.
    2017); 'per_episode', one for all of them (Sung et al. 2018).
    """

    ways: int  # classes in an episode
    shots: int  # support examples of each class
    queries: int  # query examples of each class
    rotations: str = "none"
    within_group: bool = False  # all classes of an episode from one group (alphabet)
    shared_drawers: bool = False  # the same examples (drawers, in Omniglot) for every class


def check_spec(spec: EpisodeSpec, dataset: ImageDataset, split: str = "the dataset") -> None:
    """Refuses, before anything is compiled, an episode that the data cannot serve.

    Args:
      spec: what an episode is made of.
      dataset: where it is to come from.
      split: the name used in messages.

    Raises:
      DataError: for unknown rotations, numbers below one, more ways than there are classes with
        shots + queries images, or rotations of images that are not square.
    """
    if spec.rotations not in ROTATIONS:
        raise DataError(
            f"unknown rotations '{spec.rotations}': choose one of {', '.join(ROTATIONS)}"
        )
    for name in ("ways", "shots", "queries"):
        if getattr(spec, name) < 1:
            raise DataError(f"{name}={getattr(spec, name)} is impossible: use at least 1")
    if spec.rotations != "none" and dataset.images.shape[2] != dataset.images.shape[3]:
        raise DataError("images that are not square cannot be rotated: use rotations 'none'")
    needed = spec.shots + spec.queries
    usable = dataset.counts >= needed
    if not usable.any():
        raise DataError(
            f"shots + queries = {needed} is more than the {int(dataset.counts.max())} images of "
            f"the largest class of {split}: lower shots or queries"
        )
    turns = 4 if spec.rotations == "classes" else 1
    if spec.within_group:
        available = int(jnp.bincount(dataset.groups[usable]).max()) * turns
        where = f"the largest group of {split}"
    else:
        available, where = int(usable.sum()) * turns, split
    if spec.ways > available:
        raise DataError(
            f"{spec.ways} ways are more than the {available} classes of {where} that have "
            f"{needed} images (shots + queries): lower ways, shots or queries"
        )


def sample_episode(key: jax.Array, dataset: ImageDataset, spec: EpisodeSpec) -> Episode:
    """Draws one episode: classes, examples, turns and labels, all uniformly at random.

    Examples come in random order, so that nothing can be read from a position, and no image is
    in both support and query. Classes with fewer than shots + queries images are never drawn.

    Args:
      key: a random key.
      dataset: images uint8 [classes, examples, height, width, channels] on the device.
      spec: what an episode is made of; checked by `check_spec` beforehand.

    Returns:
      An episode with x float [ways * shots, height, width, channels] in [0, 1] and y one-hot
      [ways * shots, ways]; likewise, with queries, for the query set.
    """
    class_key, example_key, turn_key, order_key = jax.random.split(key, 4)
    needed = spec.shots + spec.queries
    classes, examples = dataset.images.shape[:2]
    turns = 4 if spec.rotations == "classes" else 1

    usable = jnp.tile(dataset.counts >= needed, turns)
    if spec.within_group:
        usable &= jnp.tile(_draw_group(class_key, dataset, needed, spec.ways, turns), turns)
    drawn = _draw_without_replacement(class_key, usable, spec.ways)  # [ways]; its order is random
    drawn, turn = drawn % classes, drawn // classes
    if spec.rotations == "per_class":
        turn = jax.random.randint(turn_key, (spec.ways,), 0, 4)
    elif spec.rotations == "per_episode":
        turn = jnp.full(spec.ways, jax.random.randint(turn_key, (), 0, 4))

    real = jnp.arange(examples) < dataset.counts[drawn][:, None]
    if spec.shared_drawers:
        shared = _draw_without_replacement(example_key, real.all(0), needed)
        example = jnp.broadcast_to(shared, (spec.ways, needed))
    else:
        example = _draw_without_replacement(example_key, real, needed)  # [ways, needed]

    def batch(example: jax.Array, key: jax.Array) -> Batch:
        label = jnp.repeat(jnp.arange(spec.ways), example.shape[1])
        order = jax.random.permutation(key, label.size)
        label, example = label[order], example.reshape(-1)[order]
        x = dataset.images[drawn[label], example]
        if spec.rotations != "none":
            x = quarter_turns(x, turn[label])
        dtype = jnp.result_type(float)
        return Batch(x.astype(dtype) / 255, jax.nn.one_hot(label, spec.ways, dtype=dtype))

    support_key, query_key = jax.random.split(order_key)
    return Episode(
        batch(example[:, : spec.shots], support_key), batch(example[:, spec.shots :], query_key)
    )


def quarter_turns(images: jax.Array, turns: jax.Array) -> jax.Array:
    """Rotates each image counter-clockwise by its own number of quarter turns.

    Args:
      images: [n, side, side, channels].
      turns: int [n], 0 to 3.

    Returns:
      [n, side, side, channels]; image i is `jnp.rot90(images[i], turns[i])`.
    """
    turns = turns[:, None, None, None]
    images = jnp.where(turns % 2 == 1, images.swapaxes(1, 2), images)
    images = jnp.where((turns == 1) | (turns == 2), images[:, ::-1], images)
    return jnp.where(turns >= 2, images[:, :, ::-1], images)


def _draw_without_replacement(key: jax.Array, allowed: jax.Array, n: int) -> jax.Array:
    """Indices [..., n] of n distinct True entries of `allowed` [..., m], in random order."""
    # The largest of independent uniform scores are a uniform draw in uniform order.
    scores = jnp.where(allowed, jax.random.uniform(key, allowed.shape), -1)
    return jax.lax.top_k(scores, n)[1]


def _draw_group(
    key: jax.Array, dataset: ImageDataset, needed: int, ways: int, turns: int
) -> jax.Array:
    """Mask [classes] of one group, drawn uniformly from those that can serve the episode."""
    same = dataset.groups[:, None] == dataset.groups
    size = (same & (dataset.counts >= needed)).sum(1)
    # One representative of each group, its first class, keeps the draw uniform over groups.
    first = jnp.argmax(same, 1) == jnp.arange(size.size)
    chosen = _draw_without_replacement(
        jax.random.fold_in(key, 1), first & (size * turns >= ways), 1
    )
    return same[chosen[0]]
