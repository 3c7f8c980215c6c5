"""Heads: what a metric-based method does with embeddings of the support set and the queries.

A `Head` composes the primitives of `meta_jax.metric_based.primitives` into what `metric_learner`
asks for. `stateless_head` makes one of two or three functions.
"""

from typing import Any, Literal, NamedTuple, Protocol

import jax.numpy as jnp

from meta_jax.core import Array, Metrics, PyTree
from meta_jax.metric_based.primitives import (
    RidgeForm,
    Similarity,
    check_examples,
    check_vectors,
    kernel_logits,
    kernel_regression,
    prototypes,
    ridge_solve,
)
from meta_jax.objectives import without_padding

Kind = Literal["classification", "regression"]


class HeadInit(Protocol):
    """(key, z, y, mask) -> (params, state)."""

    def __call__(
        self, key: Array, z: Array, y: Array, mask: Array | None, /
    ) -> tuple[PyTree, PyTree]:
        """Initial parameters and state for embeddings z [n, ...] and targets y [n, D]."""
        ...


class HeadFit(Protocol):
    """(params, state, z, y, mask, *, train) -> (fitted, state)."""

    def __call__(
        self,
        params: PyTree,
        state: PyTree,
        z: Array,
        y: Array,
        mask: Array | None,
        /,
        *,
        train: bool,
    ) -> tuple[Any, PyTree]:
        """Absorbs the embeddings z [n, ...] of a support set with targets y [n, D]."""
        ...


class HeadPredict(Protocol):
    """(params, state, fitted, z, *, train, mask) -> (outputs, state)."""

    def __call__(
        self,
        params: PyTree,
        state: PyTree,
        fitted: Any,
        z: Array,
        /,
        *,
        train: bool,
        mask: Array | None = None,
    ) -> tuple[PyTree, PyTree]:
        """Answers the embeddings z [m, ...] of queries; mask [m] is False for padding."""
        ...


class HeadLoss(Protocol):
    """(params, fitted, z, y, mask) -> (scalar, metrics)."""

    def __call__(
        self, params: PyTree, fitted: Any, z: Array, y: Array, mask: Array | None, /
    ) -> tuple[Array, Metrics]:
        """What training minimises, of query embeddings z [m, ...] and targets y [m, D]."""
        ...


class Head(NamedTuple):
    """A head on embeddings, as pure functions of one task.

    Attributes:
      init: Function (key, z, y, mask) -> (params, state).
      fit: Function (params, state, z, y, mask, *, train) -> (fitted, state).
      predict: Function (params, state, fitted, z, *, train, mask) -> (outputs, state).
      loss: Loss of its own; by default the learner's objective of the outputs.
    """

    init: HeadInit
    fit: HeadFit
    predict: HeadPredict
    loss: HeadLoss | None = None


class StatelessInit(Protocol):
    """(key, z, y, mask) -> params."""

    def __call__(self, key: Array, z: Array, y: Array, mask: Array | None, /) -> PyTree:
        """Initial parameters for embeddings z [n, ...] and targets y [n, D]."""
        ...


class StatelessFit(Protocol):
    """(params, z, y, mask) -> fitted."""

    def __call__(self, params: PyTree, z: Array, y: Array, mask: Array | None, /) -> Any:
        """Absorbs the embeddings z [n, ...] of a support set with targets y [n, D]."""
        ...


class StatelessPredict(Protocol):
    """(params, fitted, z) -> outputs."""

    def __call__(self, params: PyTree, fitted: Any, z: Array, /) -> PyTree:
        """Answers the embeddings z [m, ...] of queries, each on its own."""
        ...


def stateless_head(
    fit: StatelessFit,
    predict: StatelessPredict,
    *,
    init: StatelessInit | None = None,
    loss: HeadLoss | None = None,
) -> Head:
    """Builds a head without state.

    Args:
      fit: (params, z [n, ...], y [n, D], mask) -> fitted.
      predict: (params, fitted, z [m, ...]) -> outputs [m, D].
      init: (key, z, y, mask) -> params; no parameters if None.
      loss: Loss of the head: see `Head`.
    """

    def init_with_state(
        key: Array, z: Array, y: Array, mask: Array | None
    ) -> tuple[PyTree, PyTree]:
        return ({} if init is None else init(key, z, y, mask)), {}

    def fit_with_state(
        params: PyTree, state: PyTree, z: Array, y: Array, mask: Array | None, *, train: bool
    ) -> tuple[Any, PyTree]:
        del train
        return fit(params, z, y, mask), state

    def predict_with_state(
        params: PyTree,
        state: PyTree,
        fitted: Any,
        z: Array,
        *,
        train: bool,
        mask: Array | None = None,
    ) -> tuple[PyTree, PyTree]:
        del train, mask
        return predict(params, fitted, z), state

    return Head(init_with_state, fit_with_state, predict_with_state, loss)


class Examples(NamedTuple):
    """A support set as a head keeps it."""

    z: Array  # embeddings [n, ...]
    y: Array  # targets [n, D]
    mask: Array | None  # bool [n], False for padding


