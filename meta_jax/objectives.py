"""Objectives: what is asked of a learner's outputs, and which metric says what is better."""

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from meta_jax.core import Array, Batch, Metrics, Objective, PyTree, check_mask
from meta_jax.core import check_batch as check_batch
from meta_jax.lookup import UsageError, load_attribute

__all__ = [
    "Gaussian",
    "as_objective",
    "as_real",
    "check_batch",
    "check_kind",
    "check_outputs",
    "check_several_ways",
    "check_targets",
    "cross_entropy",
    "cross_entropy_loss",
    "gaussian",
    "gaussian_likelihood",
    "gaussian_likelihood_loss",
    "masked_mean",
    "row_mask",
    "squared_error",
    "squared_error_loss",
    "target_kind",
    "tree_rows",
    "trial_return",
    "without_padding",
]

_WITHIN_95 = 1.959964  # of a standard normal, 95 % lie within plus and minus this


def row_mask(batch: Batch) -> Array:
    """The mask of a batch, bool [n]; all True where it has none."""
    if batch.mask is not None:
        return batch.mask
    return jnp.ones(jax.tree.leaves(batch.x)[0].shape[0], bool)


def without_padding(y: Array, mask: Array | None) -> Array:
    """Targets [n, D] whose rows of padding are zero; y itself without a mask.

    Raises:
      ValueError: the mask is not bool [n].
    """
    if mask is None:
        return y
    check_mask(mask, y.shape[0])
    return jnp.where(mask[:, None], y, jnp.zeros((), y.dtype))


def impossible_logit(dtype: jnp.dtype) -> Array:
    """The logit of a class without examples: its softmax is 0, its gradient finite."""
    return jnp.asarray(max(-1e30, float(jnp.finfo(dtype).min) / 2), dtype)


def masked_mean(values: Array, mask: Array | None) -> Array:
    """Mean of one value for each row, [n], over the rows that are not padding; 0 without any.

    Raises:
      ValueError: the values are not [n], or the mask is not bool [n].
    """
    if jnp.ndim(values) != 1:
        raise ValueError(f"values must be [n], one for each row, not {list(jnp.shape(values))}")
    if mask is None:
        return values.mean()
    check_mask(mask, values.shape[0])
    return jnp.where(mask, values, 0).sum() / jnp.maximum(mask.sum(), 1).astype(values.dtype)


def as_real(x: Array) -> Array:
    """Real numbers as they are, others as floats: differences and products of bytes wrap around.

    Examples:
      >>> as_real(jnp.uint8(1)) - as_real(jnp.uint8(2))
      Array(-1., dtype=float32)
    """
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(float)


def check_targets(y: Array, name: str = "y") -> None:
    """Refuses targets that are not a real array [n, D]: integer labels above all.

    Raises:
      ValueError: the targets are not of rank 2, or not real numbers.
    """
    if not hasattr(y, "ndim") or y.ndim != 2 or not jnp.issubdtype(y.dtype, jnp.floating):
        found = f"{y.dtype}{list(y.shape)}" if hasattr(y, "ndim") else type(y).__name__
        raise ValueError(
            f"{name} must be one-hot labels [n, ways] or real targets [n, D], not {found}: "
            "turn integer labels into one-hot ones with jax.nn.one_hot(labels, ways)"
        )


def check_outputs(outputs: Array, y: Array) -> None:
    """Refuses outputs and targets of different shapes, which would broadcast in silence.

    Raises:
      ValueError: the targets are no [n, D] of real numbers, or the outputs have another shape.
    """
    check_targets(y)
    if getattr(outputs, "shape", None) != y.shape:
        raise ValueError(
            f"outputs {list(jnp.shape(outputs))} and targets y {list(y.shape)} differ in shape: "
            "both must be [n, D]"
        )


def check_several_ways(y: Array) -> None:
    """Refuses one-hot labels [n, ways] of less than two ways: every answer would be right.

    Raises:
      UsageError: there is one way, or none.
    """
    if y.shape[1] < 2:
        raise UsageError(
            f"classification of {y.shape[1]} way is right whatever is answered: use at least 2 "
            "ways, or the objective squared_error for real targets"
        )


