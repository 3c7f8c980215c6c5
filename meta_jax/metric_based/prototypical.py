"""Prototypical Networks (Snell, Swersky and Zemel 2017, arXiv:1703.05175)."""

from typing import Literal

from meta_jax import registry
from meta_jax.core import Array, MetaLearner, Network, Objective
from meta_jax.metric_based.heads import prototype_head, prototype_regression_head
from meta_jax.metric_based.learner import metric_learner
from meta_jax.metric_based.primitives import (
    Similarity,
    choose,
    cosine_similarity,
    squared_distance,
)
from meta_jax.objectives import cross_entropy, target_kind


def _negative_squared_distance(z: Array, c: Array) -> Array:
    return -squared_distance(z, c)


_SIMILARITIES: dict[str, Similarity] = {
    "squared_euclidean": _negative_squared_distance,
    "cosine": cosine_similarity,
}


@registry.learner("prototypical", network="conv4", normalisation="running")
def prototypical(
    network: Network,
    *,
    objective: Objective = cross_entropy,
    distance: Literal["squared_euclidean", "cosine"] = "squared_euclidean",
    joint_encoding: bool = True,
) -> MetaLearner:
    """Builds a Prototypical Network: each class is the mean of its support embeddings.

    p(y = k | x) = softmax_k(-||f(x) - c_k||^2), with c_k the mean embedding of class k (eq. 2).
    The paper only classifies; real targets get a prototype for each output,
    `prototype_regression_head`.

    With its flag alone, 1000 outer steps give 87.9 % on glyphs (untrained 41.5 %) and a squared
    error of 1.63 on sinusoids (untrained 5.59).

    Args:
      network: Embedding network f.
      objective: Objective of the tasks.
      distance: Distance to the prototypes: squared_euclidean, or cosine for logits
        cos(f(x), c_k). Regression does not use it.
      joint_encoding: Whether support and queries are embedded as one batch in training, as the
        authors do.

    Returns:
      The learner. Ways, shots and queries may differ between training and tests.

    Raises:
      UsageError: an unknown distance.

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
    similarity = choose(_SIMILARITIES, "distance", distance)
    classifies = target_kind(objective) == "classification"
    head = prototype_head(similarity) if classifies else prototype_regression_head()
    return metric_learner(network, head, objective, joint_encoding=joint_encoding)
