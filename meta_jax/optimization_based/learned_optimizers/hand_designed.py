"""Hand-designed optimizers as update rules, with their learning rate as the meta-parameter."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from meta_jax.core import Array, PyTree
from meta_jax.optimization_based.update_rules import UpdateRule, ValueFn, from_optax


def with_learning_rate(
    transformation: optax.GradientTransformation, learning_rate: float
) -> UpdateRule:
    """Makes the learning rate of an optimizer a meta-parameter.

    u = -learning_rate * t(g): the rate can be learned, tuned and vmapped over.

    Args:
      transformation: Optimizer t without a learning rate, for example `optax.scale_by_adam()`.
      learning_rate: Initial value of the meta-parameter {'learning_rate'}, a scalar.

    Returns:
      The rule.

    Examples:
      >>> rule = with_learning_rate(optax.identity(), 0.5)
      >>> meta = rule.init_meta(jax.random.key(0), jnp.ones(2))
      >>> rule.update(meta, jnp.array([1., 2.]), rule.init(meta, jnp.ones(2)), None)[0]
      Array([-0.5, -1. ], dtype=float32)
    """
    inner = from_optax(transformation)

    def init_meta(key: Array, params: PyTree) -> PyTree:
        del key
        return {"learning_rate": jnp.asarray(learning_rate, jax.tree.leaves(params)[0].dtype)}

    def init(meta: PyTree, params: PyTree) -> PyTree:
        del meta
        return inner.init({}, params)

    def update(
        meta: PyTree,
        gradient: PyTree,
        state: PyTree,
        params: PyTree,
        /,
        *,
        loss: Array | None = None,
        value_fn: ValueFn | None = None,
    ) -> tuple[PyTree, PyTree]:
        direction, state = inner.update({}, gradient, state, params, loss=loss, value_fn=value_fn)
        return jax.tree.map(lambda d: -meta["learning_rate"] * d, direction), state

    return UpdateRule(init_meta, init, update)


#: Optimizers by name, without a learning rate; decays are those that Andrychowicz et al.
#: (2016) compare with.
HAND_DESIGNED: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": optax.identity,
    "momentum": lambda: optax.trace(0.9),
    "nesterov": lambda: optax.trace(0.9, nesterov=True),
    "rmsprop": optax.scale_by_rms,
    "adam": optax.scale_by_adam,
}
