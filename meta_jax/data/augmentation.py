"""Random augmentation of images, on the device."""

import dataclasses
from typing import Any, Literal, Protocol, get_args

import jax
import jax.numpy as jnp

from meta_jax.core import Array, Batch, Episode, PyTree, Sample
from meta_jax.shapes import with_rank

Augment = Literal["none", "affine"]
AUGMENTATIONS: tuple[str, ...] = get_args(Augment)


class Augmentation(Protocol):
    """(key, x) -> x, changed at random."""

    def __call__(self, key: Array, x: Array, /) -> Array:
        """Changes each row of x [n, ...] by itself; the shape and dtype stay."""
        ...


def random_affine(key: Array, images: Array) -> Array:
    """Rotates, shears, scales and shifts each image at random (Koch et al. 2015, section 3.3).

    T = (theta, rho_x, rho_y, s_x, s_y, t_x, t_y): theta in [-10, 10] degrees, rho in [-0.3, 0.3],
    s in [0.8, 1.2] and t in [-2, 2] pixels, all uniform, each of the seven in use with
    probability 0.5.

    Args:
      key: Random key.
      images: Images [n, height, width, channels]; what moves in from outside is the border's
        pixel.

    Returns:
      [n, height, width, channels], by bilinear interpolation.

    Raises:
      ValueError: images are not real numbers of rank 4.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> images = jnp.ones((4, 28, 28, 1))
      >>> augmented_images = jax.jit(random_affine)(jax.random.key(0), images)
      >>> augmented_images.shape, bool(jnp.allclose(augmented_images, 1))
      ((4, 28, 28, 1), True)
    """
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            "images must be real [n, height, width, channels], not "
            f"{images.dtype} {list(images.shape)}"
        )
    n = images.shape[0]
    low = jnp.array([-10.0, -0.3, -0.3, 0.8, 0.8, -2.0, -2.0])
    high = jnp.array([10.0, 0.3, 0.3, 1.2, 1.2, 2.0, 2.0])
    neutral = jnp.array([0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    value_key, use_key = jax.random.split(key)
    values = jax.random.uniform(value_key, (n, 7), minval=low, maxval=high)
    values = jnp.where(jax.random.bernoulli(use_key, 0.5, (n, 7)), values, neutral)
    moved = jax.vmap(_transform)(images, affine_matrices(values), values[:, 5:])
    return moved.astype(images.dtype)


def augmented(sample: Sample, augmentation: Augmentation = random_affine) -> Sample:
    """Builds a sampler that augments the inputs of the episodes of another.

    Support and queries are augmented with keys of their own. It is meant for training alone:
    `TaskSource.tasks` uses it where `train` is True.

    Args:
      sample: Sampler of episodes.
      augmentation: Function (key, x) -> x of the same shape and dtype.

    Examples:
      >>> from meta_jax.data.episodes import EpisodeSpec, sample_episode
      >>> spec = EpisodeSpec(ways=5, shots=1, queries=1)
      >>> sample = augmented(lambda key, data: sample_episode(key, data, spec))
    """

    return AugmentedSampler(sample, augmentation)


@dataclasses.dataclass(frozen=True)
class AugmentedSampler:
    """A sampler that augments the inputs of another's episodes.

    Attributes:
      sample: Sampler of episodes.
      augmentation: Function (key, x) -> x of the same shape and dtype.
    """

    sample: Any
    augmentation: Augmentation

    def __call__(self, key: Array, data: PyTree, /) -> Episode:
        """Draws an episode; support and queries are augmented with keys of their own."""
        sample_key, support_key, query_key = jax.random.split(key, 3)
        support, query = self.sample(sample_key, data)
        return Episode(
            _augment_batch(support_key, support, self.augmentation),
            _augment_batch(query_key, query, self.augmentation),
        )

    def rows(self, key: Array, data: PyTree, /) -> Array:
        """Rows of the dataset that the same key draws, where the other sampler says them."""
        return self.sample.rows(jax.random.split(key, 3)[0], data)


def _augment_batch(key: Array, batch: Batch, augmentation: Augmentation) -> Batch:
    return batch._replace(x=augmentation(key, batch.x))


def affine_matrices(values: Array) -> Array:
    """Rotation after shear after scale, on columns (x, y).

    Args:
      values: [n, 7], or [n, 5]: theta in degrees, rho_x, rho_y, s_x, s_y.

    Returns:
      [n, 2, 2].
    """
    angle = jnp.deg2rad(values[:, 0])
    one, cos, sin = jnp.ones_like(angle), jnp.cos(angle), jnp.sin(angle)
    turn = jnp.array([[cos, -sin], [sin, cos]])
    shear = jnp.array([[one, values[:, 1]], [values[:, 2], one]])
    scale = values[:, None, 3:5]  # of the columns
    return jnp.einsum("ijn,jkn->nik", turn, shear) * scale


def _transform(image: Array, matrix: Array, shift: Array) -> Array:
    """Moves what is at p, seen from the centre, to matrix p + shift."""
    height, width, channels = image.shape
    centre = jnp.array([(width - 1) / 2, (height - 1) / 2])
    rows, columns = jnp.mgrid[:height, :width]
    place = jnp.stack([columns, rows], -1)
    place = place - with_rank(centre, place) - with_rank(shift, place)
    x, y = jnp.moveaxis(place @ jnp.linalg.inv(matrix).T + with_rank(centre, place), -1, 0)
    return jnp.stack(
        [
            jax.scipy.ndimage.map_coordinates(image[:, :, c], [y, x], order=1, mode="nearest")
            for c in range(channels)
        ],
        axis=-1,
    )
