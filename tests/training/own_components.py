"""Components of somebody's own, which nothing registers: they are named by their module."""

from typing import Literal

import jax
import jax.numpy as jnp

from meta_jax.core import (
    MetaLearner,
    Network,
    Objective,
    supervised_evaluate,
    supervised_loss,
)
from meta_jax.objectives import squared_error_loss


def mean_absolute_error_loss(outputs, y, mask):
    loss, _ = squared_error_loss(outputs, y, mask)
    return loss, {"mae": jnp.abs(outputs - y).mean()}


mean_absolute_error = Objective(mean_absolute_error_loss, "mae", False)


def dense(features: int = 3, *, activation: Literal["tanh", "relu"] = "tanh") -> Network:
    """Builds a network of one layer, with its input's sum as a state of no use.

    Args:
      features: Units of the layer.
      activation: Nonlinearity.
    """

    def init(key, x):
        return {"w": jax.random.normal(key, (x.shape[1], features))}, {}

    def apply(params, state, x, *, key, train, moments="stored", mask=None):
        return getattr(jax.nn, activation)(x @ params["w"]), state

    return Network(init, apply)


def linear(
    network: Network,
    *,
    objective: Objective = mean_absolute_error,
    factor: float = 1.0,
    scope: Literal["shared", "task"] = "shared",
) -> MetaLearner:
    """Builds a learner that does not adapt; its state counts episodes in a tuple.

    Args:
      network: The network.
      objective: Objective of the tasks.
      factor: Factor of the outputs.
      scope: Scope of the state.
    """

    def init(key, task):
        params, _ = network.init(key, task.support.x)
        return {"network": params}, (jnp.zeros((), jnp.int32), {"mean": jnp.full(2, 7.0)})

    def adapt(params, state, support, key, *, train):
        return state

    def predict(params, adapted, x, key, *, train, mask=None):
        z, _ = network.apply(params["network"], {}, x, key=key, train=train)
        return factor * z.sum(-1, keepdims=True), (adapted[0] + 1, adapted[1])

    loss = supervised_loss(adapt, predict, objective)
    return MetaLearner(
        init, adapt, predict, loss, supervised_evaluate(adapt, predict, objective), scope
    )