def keep_examples(params: PyTree, z: Array, y: Array, mask: Array | None) -> Examples:
    """The `fit` of heads that look at every support example again for each query."""
    del params
    check_vectors("z", z)
    check_examples(z, y, mask)
    return Examples(z, y, mask)


def prototype_head(similarity: Similarity) -> Head:
    """Builds a head whose logits are similarities to the class prototypes; nothing is learned.

    Args:
      similarity: Function from queries [m, D] and prototypes [ways, D] to logits [m, ways].
    """

    def fit(params: PyTree, z: Array, y: Array, mask: Array | None) -> Array:
        del params
        return prototypes(z, y, mask)

    def predict(params: PyTree, fitted: Array, z: Array) -> Array:
        del params
        return similarity(z, fitted)

    return stateless_head(fit, predict)


def prototype_regression_head() -> Head:
    """Builds a head that regresses by prototypes, one for each output.

    Output d is f(x) . c_d with c_d = sum_i y_id f(x_i) / n: attention without a softmax. Nothing
    is learned.
    """

    def fit(params: PyTree, z: Array, y: Array, mask: Array | None) -> Array:
        del params
        check_vectors("z", z)
        check_examples(z, y, mask)
        count = z.shape[0] if mask is None else jnp.maximum(mask.sum(), 1).astype(z.dtype)
        return without_padding(y, mask).T @ without_padding(z, mask) / count

    def predict(params: PyTree, fitted: Array, z: Array) -> Array:
        del params
        return z @ fitted.T

    return stateless_head(fit, predict)


def kernel_head(
    similarity: Similarity,
    *,
    bandwidth: float = 1.0,
    learn_bandwidth: bool = True,
    kind: Kind = "classification",
) -> Head:
    """Builds the head P(y | x, S) = sum_i k(x, x_i) y_i / sum_i k(x, x_i).

    The kernel is k = exp(similarity / bandwidth). A narrow bandwidth is the nearest neighbour, a
    wide one gives the class frequencies.

    Args:
      similarity: Function from queries [m, D] and support [n, D] to similarities [m, n].
      bandwidth: The kernel's, or the first one where it is learned.
      learn_bandwidth: Whether its logarithm is a parameter.
      kind: 'classification' for logits, 'regression' for weighted means of real targets.
    """

    def init(key: Array, z: Array, y: Array, mask: Array | None) -> PyTree:
        del key, y, mask
        if not learn_bandwidth:
            return {}
        return {"log_bandwidth": jnp.log(jnp.asarray(bandwidth, z.dtype))}

    def predict(params: PyTree, fitted: Examples, z: Array) -> Array:
        width = jnp.exp(params["log_bandwidth"]) if learn_bandwidth else bandwidth
        log_kernel = similarity(z, fitted.z) / width
        answer = kernel_regression if kind == "regression" else kernel_logits
        return answer(log_kernel, fitted.y, fitted.mask)

    return stateless_head(keep_examples, predict, init=init)


def ridge_head(
    *, penalty: float = 1.0, scale: float = 10.0, learned: bool = True, form: RidgeForm = "auto"
) -> Head:
    """Builds a head whose outputs are scale * [f(x), 1] W, W the ridge regression on the support.

    As in Bertinetto et al. (2019), a column of ones is appended and inputs and targets are divided
    by sqrt(n), so that the penalty stands beside a mean over the n support examples. Their bias
    of the logits, one number for all classes, is left out: a softmax cancels it.

    Args:
      penalty: Lambda, or the first one where it is learned.
      scale: Factor of the outputs, or the first one where it is learned.
      learned: Whether the logarithms of penalty and scale are parameters.
      form: Form of the solution: see `ridge_solve`.
    """

    def init(key: Array, z: Array, y: Array, mask: Array | None) -> PyTree:
        del key, y, mask
        if not learned:
            return {}
        return {
            "log_penalty": jnp.log(jnp.asarray(penalty, z.dtype)),
            "log_scale": jnp.log(jnp.asarray(scale, z.dtype)),
        }

    def fit(params: PyTree, z: Array, y: Array, mask: Array | None) -> Array:
        check_vectors("z", z)
        check_examples(z, y, mask)
        count = z.shape[0] if mask is None else jnp.maximum(mask.sum(), 1)
        root = jnp.sqrt(jnp.asarray(count, z.dtype))
        weight = jnp.exp(params["log_penalty"]) if learned else penalty
        return ridge_solve(_with_ones(z) / root, y / root, weight, form=form, mask=mask)

    def predict(params: PyTree, fitted: Array, z: Array) -> Array:
        return (jnp.exp(params["log_scale"]) if learned else scale) * _with_ones(z) @ fitted

    return stateless_head(fit, predict, init=init)


def _with_ones(z: Array) -> Array:
    return jnp.concatenate([z, jnp.ones((z.shape[0], 1), z.dtype)], axis=1)
