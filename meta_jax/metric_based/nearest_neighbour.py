"""The baseline that every learned embedding has to beat: nearest neighbour in input space."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax import registry
from meta_jax.core import (
    Array,
    Batch,
    Episode,
    MetaLearner,
    Objective,
    PyTree,
    supervised_evaluate,
    supervised_loss,
)
from meta_jax.metric_based.primitives import check_examples, squared_distance
from meta_jax.objectives import (
    as_real,
    check_batch,
    check_kind,
    cross_entropy,
    impossible_logit,
    tree_rows,
    without_padding,
)


class NeighbourAdapted(NamedTuple):
    """A support set remembered."""

    support: Batch
    state: PyTree  # empty


@registry.learner("nearest_neighbour", network=None)
def nearest_neighbour(*, objective: Objective = cross_entropy) -> MetaLearner:
    """Builds the baseline that gives each query the class of the nearest support input.

    The logits are minus the squared Euclidean distance to the nearest support input of each
    class, on raw inputs flattened. Nothing is learned.

    Args:
      objective: Objective of the tasks; it classifies.

    Raises:
      UsageError: the objective does not classify.
    """
    check_kind(objective, "classification", "nearest_neighbour")
    return MetaLearner(
        _init,
        _adapt,
        _predict,
        supervised_loss(_adapt, _predict, objective),
        supervised_evaluate(_adapt, _predict, objective),
    )


def flat_rows(x: PyTree) -> Array:
    """Inputs, leaves [n, ...], as vectors [n, D]."""
    n = tree_rows(x)
    return jnp.concatenate([as_real(leaf).reshape(n, -1) for leaf in jax.tree.leaves(x)], axis=1)


def _init(key: Array, episode: Episode) -> tuple[PyTree, PyTree]:
    del key, episode
    return {}, {}


def _adapt(
    params: PyTree, state: PyTree, support: Batch, key: Array, *, train: bool
) -> NeighbourAdapted:
    del params, key, train
    check_batch(support, "support")
    return NeighbourAdapted(support, state)


def _predict(
    params: PyTree,
    adapted: NeighbourAdapted,
    x: PyTree,
    key: Array,
    *,
    train: bool,
    mask: Array | None = None,
) -> tuple[Array, PyTree]:
    del params, key, train, mask
    support, state = adapted
    z = flat_rows(support.x)
    check_examples(z, support.y, support.mask)
    y = without_padding(support.y, support.mask)
    distance = squared_distance(flat_rows(x), z).astype(y.dtype)[:, :, None]
    return jnp.where(y > 0, -distance, impossible_logit(y.dtype)).max(1), state
