"""Objectives: what is asked of a learner's outputs, and which metric says what is better."""

import chex
import jax
import jax.numpy as jnp

from meta_jax.core import Array, Batch, Metrics, Objective, PyTree
from meta_jax.lookup import UsageError, load_attribute


def row_mask(batch: Batch) -> Array:
    """The mask of a batch, bool [n]; all True where it has none."""
    if batch.mask is not None:
        return batch.mask
    return jnp.ones(jax.tree.leaves(batch.x)[0].shape[0], bool)


def without_padding(y: Array, mask: Array | None) -> Array:
    """Targets [n, D] whose rows of padding are zero; y itself without a mask."""
    return y if mask is None else jnp.where(mask[:, None], y, jnp.zeros((), y.dtype))


def masked_mean(values: Array, mask: Array | None) -> Array:
    """Mean of one value for each row, [n], over the rows that are not padding; 0 without any."""
    if mask is None:
        return values.mean()
    return jnp.where(mask, values, 0).sum() / jnp.maximum(mask.sum(), 1).astype(values.dtype)


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


def cross_entropy_loss(logits: Array, y: Array, mask: Array | None = None) -> tuple[Array, Metrics]:
    """Mean softmax cross-entropy, in nats.

    Args:
      logits: [n, ways].
      y: One-hot labels [n, ways].
      mask: bool [n], False for rows of padding, which do not count.

    Returns:
      The loss and the metric `accuracy` in [0, 1]; a tie for the largest logit counts as wrong.

    Raises:
      ValueError: y is not one-hot of the logits' shape.

    Examples:
      >>> loss, metrics = cross_entropy_loss(jnp.zeros((3, 5)), jnp.eye(5)[:3])
      >>> round(float(loss), 4), float(metrics["accuracy"])  # ln 5
      (1.6094, 0.0)
    """
    check_outputs(logits, y)
    loss = -(y * jax.nn.log_softmax(logits)).sum(-1)
    true = (y * logits).sum(-1)
    beaten = jnp.where(y > 0, -jnp.inf, logits).max(-1) < true
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


cross_entropy = Objective(
    cross_entropy_loss, "accuracy", True, "classification", "%", "cross_entropy"
)
squared_error = Objective(squared_error_loss, "mse", False, "regression", "", "squared_error")
_NAMED = {objective.name: objective for objective in (cross_entropy, squared_error)}


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


def check_batch(batch: Batch, name: str) -> None:
    """Refuses a batch whose inputs, targets and mask differ in their number of rows.

    Args:
      batch: The batch.
      name: Its name in messages, such as 'support'.

    Raises:
      ValueError: the numbers of rows differ, or there is no row.
    """
    sizes = {
        f"{part}{jax.tree_util.keystr(path)}": leaf.shape[0] if jnp.ndim(leaf) else None
        for part, tree in zip(("x", "y", "mask"), batch, strict=True)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    if len(set(sizes.values())) != 1 or 0 in sizes.values() or None in sizes.values():
        found = ", ".join(f"{part} {size}" for part, size in sizes.items())
        raise ValueError(f"{name} needs the same number of rows, at least one, in: {found}")


def tree_rows(tree: PyTree) -> int:
    """The number of rows of a pytree whose leaves are [n, ...]."""
    leaves = jax.tree.leaves(tree)
    chex.assert_equal_shape_prefix(leaves, 1)
    return leaves[0].shape[0]
