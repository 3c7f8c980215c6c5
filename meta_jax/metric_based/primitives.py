"""Primitives of metric-based methods: distances, kernels, attention, ridge regression.

They work on anybody's embeddings and know one task, no batch of tasks: `jax.vmap` maps them over
many. Rows of padding, which a mask names, may hold any finite values.
"""

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp

from meta_jax.core import Array
from meta_jax.linear_systems import solve_positive_definite
from meta_jax.lookup import UsageError
from meta_jax.objectives import as_real, check_targets, impossible_logit, without_padding

Similarity = Callable[[Array, Array], Array]  # ([m, D], [n, D]) -> [m, n]
Metric = Literal["squared_euclidean", "manhattan", "cosine"]
RidgeForm = Literal["auto", "primal", "dual"]
T = TypeVar("T")


def choose(table: Mapping[str, T], setting: str, name: str) -> T:
    """What a table has under a name.

    Raises:
      UsageError: it has nothing there; the message lists what it has.
    """
    if name not in table:
        raise UsageError(f"unknown {setting} '{name}': choose one of {', '.join(table)}")
    return table[name]


def _check_positive_scalar(setting: str, value: jax.typing.ArrayLike) -> None:
    """Refuses arrays, and numbers that are not above zero; a traced value is not known yet.

    Raises:
      UsageError: the value is a number of zero or below.
      ValueError: the value is not a scalar.
    """
    if jnp.ndim(value):
        raise ValueError(f"{setting} must be a scalar, not {list(jnp.shape(value))}")
    if isinstance(value, Real) and not value > 0:
        raise UsageError(f"{setting} {value} is impossible: use a positive one")


def check_vectors(name: str, array: Array) -> None:
    """Refuses what is not an array of vectors [n, D].

    Raises:
      ValueError: an array of another rank.
    """
    if jnp.ndim(array) != 2:
        raise ValueError(
            f"{name} must be vectors [n, D], not {list(jnp.shape(array))}: flatten what each "
            "example has, or use a network that gives vectors"
        )


def check_examples(z: Array, y: Array, mask: Array | None = None) -> None:
    """Refuses embeddings, targets and a mask that do not belong to the same examples.

    Args:
      z: Embeddings [n, ...].
      y: One-hot labels [n, ways] or real targets [n, D].
      mask: bool [n].

    Raises:
      ValueError: y is of another rank or type, or the numbers of rows differ.
    """
    check_targets(y)
    n = jnp.shape(z)[0] if jnp.ndim(z) else 0
    if y.shape[0] != n:
        raise ValueError(f"y has {y.shape[0]} rows and z {n}: give one row for each example")
    if mask is not None and jnp.shape(mask) != (n,):
        raise ValueError(f"mask must be [{n}], one for each row of z, not {list(jnp.shape(mask))}")


def prototypes(z: Array, y: Array, mask: Array | None = None) -> Array:
    """Class means c_k = sum_i y_ik z_i / sum_i y_ik (Snell et al. 2017, eq. 1).

    Args:
      z: Embeddings [n, D].
      y: One-hot labels [n, ways].
      mask: bool [n], False for padding.

    Returns:
      Prototypes [ways, D]; zero for a class without examples.

    Raises:
      ValueError: z is not of rank 2, or y or mask do not fit it.

    Examples:
      >>> import jax.numpy as jnp
      >>> z = jnp.array([[0., 0.], [2., 2.], [1., -1.]])
      >>> y = jnp.array([[1., 0.], [1., 0.], [0., 1.]])
      >>> prototypes(z, y).tolist()
      [[1.0, 1.0], [1.0, -1.0]]
    """
    check_vectors("z", z)
    check_examples(z, y, mask)
    z, y = without_padding(z, mask), without_padding(y, mask)
    return y.T @ z / jnp.maximum(y.sum(0), 1)[:, None]


def _real_pair(a: Array, b: Array) -> tuple[Array, Array]:
    """Two sets of vectors, as real numbers."""
    check_vectors("a", a)
    check_vectors("b", b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"rows of a have {a.shape[1]} entries and those of b {b.shape[1]}")
    return as_real(a), as_real(b)


def squared_distance(a: Array, b: Array) -> Array:
    """Squared Euclidean distances [n, m] between the rows of a [n, D] and b [m, D].

    Examples:
      >>> import jax.numpy as jnp
      >>> centres = jnp.array([[0., 0.], [2., 2.], [1., -1.]])
      >>> squared_distance(jnp.array([[1., 2.]]), centres).tolist()
      [[5.0, 1.0, 9.0]]
    """
    a, b = _real_pair(a, b)
    # Differences, not the expanded square, whose cancellation costs half the digits.
    return ((a[:, None] - b[None]) ** 2).sum(-1)


