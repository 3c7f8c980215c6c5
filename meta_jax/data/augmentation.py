"""Random distortions of images, on the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from meta_jax.core import Aux, Batch, Episode, MetaLearner, PyTree

Distortion = Callable[[jax.Array, jax.Array], jax.Array]  # (key, images [n, ...]) -> images


def distort_affine(key: jax.Array, images: jax.Array) -> jax.Array:
    """Turns, shears, scales and shifts each image at random (Koch et al. 2015, section 3.3).

    T = (theta, rho_x, rho_y, s_x, s_y, t_x, t_y): theta in [-10, 10] degrees, rho in [-0.3, 0.3],
    s in [0.8, 1.2] and t in [-2, 2] pixels, all uniform, each of the seven in use with
    probability 0.5.

    Args:
      key: a random key.
      images: [n, height, width, channels]; what moves in from outside is the border's pixel.

    Returns:
      [n, height, width, channels], by bilinear interpolation.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> images = jnp.ones((4, 28, 28, 1))
      >>> distorted = jax.jit(distort_affine)(jax.random.key(0), images)
      >>> distorted.shape, bool(jnp.allclose(distorted, 1))
      ((4, 28, 28, 1), True)
    """
    n = images.shape[0]
    low = jnp.array([-10.0, -0.3, -0.3, 0.8, 0.8, -2.0, -2.0])
    high = jnp.array([10.0, 0.3, 0.3, 1.2, 1.2, 2.0, 2.0])
    neutral = jnp.array([0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    value_key, use_key = jax.random.split(key)
    values = jax.random.uniform(value_key, (n, 7), minval=low, maxval=high)
    values = jnp.where(jax.random.bernoulli(use_key, 0.5, (n, 7)), values, neutral)
    return jax.vmap(_distort)(images, affine_matrices(values), values[:, 5:])


def distorted_training(
    learner: MetaLearner, distortion: Distortion = distort_affine
) -> MetaLearner:
    """A learner that is trained on distorted images, as Koch et al. (2015) do.

    Args:
      learner: any learner of images.
      distortion: (key, images [n, ...]) -> images of the same shape.

    Returns:
      The learner, whose `loss` distorts support and queries before it looks at them. Its `adapt`
      and `predict`, and so validation and tests, see the images as they are.

    Examples:
      >>> import meta_jax as mj
      >>> learner = distorted_training(mj.prototypical(mj.conv4(8)))
    """

    def loss(
        params: PyTree, state: PyTree, episode: Episode, key: jax.Array
    ) -> tuple[jax.Array, Aux]:
        loss_key, *keys = jax.random.split(key, 3)
        distorted = [
            Batch(distortion(k, batch.x), batch.y) for k, batch in zip(keys, episode, strict=True)
        ]
        return learner.loss(params, state, Episode(*distorted), loss_key)

    return learner._replace(loss=loss)


def affine_matrices(values: jax.Array) -> jax.Array:
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


def _distort(image: jax.Array, matrix: jax.Array, shift: jax.Array) -> jax.Array:
    """Moves what is at p, seen from the centre, to matrix p + shift."""
    height, width, channels = image.shape
    centre = jnp.array([(width - 1) / 2, (height - 1) / 2])
    rows, columns = jnp.mgrid[:height, :width]
    place = jnp.stack([columns, rows], -1) - centre - shift
    x, y = jnp.moveaxis(place @ jnp.linalg.inv(matrix).T + centre, -1, 0)
    return jnp.stack(
        [
            jax.scipy.ndimage.map_coordinates(image[:, :, c], [y, x], order=1, mode="nearest")
            for c in range(channels)
        ],
        axis=-1,
    )
