"""Heads: what a metric-based method does with embeddings of the support set and the queries.

The primitives work on anybody's embeddings: they know one task, no batch of tasks, and `jax.vmap`
maps them over many. A `Head` composes them into what `metric_learner` asks for.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from meta_jax.core import PyTree

Similarity = Callable[[jax.Array, jax.Array], jax.Array]  # ([m, D], [n, D]) -> [m, n]
# The logit of a class without examples: its softmax is 0, its gradient finite.
_NEVER = -1e30


class Head(NamedTuple):
    """A head on embeddings, as pure functions of one task.

    `state` is `{}` but where the head has batch norm of its own. `stateless_head` makes a head
    from functions that know nothing of states.
    """

    init: Callable[..., tuple[PyTree, PyTree]]  # (key, z [n, ...], y [n, ways]) -> (params, state)
    fit: Callable[..., tuple[PyTree, PyTree]]  # (params, state, z, y, *, train) -> (fitted, state)
    # (params, state, fitted, z [m, ...], *, train) -> (outputs [m, ways], state)
    predict: Callable[..., tuple[jax.Array, PyTree]]
    # (params, fitted, z [m, ...], y [m, ways]) -> (scalar, metrics); by default the learner's
    # criterion of the outputs
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]] | None = None


def stateless_head(
    fit: Callable[[PyTree, jax.Array, jax.Array], PyTree],
    predict: Callable[[PyTree, PyTree, jax.Array], jax.Array],
    *,
    init: Callable[[jax.Array, jax.Array, jax.Array], PyTree] | None = None,
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]] | None = None,
) -> Head:
    """A head without state.

    Args:
      fit: (params, z [n, ...], y [n, ways]) -> fitted.
      predict: (params, fitted, z [m, ...]) -> outputs [m, ways].
      init: (key, z, y) -> params; no parameters if None.
      loss: see `Head`.
    """

    def init_with_state(key: jax.Array, z: jax.Array, y: jax.Array) -> tuple[PyTree, PyTree]:
        return ({} if init is None else init(key, z, y)), {}

    def fit_with_state(
        params: PyTree, state: PyTree, z: jax.Array, y: jax.Array, *, train: bool
    ) -> tuple[PyTree, PyTree]:
        del train
        return fit(params, z, y), state

    def predict_with_state(
        params: PyTree, state: PyTree, fitted: PyTree, z: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        del train
        return predict(params, fitted, z), state

    return Head(init_with_state, fit_with_state, predict_with_state, loss)


# ---- Primitives.


def prototypes(z: jax.Array, y: jax.Array) -> jax.Array:
    """Class means c_k = sum_i y_ik z_i / sum_i y_ik (Snell et al. 2017, eq. 1).

    Args:
      z: embeddings [n, D].
      y: one-hot labels [n, ways]; all-zero rows are padding.

    Returns:
      Prototypes [ways, D]; zero for a class without examples.

    Examples:
      >>> import jax.numpy as jnp
      >>> z = jnp.array([[0., 0.], [2., 2.], [1., -1.]])
      >>> y = jnp.array([[1., 0.], [1., 0.], [0., 1.]])
      >>> prototypes(z, y).tolist()
      [[1.0, 1.0], [1.0, -1.0]]
    """
    return y.T @ z / jnp.maximum(y.sum(0), 1)[:, None]


def squared_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Squared Euclidean distances [n, m] between the rows of a [n, D] and b [m, D].

    Examples:
      >>> import jax.numpy as jnp
      >>> centres = jnp.array([[0., 0.], [2., 2.], [1., -1.]])
      >>> squared_distance(jnp.array([[1., 2.]]), centres).tolist()
      [[5.0, 1.0, 9.0]]
    """
    # Differences, not the expanded square, whose cancellation costs half the digits.
    return ((a[:, None] - b) ** 2).sum(-1)


def manhattan_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sums of absolute differences [n, m] between the rows of a [n, D] and b [m, D].

    Examples:
      >>> import jax.numpy as jnp
      >>> manhattan_distance(jnp.array([[1., 2.]]), jnp.array([[0., 0.], [1., -1.]])).tolist()
      [[3.0, 3.0]]
    """
    return abs(a[:, None] - b).sum(-1)


def cosine_similarity(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosines [n, m] between the rows of a [n, D] and b [m, D]; zero for a zero row.

    Examples:
      >>> import jax.numpy as jnp
      >>> cosine_similarity(jnp.array([[3., 0.]]), jnp.array([[1., 0.], [0., 2.]])).tolist()
      [[1.0, 0.0]]
    """

    def normalised(x: jax.Array) -> jax.Array:
        # The square root's gradient is infinite at zero, so the bound lies inside it.
        return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24))

    return normalised(a) @ normalised(b).T


_DISTANCES = {
    "squared_euclidean": squared_distance,
    "manhattan": manhattan_distance,
    "cosine": lambda a, b: 1 - cosine_similarity(a, b),
}


