"""Tasks of random size, in arrays of one size, so that one compiled program serves all of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from meta_jax.core import Array, Batch, Episode, PyTree
from meta_jax.data.dataset import DataError


def with_random_shots(key: Array, support: Batch, least: int) -> Batch:
    """A support set of which a random number of rows is real, and the others are padding.

    Args:
      key: A random key.
      support: The rows.
      least: Smallest number of real rows; where there are no more, all are real, without a mask.
    """
    rows = len(support.y)
    if least >= rows:
        return support
    return support._replace(mask=jnp.arange(rows) < jax.random.randint(key, (), least, rows + 1))


def check_range(name: str, smallest: int, least: int | None, most: int) -> tuple[int, int]:
    """The range of a random number of ways or shots, up to `most`; of one number without `least`.

    Raises:
      DataError: `least` is below `smallest` or above `most`.
    """
    if least is None:
        return most, most
    if not smallest <= least <= most:
        raise DataError(
            f"least_{name}={least} must be between {smallest} and the {name} of training, {most}"
        )
    return least, most


def with_fewer_classes(episode: Episode, ways: Array, shots: Array) -> Episode:
    """The first classes of an episode, and the first examples of each; the rest is padding.

    Args:
      episode: Episode of one-hot labels, with the same number of examples of each class.
      ways: How many classes are real.
      shots: How many support examples of each of them are real.

    Examples:
      >>> y = jnp.eye(3)[jnp.array([2, 0, 0, 2, 1, 1])]
      >>> batch = Batch(jnp.zeros((6, 1)), y)
      >>> few = with_fewer_classes(Episode(batch, batch), jnp.array(2), jnp.array(1))
      >>> few.support.mask.tolist(), few.query.mask.tolist()
      ([False, True, False, False, True, False], [False, True, True, False, True, True])
    """
    real = [batch.y.argmax(1) < ways for batch in episode]
    y = episode.support.y
    of_class = (y * jnp.cumsum(y, 0)).sum(1)  # 1 for the first example of its class, 2, ...
    support = episode.support._replace(mask=real[0] & (of_class <= shots))
    return Episode(support, episode.query._replace(mask=real[1]))


@dataclasses.dataclass(frozen=True)
class RandomSizeSampler:
    """A sampler of another's episodes with a random number of classes and of shots.

    Attributes:
      sample: Sampler of episodes of the largest size.
      ways: Smallest and largest number of classes.
      shots: Smallest and largest number of support examples of each class.
    """

    sample: Any
    ways: tuple[int, int]
    shots: tuple[int, int]

    def __call__(self, key: Array, data: PyTree, /) -> Episode:
        """Draws an episode; what is not of it is padding."""
        sample_key, ways_key, shots_key = jax.random.split(key, 3)
        numbers = (
            jax.random.randint(k, (), least, most + 1)
            for k, (least, most) in ((ways_key, self.ways), (shots_key, self.shots))
        )
        return with_fewer_classes(self.sample(sample_key, data), *numbers)

    def rows(self, key: Array, data: PyTree, /) -> Array:
        """Rows of the dataset that the same key draws, where the other sampler says them."""
        return self.sample.rows(jax.random.split(key, 3)[0], data)