def manhattan_distance(a: Array, b: Array) -> Array:
    """Sums of absolute differences [n, m] between the rows of a [n, D] and b [m, D].

    Examples:
      >>> import jax.numpy as jnp
      >>> manhattan_distance(jnp.array([[1., 2.]]), jnp.array([[0., 0.], [1., -1.]])).tolist()
      [[3.0, 3.0]]
    """
    a, b = _real_pair(a, b)
    return abs(a[:, None] - b).sum(-1)


def cosine_similarity(a: Array, b: Array) -> Array:
    """Cosines [n, m] between the rows of a [n, D] and b [m, D]; zero for a zero row.

    Examples:
      >>> import jax.numpy as jnp
      >>> cosine_similarity(jnp.array([[3., 0.]]), jnp.array([[1., 0.], [0., 2.]])).tolist()
      [[1.0, 0.0]]
    """
    a, b = _real_pair(a, b)
    return unit_rows(a) @ unit_rows(b).T


def unit_rows(x: Array) -> Array:
    """The rows of x [n, D] at length 1; zero for a zero row."""
    # The square root's gradient is infinite at zero, so the bound lies inside it.
    least = max(1e-24, float(jnp.finfo(x.dtype).tiny))
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), least))


def _cosine_distance(a: Array, b: Array) -> Array:
    return 1 - cosine_similarity(a, b)


_DISTANCES: dict[str, Similarity] = {
    "squared_euclidean": squared_distance,
    "manhattan": manhattan_distance,
    "cosine": _cosine_distance,
}


def pairwise_distance(a: Array, b: Array, *, metric: Metric = "squared_euclidean") -> Array:
    """Distances [n, m] between the rows of a [n, D] and b [m, D], by the name of a metric.

    Args:
      a, b: The rows.
      metric: 'squared_euclidean', 'manhattan', or 'cosine' for 1 - cos(a, b).

    Raises:
      UsageError: an unknown metric.

    Examples:
      >>> import jax.numpy as jnp
      >>> a, b = jnp.array([[3., 0.]]), jnp.array([[1., 0.], [0., 2.]])
      >>> pairwise_distance(a, b, metric="cosine").tolist()
      [[0.0, 1.0]]
      >>> pairwise_distance(a, b, metric="manhattan").tolist()
      [[2.0, 5.0]]
    """
    return choose(_DISTANCES, "metric", metric)(a, b)


def _check_kernel(log_kernel: Array, y: Array, mask: Array | None) -> None:
    check_vectors("log_kernel", log_kernel)
    check_targets(y)
    if log_kernel.shape[1] != y.shape[0]:
        raise ValueError(
            f"log_kernel has {log_kernel.shape[1]} columns and y {y.shape[0]} rows: give one of "
            "each for every example"
        )
    if mask is not None and jnp.shape(mask) != y.shape[:1]:
        raise ValueError(
            f"mask must be [{y.shape[0]}], one for each row of y, not {list(jnp.shape(mask))}"
        )


def kernel_regression(log_kernel: Array, y: Array, mask: Array | None = None) -> Array:
    """Means of targets weighted by a kernel: Nadaraya-Watson regression.

    sum_i k(x, x_i) y_i / sum_i k(x, x_i). With one-hot `y` these are class probabilities, the
    attention of Vinyals et al. (2016, eq. 1).

    Args:
      log_kernel: Log k(x_j, x_i), up to a constant for each query j, [m, n].
      y: Targets [n, D].
      mask: bool [n], False for padding.

    Returns:
      Means of the targets [m, D], weighted by the kernel.

    Raises:
      ValueError: the shapes do not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> y = jnp.array([[0.], [1.], [5.]])
      >>> mean = kernel_regression(jnp.log(jnp.array([[1., 3., 4.]])), y)
      >>> round(float(mean[0, 0]), 3)
      2.875
    """
    _check_kernel(log_kernel, y, mask)
    log_kernel = as_real(log_kernel)
    if mask is not None:
        log_kernel = jnp.where(mask, log_kernel, impossible_logit(log_kernel.dtype))
    return jax.nn.softmax(log_kernel) @ without_padding(y, mask)