def pairwise_distance(
    a: jax.Array, b: jax.Array, *, metric: str = "squared_euclidean"
) -> jax.Array:
    """Distances [n, m] between the rows of a [n, D] and b [m, D], by the name of a metric.

    Args:
      a, b: the rows.
      metric: 'squared_euclidean', 'manhattan', or 'cosine' for 1 - cos(a, b).

    Raises:
      ValueError: for an unknown metric.

    Examples:
      >>> import jax.numpy as jnp
      >>> a, b = jnp.array([[3., 0.]]), jnp.array([[1., 0.], [0., 2.]])
      >>> pairwise_distance(a, b, metric="cosine").tolist()
      [[0.0, 1.0]]
      >>> pairwise_distance(a, b, metric="manhattan").tolist()
      [[2.0, 5.0]]
    """
    return _by_name(_DISTANCES, "metric", metric)(a, b)


def kernel_regression(
    log_kernel: jax.Array, y: jax.Array, *, mask: jax.Array | None = None
) -> jax.Array:
    """Nadaraya-Watson regression sum_i k(x, x_i) y_i / sum_i k(x, x_i).

    With one-hot `y` these are class probabilities, the attention of Vinyals et al. (2016, eq. 1).

    Args:
      log_kernel: log k(x_j, x_i), up to a constant for each query j, [m, n].
      y: targets [n, D].
      mask: [n], False for rows that are padding; all are real if None.

    Returns:
      Means of the targets [m, D], weighted by the kernel.

    Examples:
      >>> import jax.numpy as jnp
      >>> y = jnp.array([[0.], [1.], [5.]])
      >>> mean = kernel_regression(jnp.log(jnp.array([[1., 3., 4.]])), y)
      >>> round(float(mean[0, 0]), 3)
      2.875
    """
    if mask is not None:
        log_kernel = jnp.where(mask, log_kernel, _NEVER)
    return jax.nn.softmax(log_kernel) @ y


