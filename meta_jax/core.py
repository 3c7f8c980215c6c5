"""The one abstraction of meta_jax: a task meets a learner, a meta-learner adapts it.

A learner f_theta meets a task; a meta-learner g turns the task's support set S into an adapted
learner theta' = g(theta, S); training maximises what the adapted learner says of the query set B:

    max  E_tasks E_{S,B} [ sum_{(x, y) in B} log P_{g(theta, S)}(y | x) ]

Every method is an `adapt` (how S is absorbed) and a `predict` (how x is answered). All functions
are pure and written for ONE task, without a task axis: the outer loop maps them over tasks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
PyTree = Any


class Batch(NamedTuple):
    """Labelled examples. A row of `y` that is all zero marks padding."""

    x: Array  # [n, ...] inputs
    y: Array  # [n, ways] one-hot labels, or [n, D] real targets


class Episode(NamedTuple):
    """One task: what is learned from, and what is asked."""

    support: Batch
    query: Batch


class Aux(NamedTuple):
    """What a loss returns beside its value."""

    state: PyTree  # the new non-differentiated state (running statistics), structure unchanged
    metrics: dict[str, Array]  # scalars by name


class Network(NamedTuple):
    """A pure embedding network. `state` is `{}` or holds batch-norm statistics."""

    init: Callable[..., tuple[PyTree, PyTree]]  # (key, x [n, ...]) -> (params, state)
    apply: Callable[..., tuple[Array, PyTree]]  # (params, state, x, *, key, train) -> (y, state)
    batch_norm: str = "none"  # 'none', 'batch', 'running' or 'support': see networks/layers.py

    def apply_to_support(
        self, params: PyTree, state: PyTree, x: Array, *, key: Array, train: bool
    ) -> tuple[Array, PyTree]:
        """`apply` to support inputs: where batch norm is 'support', takes their statistics."""
        return self.apply(params, state, x, key=key, train=train or self.batch_norm == "support")

    def apply_to_queries(
        self, params: PyTree, state: PyTree, x: Array, *, key: Array, train: bool
    ) -> tuple[Array, PyTree]:
        """`apply` to query inputs: where batch norm is 'support', never takes their statistics."""
        return self.apply(params, state, x, key=key, train=train and self.batch_norm != "support")


class MetaLearner(NamedTuple):
    """A meta-learning method, as pure functions of one task.

    `train` is True while meta-training and False when a learner is tested.
    """

    init: Callable[..., tuple[PyTree, PyTree]]  # (key, episode) -> (params, state)
    adapt: Callable[..., PyTree]  # (params, state, support, key, *, train) -> adapted
    predict: Callable[
        ..., tuple[Array, PyTree]
    ]  # (params, adapted, x, key, *, train) -> (y, state)
    loss: Callable[..., tuple[Array, Aux]]  # (params, state, episode, key) -> (scalar, Aux)
    state_scope: str = "shared"  # 'shared': averaged over tasks; 'task': one state for each task


Criterion = Callable[
    [Array, Array], tuple[Array, dict[str, Array]]
]  # (outputs, y) -> loss, metrics


def cross_entropy(logits: Array, y: Array) -> tuple[Array, dict[str, Array]]:
    """Mean softmax cross-entropy, in nats, over the rows that are not padding.

    Args:
      logits: [n, ways].
      y: one-hot labels [n, ways]; an all-zero row is padding.

    Returns:
      The loss and the metric `accuracy` in [0, 1]; a tie for the largest logit counts as wrong.
    """
    count = jnp.maximum(y.sum(), 1)
    loss = -(y * jax.nn.log_softmax(logits)).sum() / count
    true = (y * logits).sum(-1, keepdims=True)
    beaten = jnp.where(y > 0, -jnp.inf, logits).max(-1) < true[:, 0]
    return loss, {"accuracy": (beaten * y.sum(-1)).sum() / count}


def squared_error(outputs: Array, y: Array) -> tuple[Array, dict[str, Array]]:
    """Mean squared error over rows and dimensions; outputs and y are [n, D]. Metric `mse`."""
    loss = ((outputs - y) ** 2).mean()
    return loss, {"mse": loss}


def episode_loss(
    adapt: Callable[..., PyTree],
    predict: Callable[..., tuple[Array, PyTree]],
    criterion: Criterion,
) -> Callable[..., tuple[Array, Aux]]:
    """The default objective of a `MetaLearner`: criterion(predict(adapt(S), B))."""

    def loss(params: PyTree, state: PyTree, episode: Episode, key: Array) -> tuple[Array, Aux]:
        adapt_key, predict_key = jax.random.split(key)
        adapted = adapt(params, state, episode.support, adapt_key, train=True)
        outputs, state = predict(params, adapted, episode.query.x, predict_key, train=True)
        value, metrics = criterion(outputs, episode.query.y)
        return value, Aux(state, metrics)

    return loss
