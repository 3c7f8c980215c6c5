"""Relation Networks (Sung et al. 2018, arXiv:1711.06025)."""

import jax
import jax.numpy as jnp

from meta_jax.core import MetaLearner, Network, PyTree, cross_entropy
from meta_jax.metric_based.heads import Head
from meta_jax.metric_based.learner import metric_learner
from meta_jax.networks.layers import check_batch_norm
from meta_jax.networks.relation_network import init_relation_module, relation_module


def class_maps(z: jax.Array, y: jax.Array) -> jax.Array:
    """Sums of feature maps over the examples of each class (Sung et al. 2018, section 3.2).

    Args:
      z: feature maps [n, height, width, channels].
      y: one-hot labels [n, ways]; all-zero rows are padding.

    Returns:
      [ways, height, width, channels].

    Examples:
      >>> import jax.numpy as jnp
      >>> z = jnp.array([1., 2., 5.]).reshape(3, 1, 1, 1)
      >>> y = jnp.array([[1., 0.], [1., 0.], [0., 1.]])
      >>> class_maps(z, y).ravel().tolist()
      [3.0, 5.0]
    """
    return jnp.einsum("nk,n...->k...", y, z)


def relation_error(logits: jax.Array, y: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean over all pairs of (sigmoid(logit) - 1[y_i = y_j])^2 (eq. 2).

    Scores that do not depend on the pair cannot beat (1 - 1/ways) / ways: 0.16 for 5 ways.

    Args:
      logits: [n, ways], relation scores before their sigmoid.
      y: one-hot labels [n, ways]; an all-zero row is padding.

    Returns:
      The loss and the metric `accuracy`.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss, _ = relation_error(jnp.full((5, 5), -jnp.log(4.)), jnp.eye(5))
      >>> round(float(loss), 4)
      0.16
    """
    real = y.sum(1, keepdims=True)
    error = real * (jax.nn.sigmoid(logits) - y) ** 2
    _, metrics = cross_entropy(logits, y)
    return error.sum() / (jnp.maximum(real.sum(), 1) * y.shape[1]), metrics


_CRITERIA = {"squared_error": relation_error, "cross_entropy": cross_entropy}


def relation_head(*, batch_norm: str, features: int = 64, padding: str = "SAME") -> Head:
    """The relation module on sums of feature maps; its outputs are scores before their sigmoid.

    Where batch norm is 'support', `fit` takes the module's statistics from the pairs of a class and
    a support example.

    Args:
      batch_norm: a mode of `meta_jax.networks.layers`.
      features: channels of the module's convolutions.
      padding: of its convolutions, see `init_relation_module`.
    """
    check_batch_norm(batch_norm)

    def init(key: jax.Array, z: jax.Array, y: jax.Array) -> tuple[PyTree, PyTree]:
        del y
        return init_relation_module(key, z, features=features, padding=padding)

    def fit(
        params: PyTree, state: PyTree, z: jax.Array, y: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        del train
        maps = class_maps(z, y)
        if batch_norm == "support":
            _, state = relation_module(
                params, state, maps, z, batch_norm=batch_norm, train=True, padding=padding
            )
        return maps, state

    def predict(
        params: PyTree, state: PyTree, fitted: jax.Array, z: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        return relation_module(
            params,
            state,
            fitted,
            z,
            batch_norm=batch_norm,
            train=train and batch_norm != "support",
            padding=padding,
        )

    return Head(init, fit, predict)


def relation(
    network: Network,
    *,
    criterion: str = "squared_error",
    features: int = 64,
    padding: str = "SAME",
    joint_encoding: bool | None = None,
) -> MetaLearner:
    """r_ij = sigmoid(g([sum_k f(x_ik), f(x_j)])), g a network that learns to compare (eq. 1).

    The module's batch norm has the network's mode. The paper's is 'batch': statistics of whatever
    is asked, transductive on queries.

    Args:
      network: the encoder f, from images to feature maps: `relation_encoder`.
      criterion: 'squared_error' of the sigmoid against 1[y_i = y_j], as in the paper, or
        'cross_entropy' of the scores as logits.
      features: channels of the relation module.
      padding: of the relation module: 'SAME' (Omniglot), or 'VALID' (miniImageNet).
      joint_encoding: embed support and queries as one batch in training; by default where batch
        norm is 'running'. The authors, whose 'batch' mode takes the statistics of each apart in
        tests, embed them apart in training too.

    Returns:
      The learner. Ways, shots and queries may differ between training and tests.

    Raises:
      ValueError: for an unknown criterion, or a network without batch norm.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from meta_jax.core import Batch, Episode
      >>> from meta_jax.networks.relation_network import relation_encoder
      >>> learner = relation(relation_encoder())
      >>> support = Batch(jnp.zeros((5, 28, 28, 1)), jnp.eye(5))
      >>> params, _ = jax.eval_shape(learner.init, jax.random.key(0), Episode(support, support))
      >>> {part: sum(leaf.size for leaf in jax.tree.leaves(params[part])) for part in params}
      {'head': 111505, 'network': 111936}
    """
    if criterion not in _CRITERIA:
        raise ValueError(f"unknown criterion '{criterion}': choose one of {', '.join(_CRITERIA)}")
    if joint_encoding is None:
        joint_encoding = network.batch_norm == "running"
    head = relation_head(batch_norm=network.batch_norm, features=features, padding=padding)
    return metric_learner(network, head, _CRITERIA[criterion], joint_encoding=joint_encoding)
