"""The baseline that every learned embedding has to beat: nearest neighbour in input space."""

import jax
import jax.numpy as jnp

from meta_jax.core import Batch, Episode, MetaLearner, PyTree, cross_entropy, episode_loss
from meta_jax.metric_based.heads import squared_distance


def nearest_neighbour() -> MetaLearner:
    """Each query takes the class of the support input nearest to it; nothing is learned.

    The logits are minus the squared Euclidean distance to the nearest support input of each
    class, on raw inputs [n, ...] flattened.
    """

    def init(key: jax.Array, episode: Episode) -> tuple[PyTree, PyTree]:
        del key, episode
        return {}, {}

    def adapt(
        params: PyTree, state: PyTree, support: Batch, key: jax.Array, *, train: bool
    ) -> tuple[Batch, PyTree]:
        del params, key, train
        return support, state

    def predict(
        params: PyTree, adapted: tuple[Batch, PyTree], x: jax.Array, key: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        del params, key, train
        support, state = adapted
        flat = [a.reshape(a.shape[0], -1) for a in (x, support.x)]
        distance = squared_distance(*flat)[:, :, None]
        return -jnp.where(support.y > 0, distance, jnp.inf).min(1), state

    return MetaLearner(init, adapt, predict, episode_loss(adapt, predict, cross_entropy))
