"""Matching Networks (Vinyals et al. 2016, arXiv:1606.04080)."""

import jax
import jax.numpy as jnp

from meta_jax.core import MetaLearner, Network, PyTree, cross_entropy, squared_error
from meta_jax.metric_based.heads import (
    Head,
    attention,
    cosine_similarity,
    kernel_head,
    squared_distance,
    stateless_head,
)
from meta_jax.metric_based.learner import metric_learner
from meta_jax.networks.lstm import init_lstm, lstm

_SIMILARITIES = {
    "cosine": cosine_similarity,
    "squared_euclidean": lambda a, b: -squared_distance(a, b),
}


def init_full_context(key: jax.Array, size: int) -> PyTree:
    """Parameters of the full-context embeddings of vectors [n, size].

    `forward` and `backward` are the two directions of g; `attention` is the LSTM of f, whose
    recurrent input [h, r] is twice as wide as its output.
    """
    forward, backward, query = jax.random.split(key, 3)
    return {
        "forward": init_lstm(forward, size, size),
        "backward": init_lstm(backward, size, size),
        "attention": init_lstm(query, size, size, recurrent=2 * size),
    }


def embed_support_in_context(params: PyTree, z: jax.Array, mask: jax.Array) -> jax.Array:
    """g(x_i, S) = h_i forward + h_i backward + g'(x_i), a bidirectional LSTM over the support.

    Args:
      params: from `init_full_context`.
      z: support embeddings g'(x_i), [n, D], in the order in which the LSTMs read them.
      mask: [n], False for rows that are padding: the LSTMs pass over them.

    Returns:
      [n, D] (Vinyals et al. 2016, appendix A.2).

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = init_full_context(jax.random.key(0), 3)
      >>> zeros = jax.tree.map(jnp.zeros_like, params)  # nothing is read: the identity
      >>> embed_support_in_context(zeros, jnp.eye(3)[:2], jnp.ones(2, bool)).tolist()
      [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """

    def read(params: PyTree, *, reverse: bool) -> jax.Array:
        def step(carry: tuple, row: tuple) -> tuple[tuple, jax.Array]:
            x, real = row
            new = lstm(params, x, *carry)
            carry = jax.tree.map(lambda new, old: jnp.where(real, new, old), new, carry)
            return carry, carry[0]

        start = (jnp.zeros_like(z[0]), jnp.zeros_like(z[0]))
        return jax.lax.scan(step, start, (z, mask), reverse=reverse)[1]

    return read(params["forward"], reverse=False) + read(params["backward"], reverse=True) + z


def embed_queries_in_context(
    params: PyTree, z: jax.Array, support: jax.Array, mask: jax.Array, *, steps: int
) -> jax.Array:
    """f(x, S) = h_K, an LSTM that reads the support by attention for K steps (appendix A.1).

    h^_k, c_k = LSTM(f'(x), [h_{k-1}, r_{k-1}], c_{k-1}); h_k = h^_k + f'(x);
    r_{k-1} = sum_i softmax_i(h_{k-1} . g(x_i)) g(x_i). The loop begins with h_0 = c_0 = 0.

    Args:
      params: from `init_full_context`.
      z: query embeddings f'(x), [m, D].
      support: g(x_i, S), [n, D].
      mask: [n], False for support rows that are padding.
      steps: K.

    Returns:
      [m, D]; each query's is its own, whatever the other queries are.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = init_full_context(jax.random.key(0), 3)
      >>> support, mask = jnp.eye(3)[:2], jnp.ones(2, bool)
      >>> embed_queries_in_context(params, jnp.ones((4, 3)), support, mask, steps=5).shape
      (4, 3)
    """

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        h, c = carry
        r = attention(h, support, support, mask=mask)
        h, c = lstm(params["attention"], z, jnp.concatenate([h, r], axis=1), c)
        return (h + z, c), None

    (h, _), _ = jax.lax.scan(step, (jnp.zeros_like(z), jnp.zeros_like(z)), length=steps)
    return h