def kernel_logits(log_kernel: Array, y: Array, mask: Array | None = None) -> Array:
    """Logits of classes, whose softmax is `kernel_regression` on one-hot labels.

    log sum_{i in class k} k(x, x_i), in logarithms throughout, so that queries far from all
    support examples keep finite losses.

    Args:
      log_kernel: Log k(x_j, x_i), [m, n].
      y: One-hot labels [n, ways].
      mask: bool [n], False for padding.

    Returns:
      Logits [m, ways]; about -1e30 for a class without examples.

    Raises:
      ValueError: the shapes do not fit.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> y = jnp.array([[1., 0.], [0., 1.], [0., 1.]])
      >>> logits = kernel_logits(jnp.log(jnp.array([[1., 1., 2.]])), y)
      >>> [round(p, 3) for p in jax.nn.softmax(logits)[0].tolist()]
      [0.25, 0.75]
    """
    _check_kernel(log_kernel, y, mask)
    log_kernel = as_real(log_kernel)
    y = without_padding(y, mask)
    empty = (y <= 0).all(0)
    logits = jax.nn.logsumexp(log_kernel[:, :, None], axis=1, b=jnp.where(empty[None], 1, y)[None])
    return jnp.where(empty[None], impossible_logit(logits.dtype), logits)


def attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    temperature: float = 1.0,
    mask: Array | None = None,
) -> Array:
    """Dot-product attention: means of the values with weights softmax_i(q . k_i / temperature).

    Args:
      query: [m, D].
      key: [n, D].
      value: [n, E].
      temperature: Positive scalar. Low ones attend to the best key alone, high ones to all keys
        alike.
      mask: bool [n], False for keys that are padding.

    Returns:
      [m, E].

    Raises:
      UsageError: a temperature of zero or below.
      ValueError: the shapes do not fit, or the temperature is not a scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> key, value = jnp.array([[1., 0.], [0., 1.]]), jnp.array([[1.], [3.]])
      >>> attention(jnp.array([[2., 2.]]), key, value).tolist()
      [[2.0]]
      >>> attention(jnp.array([[9., 0.]]), key, value, temperature=0.1).tolist()
      [[1.0]]
    """
    for name, array in (("query", query), ("key", key), ("value", value)):
        check_vectors(name, array)
    if query.shape[1] != key.shape[1] or key.shape[0] != value.shape[0]:
        raise ValueError(
            f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} must "
            "be [m, D], [n, D] and [n, E]"
        )
    _check_positive_scalar("temperature", temperature)
    log_kernel = as_real(query) @ as_real(key).T / temperature
    return kernel_regression(log_kernel, as_real(value), mask)


def ridge_solve(
    x: Array,
    y: Array,
    penalty: jax.typing.ArrayLike,
    *,
    form: RidgeForm = "auto",
    mask: Array | None = None,
) -> Array:
    """Solves ridge regression in closed form (Bertinetto et al. 2019, eq. 3).

    W = argmin ||x W - y||^2 + penalty ||W||^2. The primal form (x'x + penalty I)^-1 x'y solves a
    [D, D] system, the dual (Woodbury) form x'(xx' + penalty I)^-1 y one of [n, n]: the support set
    of few shots. Half precision is solved in float32.

    Args:
      x: Inputs [n, D].
      y: Targets [n, E].
      penalty: Positive scalar.
      form: 'primal', 'dual', or 'auto' for the smaller system.
      mask: bool [n], False for padding.

    Returns:
      W [D, E], of x's type; of JAX's default float where that is no real number.

    Raises:
      UsageError: an unknown form, or a penalty of zero or below.
      ValueError: the shapes do not fit, or the penalty is not a scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> weights = ridge_solve(jnp.eye(2), jnp.array([[2.], [4.]]), 1.0)
      >>> [round(w, 3) for w in weights[:, 0].tolist()]
      [1.0, 2.0]
    """
    check_ridge_form(form)
    _check_positive_scalar("penalty", penalty)
    check_vectors("x", x)
    check_examples(x, y, mask)
    x = as_real(x)
    dtype = x.dtype
    x, y = without_padding(x, mask), without_padding(y, mask)
    if jnp.finfo(dtype).bits < 32:
        x, y, penalty = (jnp.asarray(a, jnp.float32) for a in (x, y, penalty))
    n, inputs = x.shape
    if form == "dual" or (form == "auto" and n < inputs):
        gram = x @ x.T + penalty * jnp.eye(n, dtype=x.dtype)
        weights = x.T @ solve_positive_definite(gram, y)
    else:
        weights = solve_positive_definite(
            x.T @ x + penalty * jnp.eye(inputs, dtype=x.dtype), x.T @ y
        )
    return weights.astype(dtype)


def check_ridge_form(form: str) -> None:
    """Refuses an unknown form of `ridge_solve`.

    Raises:
      UsageError: it is not 'auto', 'primal' or 'dual'.
    """
    choose(dict.fromkeys(("auto", "primal", "dual")), "form", form)