def cross_entropy_loss(logits: Array, y: Array, mask: Array | None = None) -> tuple[Array, Metrics]:
    """Mean softmax cross-entropy, in nats.

    Args:
      logits: [n, ways], of at least two ways.
      y: One-hot or smoothed labels [n, ways].
      mask: bool [n], False for rows of padding, which do not count.

    Returns:
      The loss and the metric `accuracy` in [0, 1]. The class of a row is that of its largest
      label; a row without a label, and a tie for the largest logit, count as wrong.

    Raises:
      ValueError: y has another shape than the logits, or the mask is not bool [n].
      UsageError: there are less than two ways.

    Examples:
      >>> loss, metrics = cross_entropy_loss(jnp.zeros((3, 5)), jnp.eye(5)[:3])
      >>> round(float(loss), 4), float(metrics["accuracy"])  # ln 5
      (1.6094, 0.0)
    """
    check_outputs(logits, y)
    check_several_ways(y)
    loss = -(y * jax.nn.log_softmax(logits)).sum(-1)
    best = (y == y.max(-1, keepdims=True)) & (y > 0)
    true = jnp.where(best, logits, -jnp.inf).max(-1)
    beaten = jnp.where(best, -jnp.inf, logits).max(-1) < true
    return masked_mean(loss, mask), {"accuracy": masked_mean(beaten.astype(loss.dtype), mask)}


def squared_error_loss(
    outputs: Array, y: Array, mask: Array | None = None
) -> tuple[Array, Metrics]:
    """Mean squared error over rows and dimensions.

    Args:
      outputs: [n, D].
      y: Real targets [n, D].
      mask: bool [n], False for rows of padding, which do not count.

    Returns:
      The loss and the metric `mse`, which is the loss.

    Raises:
      ValueError: outputs and targets differ in shape.

    Examples:
      >>> loss, _ = squared_error_loss(jnp.array([[1.0], [2.0]]), jnp.array([[0.0], [0.0]]))
      >>> float(loss)
      2.5
    """
    check_outputs(outputs, y)
    loss = masked_mean(((outputs - y) ** 2).mean(-1), mask)
    return loss, {"mse": loss}


class Gaussian(NamedTuple):
    """A prediction of real targets that says how sure it is.

    Attributes:
      mean: [n, D].
      scale: Standard deviation [n, D], positive.
    """

    mean: Array
    scale: Array


def gaussian(raw: Array, least_scale: float) -> Gaussian:
    """A Gaussian from outputs of a network: mean m and scale least + (1 - least) softplus(s).

    Args:
      raw: Means m and what becomes scales s, side by side, [n, 2 D].
      least_scale: Smallest scale.

    Examples:
      >>> mean, scale = gaussian(jnp.array([[3.0, -100.0]]), 0.01)
      >>> mean.tolist(), [[round(float(scale[0, 0]), 6)]]
      ([[3.0]], [[0.01]])
    """
    mean, scale = jnp.split(raw, 2, axis=-1)
    return Gaussian(mean, least_scale + (1 - least_scale) * jax.nn.softplus(scale))


def gaussian_likelihood_loss(
    outputs: Gaussian, y: Array, mask: Array | None = None
) -> tuple[Array, Metrics]:
    """Mean negative log-likelihood of a Gaussian over rows and dimensions, in nats.

    Args:
      outputs: Mean and scale, [n, D] each.
      y: Real targets [n, D].
      mask: bool [n], False for rows of padding, which do not count.

    Returns:
      The loss, and the metrics `log_likelihood`, which is minus the loss, `mse`, the squared error
      of the mean, and `coverage`, the share of targets within mean +- 1.96 scale, of which a
      calibrated prediction has 0.95.

    Raises:
      UsageError: the outputs have no mean and scale.
      ValueError: they and the targets differ in shape, or the mask is not bool [n].

    Examples:
      >>> loss, metrics = gaussian_likelihood_loss(
      ...     Gaussian(jnp.zeros((2, 1)), jnp.ones((2, 1))), jnp.array([[0.0], [3.0]])
      ... )
      >>> round(float(loss), 4), float(metrics["mse"]), float(metrics["coverage"])
      (3.1689, 4.5, 0.5)
    """
    if not (hasattr(outputs, "mean") and hasattr(outputs, "scale")):
        raise UsageError(
            "the likelihood needs outputs with a mean and a scale, and this learner gives "
            f"{type(outputs).__name__}: use the objective squared_error, or a learner that gives "
            "them, such as in_context"
        )
    check_outputs(outputs.mean, y)
    check_outputs(outputs.scale, y)
    away = (y - outputs.mean) / outputs.scale
    nats = (away**2 / 2 + jnp.log(outputs.scale)).mean(-1) + 0.5 * jnp.log(2 * jnp.pi)
    loss = masked_mean(nats.astype(y.dtype), mask)
    error = masked_mean(((outputs.mean - y) ** 2).mean(-1), mask)
    inside = (abs(away) <= _WITHIN_95).astype(loss.dtype).mean(-1)
    metrics = {"log_likelihood": -loss, "mse": error, "coverage": masked_mean(inside, mask)}
    return loss, metrics