def kernel_logits(log_kernel: jax.Array, y: jax.Array) -> jax.Array:
    """log sum_{i in class k} k(x, x_i): their softmax is `kernel_regression` on one-hot labels.

    In logarithms, so that queries far from all support examples keep finite losses.

    Args:
      log_kernel: log k(x_j, x_i), [m, n].
      y: one-hot labels [n, ways]; all-zero rows are padding.

    Returns:
      Logits [m, ways]; about -1e30 for a class without examples.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> y = jnp.array([[1., 0.], [0., 1.], [0., 1.]])
      >>> logits = kernel_logits(jnp.log(jnp.array([[1., 1., 2.]])), y)
      >>> [round(p, 3) for p in jax.nn.softmax(logits)[0].tolist()]
      [0.25, 0.75]
    """
    empty = (y <= 0).all(0)
    logits = jax.nn.logsumexp(log_kernel[:, :, None], axis=1, b=jnp.where(empty, 1, y))
    return jnp.where(empty, jnp.asarray(_NEVER, logits.dtype), logits)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    temperature: float = 1.0,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Dot-product attention: means of the values with weights softmax_i(q . k_i / temperature).

    Args:
      query: [m, D].
      key: [n, D].
      value: [n, E].
      temperature: low ones attend to the best key alone, high ones to all keys alike.
      mask: [n], False for keys that are padding.

    Returns:
      [m, E].

    Examples:
      >>> import jax.numpy as jnp
      >>> key, value = jnp.array([[1., 0.], [0., 1.]]), jnp.array([[1.], [3.]])
      >>> attention(jnp.array([[2., 2.]]), key, value).tolist()
      [[2.0]]
      >>> attention(jnp.array([[9., 0.]]), key, value, temperature=0.1).tolist()
      [[1.0]]
    """
    return kernel_regression(query @ key.T / temperature, value, mask=mask)


def ridge_solve(
    x: jax.Array, y: jax.Array, penalty: jax.typing.ArrayLike, *, form: str = "auto"
) -> jax.Array:
    """W = argmin ||x W - y||^2 + penalty ||W||^2, in closed form (Bertinetto et al. 2019, eq. 3).

    The primal form (x'x + penalty I)^-1 x'y solves a [D, D] system, the dual (Woodbury) form
    x'(xx' + penalty I)^-1 y one of [n, n]: the support set of few shots.

    Args:
      x: inputs [n, D]; zero rows change nothing.
      y: targets [n, E].
      penalty: positive scalar.
      form: 'primal', 'dual', or 'auto' for the smaller system.

    Returns:
      W [D, E].

    Raises:
      ValueError: for an unknown form.

    Examples:
      >>> import jax.numpy as jnp
      >>> weights = ridge_solve(jnp.eye(2), jnp.array([[2.], [4.]]), 1.0)
      >>> [round(w, 3) for w in weights[:, 0].tolist()]
      [1.0, 2.0]
    """
    n, inputs = x.shape
    if form not in ("auto", "primal", "dual"):
        raise ValueError(f"unknown form '{form}': choose one of auto, primal, dual")
    if form == "auto":
        form = "dual" if n < inputs else "primal"
    if form == "dual":
        return x.T @ _solve(x @ x.T + penalty * jnp.eye(n, dtype=x.dtype), y)
    return _solve(x.T @ x + penalty * jnp.eye(inputs, dtype=x.dtype), x.T @ y)


def _solve(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.scipy.linalg.solve(a, b, assume_a="pos")


# ---- Heads.


def prototype_head(similarity: Similarity) -> Head:
    """Logits are similarities to the class prototypes; nothing is learned.

    Args:
      similarity: from queries [m, D] and prototypes [ways, D] to logits [m, ways].
    """

    def fit(params: PyTree, z: jax.Array, y: jax.Array) -> jax.Array:
        del params
        return prototypes(z, y)

    def predict(params: PyTree, fitted: jax.Array, z: jax.Array) -> jax.Array:
        del params
        return similarity(z, fitted)

    return stateless_head(fit, predict)


def linear_head() -> Head:
    """Regression by prototypes, one for each output: f(x) . c_d with c_d = sum_i y_id f(x_i) / n.

    It is attention without a softmax; nothing is learned.
    """

    def fit(params: PyTree, z: jax.Array, y: jax.Array) -> jax.Array:
        del params
        return y.T @ z / y.shape[0]

    def predict(params: PyTree, fitted: jax.Array, z: jax.Array) -> jax.Array:
        del params
        return z @ fitted.T

    return stateless_head(fit, predict)


def kernel_head(
    similarity: Similarity,
    *,
    bandwidth: float = 1.0,
    learn_bandwidth: bool = True,
    regression: bool = False,
) -> Head:
    """P(y | x, S) = sum_i k(x, x_i) y_i / sum_i k(x, x_i), with k = exp(similarity / bandwidth).

    A narrow bandwidth is the nearest neighbour, a wide one gives the class frequencies.

    Args:
      similarity: from queries [m, D] and support [n, D] to [m, n].
      bandwidth: the kernel's, or the first one where it is learned.
      learn_bandwidth: whether its logarithm is a parameter.
      regression: whether y are real targets; then the outputs are their weighted means, and no
        row is padding.
    """

    def init(key: jax.Array, z: jax.Array, y: jax.Array) -> PyTree:
        del key, y
        return (
            {"log_bandwidth": jnp.log(jnp.asarray(bandwidth, z.dtype))} if learn_bandwidth else {}
        )

    def fit(params: PyTree, z: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        del params
        return z, y

    def predict(params: PyTree, fitted: tuple[jax.Array, jax.Array], z: jax.Array) -> jax.Array:
        support, y = fitted
        width = jnp.exp(params["log_bandwidth"]) if learn_bandwidth else bandwidth
        log_kernel = similarity(z, support) / width
        return kernel_regression(log_kernel, y) if regression else kernel_logits(log_kernel, y)

    return stateless_head(fit, predict, init=init)


def ridge_head(
    *,
    penalty: float = 1.0,
    scale: float = 10.0,
    learned: bool = True,
    form: str = "auto",
    regression: bool = False,
) -> Head:
    """Outputs are scale * [f(x), 1] W, W the ridge regression on the support (R2-D2).

    As in Bertinetto et al. (2019), a column of ones is appended and inputs and targets are divided
    by sqrt(n), so that the penalty stands beside a mean over the n support examples. Their bias
    of the logits, one number for all classes, is left out: a softmax cancels it.

    Args:
      penalty: lambda, or the first one where it is learned.
      scale: of the outputs, or the first one where it is learned.
      learned: whether the logarithms of penalty and scale are parameters.
      form: see `ridge_solve`.
      regression: whether y are real targets; then no row is padding.
    """

    def init(key: jax.Array, z: jax.Array, y: jax.Array) -> PyTree:
        del key, y
        if not learned:
            return {}
        return {
            "log_penalty": jnp.log(jnp.asarray(penalty, z.dtype)),
            "log_scale": jnp.log(jnp.asarray(scale, z.dtype)),
        }

    def with_ones(z: jax.Array) -> jax.Array:
        return jnp.concatenate([z, jnp.ones((z.shape[0], 1), z.dtype)], axis=1)

    def fit(params: PyTree, z: jax.Array, y: jax.Array) -> jax.Array:
        real = jnp.ones(y.shape[0], bool) if regression else (y != 0).any(1)
        root = jnp.sqrt(jnp.maximum(real.sum(), 1).astype(z.dtype))
        x = jnp.where(real[:, None], with_ones(z), 0)
        weight = jnp.exp(params["log_penalty"]) if learned else penalty
        return ridge_solve(x / root, y / root, weight, form=form)

    def predict(params: PyTree, fitted: jax.Array, z: jax.Array) -> jax.Array:
        return (jnp.exp(params["log_scale"]) if learned else scale) * with_ones(z) @ fitted

    return stateless_head(fit, predict, init=init)


def _by_name(table: dict[str, Similarity], kind: str, name: str) -> Similarity:
    if name not in table:
        raise ValueError(f"unknown {kind} '{name}': choose one of {', '.join(table)}")
    return table[name]
