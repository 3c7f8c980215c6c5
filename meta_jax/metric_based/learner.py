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
    cross_entropy,
)
from meta_jax.metric_based.heads import Head


class MetricAdapted(NamedTuple):
    """A support set absorbed."""

    fitted: Any  # what the head keeps of the support embeddings
    state: PyTree  # the network's state, and the head's


def metric_learner(
    network: Network,
    head: Head,
    criterion: Criterion = cross_entropy,
    *,
    joint_encoding: bool = True,
) -> MetaLearner:
    """Embeds the support set, fits the head on it, and asks the head about the queries.

    Args:
      network: the embedding network.
      head: see `meta_jax.metric_based.heads`.
      criterion: (outputs [m, ways], y [m, ways]) -> (loss, metrics); unused where the head has a
        loss of its own.
      joint_encoding: while training, embed support and queries as one batch, as Snell et al.
        (2017) do; it matters to batch norm only. Without it, and where the network's batch norm
        is 'support', the training loss is criterion(predict(adapt(S), B)).

    Returns:
      The learner; its parameters are {'network', 'head'}. Its state is the network's, with the
      head's under 'head' where the head has one.
    """
    joint = joint_encoding and network.batch_norm != "support"

    def init(key: jax.Array, episode: Episode) -> tuple[PyTree, PyTree]:
        network_key, head_key = jax.random.split(key)
        support = episode.support
        params, state = network.init(network_key, support.x)
        z, _ = network.apply_to_support(params, state, support.x, key=head_key, train=False)
        head_params, head_state = head.init(head_key, z, support.y)
        return {"network": params, "head": head_params}, _joined(state, head_state)

    def adapt(
        params: PyTree, state: PyTree, support: Batch, key: jax.Array, *, train: bool
    ) -> MetricAdapted:
        state, head_state = _apart(state)
        z, state = network.apply_to_support(
            params["network"], state, support.x, key=key, train=train
        )
        fitted, head_state = head.fit(params["head"], head_state, z, support.y, train=train)
        return MetricAdapted(fitted, _joined(state, head_state))

    def predict(
        params: PyTree, adapted: MetricAdapted, x: jax.Array, key: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        state, head_state = _apart(adapted.state)
        z, state = network.apply_to_queries(params["network"], state, x, key=key, train=train)
        outputs, head_state = head.predict(
            params["head"], head_state, adapted.fitted, z, train=train
        )
        return outputs, _joined(state, head_state)

    def loss(
        params: PyTree, state: PyTree, episode: Episode, key: jax.Array
    ) -> tuple[jax.Array, Aux]:
        support, query = episode
        state, head_state = _apart(state)
        if joint:
            x, n = jnp.concatenate([support.x, query.x]), support.x.shape[0]
            z, state = network.apply(params["network"], state, x, key=key, train=True)
            z_support, z_query = z[:n], z[n:]
        else:
            keys = jax.random.split(key)
            z_support, state = network.apply_to_support(
                params["network"], state, support.x, key=keys[0], train=True
            )
            z_query, state = network.apply_to_queries(
                params["network"], state, query.x, key=keys[1], train=True
            )
        fitted, head_state = head.fit(params["head"], head_state, z_support, support.y, train=True)
        if head.loss is not None:
            value, metrics = head.loss(params["head"], fitted, z_query, query.y)
        else:
            outputs, head_state = head.predict(
                params["head"], head_state, fitted, z_query, train=True
            )
            value, metrics = criterion(outputs, query.y)
        return value, Aux(_joined(state, head_state), metrics)

    return MetaLearner(init, adapt, predict, loss)


def _joined(state: PyTree, head_state: PyTree) -> PyTree:
    return {**state, "head": head_state} if head_state else state


def _apart(state: PyTree) -> tuple[PyTree, PyTree]:
    network_state = {name: value for name, value in state.items() if name != "head"}
    return network_state, state.get("head", {})