def _no_loss(outputs: PyTree, y: PyTree, mask: Array | None, /) -> tuple[Array, Metrics]:
    """Rewards come from acting: there are no targets with which outputs could be compared."""
    raise UsageError(
        "tasks of reinforcement learning are for learners that act, such as rl2: choose one of "
        "them, or other tasks"
    )


#: The objective of classification: `cross_entropy_loss`; more accuracy is better.
cross_entropy = Objective(
    cross_entropy_loss, "accuracy", True, "classification", "%", "cross_entropy"
)
#: The objective of regression: `squared_error_loss`; less of it is better.
squared_error = Objective(squared_error_loss, "mse", False, "regression", "", "squared_error")
#: The objective of regression with a scale: `gaussian_likelihood_loss`; more likelihood is better.
gaussian_likelihood = Objective(
    gaussian_likelihood_loss,
    "log_likelihood",
    True,
    "regression",
    "",
    "gaussian_likelihood",
    "gaussian",
)
#: The objective of reinforcement learning: more return of a trial is better.
trial_return = Objective(_no_loss, "return", True, "control", "", "trial_return")
_NAMED = {o.name: o for o in (cross_entropy, squared_error, gaussian_likelihood, trial_return)}


def as_objective(objective: Objective | str) -> Objective:
    """An objective by its name, or by 'package.module:attribute' where it is somebody's own.

    Raises:
      UsageError: an unknown name, or something that is not an `Objective`.

    Examples:
      >>> as_objective("squared_error").metric
      'mse'
    """
    if isinstance(objective, Objective):
        return objective
    if not isinstance(objective, str):
        raise UsageError(
            f"objective must be a meta_jax Objective or the name of one, not a "
            f"{type(objective).__name__}: give {', '.join(_NAMED)}, or wrap a loss with "
            "meta_jax.Objective(loss, metric, maximise)"
        )
    if objective in _NAMED:
        return _NAMED[objective]
    if ":" not in objective:
        raise UsageError(
            f"unknown objective '{objective}': choose one of {', '.join(_NAMED)}, or name your own "
            "as package.module:attribute"
        )
    found = load_attribute(objective)
    if not isinstance(found, Objective):
        raise UsageError(f"{objective} is a {type(found).__name__}, not a meta_jax Objective")
    return found._replace(name=objective)


def check_kind(objective: Objective, kind: str, learner: str) -> None:
    """Refuses an objective that a learner cannot serve.

    Raises:
      UsageError: the objective is of another kind.
    """
    if objective.kind != kind:
        raise UsageError(
            f"{learner} is for {kind}, and its tasks ask for {objective.kind} "
            f"({objective.name or objective.metric}): choose other tasks or another learner"
        )


def target_kind(objective: Objective) -> Literal["classification", "regression"]:
    """What the targets of an objective are.

    Raises:
      UsageError: there are no targets, since actions earn rewards.
    """
    if objective.kind == "control":
        raise UsageError(
            "this learner answers queries, and tasks of reinforcement learning have none: choose "
            "other tasks, or a learner that acts, such as rl2"
        )
    return objective.kind


def tree_rows(tree: PyTree) -> int:
    """The number of rows of a pytree whose leaves are [n, ...]."""
    leaves = jax.tree.leaves(tree)
    chex.assert_equal_shape_prefix(leaves, 1)
    return leaves[0].shape[0]
