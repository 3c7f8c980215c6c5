"""The metric learner: an embedding network and a head on its embeddings."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import (
    Aux,
    Batch,
    Criterion,
    Episode,
    MetaLearner,
    Network,
    PyTree,
    episode_loss,
)
from meta_jax.metric_based.heads import Head


class MetricAdapted(NamedTuple):
    """A support set absorbed."""

    fitted: Any  # what the head keeps of the support embeddings
    state: PyTree  # the network's state


def metric_learner(
    network: Network, head: Head, criterion: Criterion, *, joint_encoding: bool = True
) -> MetaLearner:
    """Embeds the support set, fits the head on it, and asks the head about the queries.

    Args:
      network: the embedding network.
      head: see `meta_jax.metric_based.heads`.
      criterion: (outputs [m, ways], y [m, ways]) -> (loss, metrics).
      joint_encoding: while training, embed support and queries as one batch, as Snell et al.
        (2017) do; it matters to batch norm only. Without it, and where the network's batch norm
        is 'support', the training loss is criterion(predict(adapt(S), B)).

    Returns:
      The learner; its parameters are {'network', 'head'}.
    """

    def init(key: jax.Array, episode: Episode) -> tuple[PyTree, PyTree]:
        network_key, head_key = jax.random.split(key)
        support = episode.support
        params, state = network.init(network_key, support.x)
        z, _ = network.apply_to_support(params, state, support.x, key=head_key, train=False)
        return {"network": params, "head": head.init(head_key, z, support.y)}, state

    def adapt(
        params: PyTree, state: PyTree, support: Batch, key: jax.Array, *, train: bool
    ) -> MetricAdapted:
        z, state = network.apply_to_support(
            params["network"], state, support.x, key=key, train=train
        )
        return MetricAdapted(head.fit(params["head"], z, support.y), state)

    def predict(
        params: PyTree, adapted: MetricAdapted, x: jax.Array, key: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        z, state = network.apply_to_queries(
            params["network"], adapted.state, x, key=key, train=train
        )
        return head.predict(params["head"], adapted.fitted, z), state

    def joint_loss(
        params: PyTree, state: PyTree, episode: Episode, key: jax.Array
    ) -> tuple[jax.Array, Aux]:
        support, query = episode
        x = jnp.concatenate([support.x, query.x])
        z, state = network.apply(params["network"], state, x, key=key, train=True)
        n = support.x.shape[0]
        fitted = head.fit(params["head"], z[:n], support.y)
        value, metrics = criterion(head.predict(params["head"], fitted, z[n:]), query.y)
        return value, Aux(state, metrics)

    if not joint_encoding or network.batch_norm == "support":
        return MetaLearner(init, adapt, predict, episode_loss(adapt, predict, criterion))
    return MetaLearner(init, adapt, predict, joint_loss)