def full_context_head(head: Head, *, steps: int, regression: bool = False) -> Head:
    """A stateless head on full-context embeddings instead of plain ones.

    Args:
      head: what comes behind; its parameters are under 'head', the LSTMs' under 'context'.
      steps: K, of the queries' LSTM.
      regression: whether y are real targets; then no row is padding.
    """

    def init(key: jax.Array, z: jax.Array, y: jax.Array) -> PyTree:
        context_key, head_key = jax.random.split(key)
        params, _ = head.init(head_key, z, y)
        return {"context": init_full_context(context_key, z.shape[1]), "head": params}

    def fit(params: PyTree, z: jax.Array, y: jax.Array) -> tuple[PyTree, jax.Array, jax.Array]:
        mask = jnp.ones(y.shape[0], bool) if regression else (y != 0).any(1)
        support = embed_support_in_context(params["context"], z, mask)
        fitted, _ = head.fit(params["head"], {}, support, y, train=False)
        return fitted, support, mask

    def predict(
        params: PyTree, fitted: tuple[PyTree, jax.Array, jax.Array], z: jax.Array
    ) -> jax.Array:
        fitted, support, mask = fitted
        z = embed_queries_in_context(params["context"], z, support, mask, steps=steps)
        return head.predict(params["head"], {}, fitted, z, train=False)[0]

    return stateless_head(fit, predict, init=init)


def matching(
    network: Network,
    *,
    similarity: str = "cosine",
    temperature: float = 0.1,
    full_context_steps: int = 0,
    regression: bool = False,
    joint_encoding: bool = True,
) -> MetaLearner:
    """P(y | x, S) = sum_i a(x, x_i) y_i, a = softmax_i(cos(f(x), g(x_i)) / temperature) (eq. 1).

    The paper has no temperature, which is a temperature of 1. But cosines lie between -1 and 1: at
    temperature 1 the loss of 5 ways cannot fall below 0.43, and not below 0.76 where all classes
    are equally far apart (20 ways: 2.03), so that the gradient never fades for what is long
    solved. At 0.1, the default, the bounds are below 0.001.

    Args:
      network: the embedding network, f' = g'.
      similarity: 'cosine', or 'squared_euclidean' for -||f(x) - g(x_i)||^2, with which one shot
        and temperature 1 give a Prototypical Network.
      temperature: what the similarity is divided by.
      full_context_steps: K, the steps of the attention LSTM of the full-context embeddings; 0 for
        embeddings that do not see the support set. The LSTMs read it in the order given: shuffle
        it, as `sample_episode` does.
      regression: whether y are real targets, trained by their squared error.
      joint_encoding: embed support and queries as one batch in training.

    Returns:
      The learner. Ways, shots and queries may differ between training and tests.

    Raises:
      ValueError: for an unknown similarity, a temperature that is not positive or a number of
        steps below zero.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from meta_jax.core import Batch, Episode
      >>> from meta_jax.networks.mlp import mlp
      >>> learner = matching(mlp((8,)), full_context_steps=2)
      >>> support = Batch(jnp.array([[0., 1.], [1., 0.]]), jnp.eye(2))
      >>> params, state = learner.init(jax.random.key(0), Episode(support, support))
      >>> adapted = learner.adapt(params, state, support, jax.random.key(1), train=False)
      >>> logits, _ = learner.predict(params, adapted, support.x, jax.random.key(2), train=False)
      >>> logits.shape
      (2, 2)
    """
    if similarity not in _SIMILARITIES:
        raise ValueError(
            f"unknown similarity '{similarity}': choose one of {', '.join(_SIMILARITIES)}"
        )
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} is impossible: use a positive one")
    if full_context_steps < 0:
        raise ValueError(f"{full_context_steps} full-context steps are impossible: use at least 0")
    head = kernel_head(
        _SIMILARITIES[similarity],
        bandwidth=temperature,
        learn_bandwidth=False,
        regression=regression,
    )
    if full_context_steps:
        head = full_context_head(head, steps=full_context_steps, regression=regression)
    criterion = squared_error if regression else cross_entropy
    return metric_learner(network, head, criterion, joint_encoding=joint_encoding)
