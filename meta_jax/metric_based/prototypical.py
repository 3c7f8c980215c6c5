"""Prototypical Networks (Snell, Swersky and Zemel 2017, arXiv:1703.05175)."""

from meta_jax.core import MetaLearner, Network, cross_entropy, squared_error
from meta_jax.metric_based.heads import (
    cosine_similarity,
    linear_head,
    prototype_head,
    squared_distance,
)
from meta_jax.metric_based.learner import metric_learner

_SIMILARITIES = {
    "squared_euclidean": lambda z, c: -squared_distance(z, c),
    "cosine": cosine_similarity,
}


def prototypical(
    network: Network,
    *,
    distance: str = "squared_euclidean",
    regression: bool = False,
    joint_encoding: bool = True,
) -> MetaLearner:
    """p(y = k | x) = softmax_k(-||f(x) - c_k||^2), with c_k the mean embedding of class k (eq. 2).

    Args:
      network: the embedding network f.
      distance: 'squared_euclidean', or 'cosine' for logits cos(f(x), c_k).
      regression: whether y are real targets, trained by their squared error; then the head is
        `linear_head`, whatever the distance. The paper only classifies.
      joint_encoding: embed support and queries as one batch in training, as the authors do.

    Returns:
      The learner. Ways, shots and queries may differ between training and tests.

    Raises:
      ValueError: for an unknown distance.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from meta_jax.core import Batch, Episode
      >>> from meta_jax.networks.mlp import mlp
      >>> learner = prototypical(mlp((8,)))
      >>> support = Batch(jnp.array([[0., 1.], [1., 0.]]), jnp.eye(2))
      >>> params, state = learner.init(jax.random.key(0), Episode(support, support))
      >>> adapted = learner.adapt(params, state, support, jax.random.key(1), train=False)
      >>> logits, _ = learner.predict(params, adapted, support.x, jax.random.key(2), train=False)
      >>> logits.argmax(1).tolist()
      [0, 1]
    """
    if distance not in _SIMILARITIES:
        raise ValueError(f"unknown distance '{distance}': choose one of {', '.join(_SIMILARITIES)}")
    if regression:
        return metric_learner(network, linear_head(), squared_error, joint_encoding=joint_encoding)
    head = prototype_head(_SIMILARITIES[distance])
    return metric_learner(network, head, cross_entropy, joint_encoding=joint_encoding)
