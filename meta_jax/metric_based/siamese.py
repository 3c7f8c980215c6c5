"""Convolutional Siamese Networks (Koch, Zemel and Salakhutdinov 2015)."""

import jax
import jax.numpy as jnp

from meta_jax.core import MetaLearner, Network, PyTree, cross_entropy
from meta_jax.metric_based.heads import Head, stateless_head
from meta_jax.metric_based.learner import metric_learner


def pair_logits(params: PyTree, a: jax.Array, b: jax.Array) -> jax.Array:
    """The logit of "same class" for each pair, sum_j alpha_j |a_j - b_j| + beta.

    Args:
      params: {'weight' [D], 'bias' scalar}, alpha and beta.
      a: embeddings [m, D].
      b: embeddings [n, D].

    Returns:
      [m, n]; symmetric in a and b, and beta where they are equal.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"weight": jnp.array([-1., -2.]), "bias": jnp.array(3.)}
      >>> a = jnp.array([[1., 1.]])
      >>> pair_logits(params, a, jnp.array([[1., 1.], [0., 3.]])).tolist()
      [[3.0, -2.0]]
    """
    return abs(a[:, None] - b) @ params["weight"] + params["bias"]


def pair_cross_entropy(logits: jax.Array, same: jax.Array, real: jax.Array) -> jax.Array:
    """Binary cross-entropy over pairs, in nats; equal and unequal pairs weigh one half each.

    Koch et al. draw as many pairs of one class as of two. An episode's pairs are mostly of two
    classes, hence the weights.

    Args:
      logits: of "same class", [m, n].
      same: 1 for a pair of one class, else 0, [m, n].
      real: 0 for pairs with padding, else 1, [m, n].

    Examples:
      >>> import jax.numpy as jnp
      >>> loss = pair_cross_entropy(jnp.zeros((5, 5)), jnp.eye(5), jnp.ones((5, 5)))
      >>> round(float(loss), 4)  # ln 2
      0.6931
    """
    loss = jnp.logaddexp(0, jnp.where(same > 0, -logits, logits))
    shares = [weight / jnp.maximum(weight.sum(), 1) for weight in (real * same, real * (1 - same))]
    return (0.5 * sum(shares) * loss).sum()


def pairwise_head(*, init_scale: float = 0.02) -> Head:
    """The head that compares each query with each support example, by `pair_logits`.

    Its outputs are the logits of each class's best pair, its loss is `pair_cross_entropy` over all
    pairs of a query and a support example.

    Args:
      init_scale: the first alpha are -|N(0, init_scale)|. The paper's are N(0, 0.2), of either
        sign, on sigmoid outputs; on Conv4's, smaller ones of one sign learn faster.
    """

    def init(key: jax.Array, z: jax.Array, y: jax.Array) -> PyTree:
        del y
        # All signs alike: what begins as a reward for being different would have to be unlearned.
        weight = -init_scale * abs(jax.random.normal(key, z.shape[1:], z.dtype))
        return {"weight": weight, "bias": jnp.zeros((), z.dtype)}

    def fit(params: PyTree, z: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        del params
        return z, y

    def best(logits: jax.Array, y: jax.Array) -> jax.Array:
        # The logit of a class without examples is finite, as in `kernel_logits`.
        return jnp.where(y > 0, logits[:, :, None], -1e30).max(1)

    def predict(params: PyTree, fitted: tuple[jax.Array, jax.Array], z: jax.Array) -> jax.Array:
        support, y = fitted
        return best(pair_logits(params, z, support), y)

    def loss(
        params: PyTree, fitted: tuple[jax.Array, jax.Array], z: jax.Array, y: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        support, y_support = fitted
        logits = pair_logits(params, z, support)
        real = y.sum(1)[:, None] * y_support.sum(1)
        value = pair_cross_entropy(logits, y @ y_support.T, real)
        # A tie between the best pairs is wrong, not the class that happens to come first.
        _, metrics = cross_entropy(best(logits, y_support), y)
        return value, metrics

    return stateless_head(fit, predict, init=init, loss=loss)


def siamese(network: Network, *, joint_encoding: bool = True) -> MetaLearner:
    """p(x, x') = sigma(sum_j alpha_j |f_j(x) - f_j(x')| + beta), f the twins.

    A query takes the class of its best pair. Koch et al. train on distorted images:
    `distorted_training`.

    Args:
      network: the twins' embedding network f: `koch` in the paper, `conv4` for small images.
      joint_encoding: embed support and queries as one batch in training.

    Returns:
      The learner. Ways, shots and queries may differ between training and tests. Its outputs are
      the logits of "same class" of the best pair of each class.

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
    return metric_learner(network, pairwise_head(), joint_encoding=joint_encoding)
