"""Convolutional Siamese Networks (Koch, Zemel and Salakhutdinov 2015)."""

import jax
import jax.numpy as jnp

from meta_jax import registry
from meta_jax.core import Array, MetaLearner, Metrics, Network, Objective, PyTree
from meta_jax.metric_based.heads import Examples, Head, keep_examples, stateless_head
from meta_jax.metric_based.learner import metric_learner
from meta_jax.metric_based.primitives import check_examples, check_vectors
from meta_jax.objectives import (
    check_kind,
    check_outputs,
    cross_entropy,
    impossible_logit,
    without_padding,
)


def pair_logits(params: PyTree, a: Array, b: Array) -> Array:
    """The logit of "same class" for each pair, sum_j alpha_j |a_j - b_j| + beta.

    Args:
      params: {'weight' [D], 'bias' scalar}, alpha and beta.
      a: Embeddings [m, D].
      b: Embeddings [n, D].

    Returns:
      [m, n]; symmetric in a and b, and beta where they are equal.

    Raises:
      ValueError: a or b is not of rank 2.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"weight": jnp.array([-1., -2.]), "bias": jnp.array(3.)}
      >>> a = jnp.array([[1., 1.]])
      >>> pair_logits(params, a, jnp.array([[1., 1.], [0., 3.]])).tolist()
      [[3.0, -2.0]]
    """
    check_vectors("a", a)
    check_vectors("b", b)
    return abs(a[:, None] - b[None]) @ params["weight"] + params["bias"]


def pair_cross_entropy(logits: Array, same: Array, mask: Array | None = None) -> Array:
    """Binary cross-entropy over pairs, in nats; equal and unequal pairs weigh one half each.

    Koch et al. draw as many pairs of one class as of two. An episode's pairs are mostly of two
    classes, hence the weights.

    Args:
      logits: Logits of "same class", [m, n].
      same: 1 for a pair of one class, else 0, [m, n].
      mask: bool [m, n], False for pairs with padding.

    Raises:
      ValueError: logits and same differ in shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> loss = pair_cross_entropy(jnp.zeros((5, 5)), jnp.eye(5))
      >>> round(float(loss), 4)  # ln 2
      0.6931
    """
    check_outputs(logits, same)
    loss = jnp.logaddexp(0, jnp.where(same > 0, -logits, logits))
    if mask is None:
        mask = jnp.ones(same.shape, bool)
    return 0.5 * (_mean_of(loss, mask & (same > 0)) + _mean_of(loss, mask & (same <= 0)))


def _mean_of(loss: Array, chosen: Array) -> Array:
    return jnp.where(chosen, loss, 0).sum() / jnp.maximum(chosen.sum(), 1).astype(loss.dtype)


def best_pair(logits: Array, y: Array, mask: Array | None = None) -> Array:
    """The logit of each class's best pair.

    Args:
      logits: Logits of "same class", [m, n].
      y: One-hot labels of the support examples [n, ways].
      mask: bool [n], False for padding.

    Returns:
      [m, ways]; about -1e30 for a class without examples.
    """
    y = without_padding(y, mask)
    return jnp.where(y > 0, logits[:, :, None], impossible_logit(logits.dtype)).max(1)


def pairwise_head(*, objective: Objective = cross_entropy, init_scale: float = 0.02) -> Head:
    """Builds the head that compares each query with each support example, by `pair_logits`.

    Its outputs are the logits of each class's best pair, its loss is `pair_cross_entropy` over all
    pairs of a query and a support example.

    Args:
      objective: Gives the metrics of training.
      init_scale: The first alpha are -|N(0, init_scale)|. The paper's are N(0, 0.2), of either
        sign, on sigmoid outputs; on Conv4's, smaller ones of one sign learn faster.
    """

    def init(key: Array, z: Array, y: Array, mask: Array | None) -> PyTree:
        del y, mask
        check_vectors("z", z)
        # All signs alike: what begins as a reward for being different would have to be unlearned.
        weight = -init_scale * abs(jax.random.normal(key, z.shape[1:], z.dtype))
        return {"weight": weight, "bias": jnp.zeros((), z.dtype)}

    def predict(params: PyTree, fitted: Examples, z: Array) -> Array:
        return best_pair(pair_logits(params, z, fitted.z), fitted.y, fitted.mask)

    def loss(
        params: PyTree, fitted: Examples, z: Array, y: Array, mask: Array | None
    ) -> tuple[Array, Metrics]:
        check_examples(z, y, mask)
        logits = pair_logits(params, z, fitted.z)
        pairs = None
        if mask is not None or fitted.mask is not None:
            pairs = _real(y, mask)[:, None] & _real(fitted.y, fitted.mask)[None]
        value = pair_cross_entropy(logits, y @ fitted.y.T, pairs)
        # A tie between the best pairs is wrong, not the class that happens to come first.
        _, metrics = objective.loss(best_pair(logits, fitted.y, fitted.mask), y, mask)
        return value, metrics

    return stateless_head(keep_examples, predict, init=init, loss=loss)


def _real(y: Array, mask: Array | None) -> Array:
    return jnp.ones(y.shape[0], bool) if mask is None else mask


@registry.learner("siamese", network="conv4", normalisation="running")
def siamese(
    network: Network, *, objective: Objective = cross_entropy, joint_encoding: bool = True
) -> MetaLearner:
    """Builds a Siamese Network, which learns whether two examples are of one class.

    p(x, x') = sigma(sum_j alpha_j |f_j(x) - f_j(x')| + beta), f the twins. A query takes the class
    of its best pair. Training minimises `pair_cross_entropy` and tests measure the objective. Koch
    et al. train on randomly transformed images.

    With its flag alone, 1000 outer steps give 78.8 % on glyphs (untrained 40.4 %).

    Args:
      network: Embedding network f of the twins: koch in the paper, conv4 for small images.
      objective: Objective of the tasks; it classifies.
      joint_encoding: Whether support and queries are embedded as one batch in training.

    Returns:
      The learner. Ways, shots and queries may differ between training and tests. Its outputs are
      the logits of "same class" of the best pair of each class.

    Raises:
      UsageError: the objective does not classify.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from meta_jax.core import Batch, Episode
      >>> from meta_jax.networks.mlp import mlp
      >>> learner = siamese(mlp((8,)))
      >>> support = Batch(jnp.array([[0., 1.], [1., 0.]]), jnp.eye(2))
      >>> params, state = learner.init(jax.random.key(0), Episode(support, support))
      >>> adapted = learner.adapt(params, state, support, jax.random.key(1), train=False)
      >>> logits, _ = learner.predict(params, adapted, support.x, jax.random.key(2), train=False)
      >>> logits.shape
      (2, 2)
    """
    check_kind(objective, "classification", "siamese")
    head = pairwise_head(objective=objective)
    return metric_learner(network, head, objective, joint_encoding=joint_encoding)
