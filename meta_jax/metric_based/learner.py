"""The metric learner: an embedding network and a head on its embeddings."""

import functools
from typing import Any, NamedTuple

import jax

from meta_jax.core import (
    Array,
    Batch,
    Episode,
    Loss,
    LossAux,
    MetaLearner,
    Network,
    Objective,
    ObjectiveLoss,
    PyTree,
    check_episode,
    supervised_evaluate,
)
from meta_jax.metric_based.heads import Head
from meta_jax.networks.normalisation import (
    embed_apart,
    embed_queries,
    embed_support,
    embed_together,
    may_embed_together,
    queries_need_support,
)
from meta_jax.objectives import check_batch, cross_entropy


class MetricAdapted(NamedTuple):
    """A support set absorbed.

    Attributes:
      fitted: What the head keeps of the support embeddings.
      state: State of both, {'network', 'head'}.
      support: The support set, where queries are embedded beside it, in the mode `one_at_a_time`;
        else None.
    """

    fitted: Any
    state: PyTree
    support: Batch | None


def metric_learner(
    network: Network,
    head: Head,
    objective: Objective = cross_entropy,
    *,
    joint_encoding: bool = True,
    train_loss: ObjectiveLoss | None = None,
) -> MetaLearner:
    """Builds a learner that embeds the support set, fits a head on it, and asks it about queries.

    Args:
      network: Embedding network.
      head: Head on the embeddings; see `meta_jax.metric_based.heads`.
      objective: Objective of the tasks.
      joint_encoding: Whether support and queries are embedded as one batch in training, as Snell
        et al. (2017) do, where the network's mode of normalisation allows it. It matters only where
        moments of the batch are taken.
      train_loss: Loss of the outputs in training, where it is not the objective's. A head's own
        loss takes its place.

    Returns:
      The learner; its parameters and its state are {'network', 'head'} each.
    """

    def adapt(
        params: PyTree, state: PyTree, support: Batch, key: Array, *, train: bool
    ) -> MetricAdapted:
        check_batch(support, "support")
        z, network_state = embed_support(
            network, params["network"], state["network"], support, key=key, train=train
        )
        fitted, head_state = head.fit(
            params["head"], state["head"], z, support.y, support.mask, train=train
        )
        kept = support if queries_need_support(network.normalisation) else None
        return MetricAdapted(fitted, {"network": network_state, "head": head_state}, kept)

    def predict(
        params: PyTree,
        adapted: MetricAdapted,
        x: PyTree,
        key: Array,
        *,
        train: bool,
        mask: Array | None = None,
    ) -> tuple[PyTree, PyTree]:
        z, network_state = embed_queries(
            network,
            params["network"],
            adapted.state["network"],
            x,
            support=adapted.support,
            key=key,
            train=train,
            mask=mask,
        )
        outputs, head_state = head.predict(
            params["head"], adapted.state["head"], adapted.fitted, z, train=train, mask=mask
        )
        return outputs, {"network": network_state, "head": head_state}

    loss = _training_loss(network, head, objective, train_loss, joint_encoding=joint_encoding)
    init = functools.partial(_init, network, head)
    return MetaLearner(init, adapt, predict, loss, supervised_evaluate(adapt, predict, objective))


def _init(network: Network, head: Head, key: Array, episode: Episode) -> tuple[PyTree, PyTree]:
    network_key, embed_key, head_key = jax.random.split(key, 3)
    support = episode.support
    check_batch(support, "support")
    params, state = network.init(network_key, support.x)
    z, _ = embed_support(network, params, state, support, key=embed_key, train=False)
    head_params, head_state = head.init(head_key, z, support.y, support.mask)
    return {"network": params, "head": head_params}, {"network": state, "head": head_state}


def _training_loss(
    network: Network,
    head: Head,
    objective: Objective,
    train_loss: ObjectiveLoss | None,
    *,
    joint_encoding: bool,
) -> Loss:
    output_loss = train_loss or objective.loss
    joint = joint_encoding and may_embed_together(network.normalisation)

    def loss(params: PyTree, state: PyTree, episode: Episode, key: Array) -> tuple[Array, LossAux]:
        support, query = episode
        # A head with a loss of its own learns the classes of the queries too.
        check_episode(episode, objective if head.loss is None else None)
        embed = embed_together if joint else embed_apart
        z_support, z, network_state = embed(
            network, params["network"], state["network"], support, query, key=key
        )
        fitted, head_state = head.fit(
            params["head"], state["head"], z_support, support.y, support.mask, train=True
        )
        if head.loss is not None:
            value, metrics = head.loss(params["head"], fitted, z, query.y, query.mask)
        else:
            outputs, head_state = head.predict(
                params["head"], head_state, fitted, z, train=True, mask=query.mask
            )
            value, metrics = output_loss(outputs, query.y, query.mask)
        return value, LossAux({"network": network_state, "head": head_state}, metrics)

    return loss
