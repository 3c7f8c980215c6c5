"""Update rules as optax transformations, to train anything with."""

from typing import Any

import optax

from meta_jax.core import Array, PyTree
from meta_jax.optimization_based.update_rules import UpdateRule, ValueFn


def to_optax(rule: UpdateRule, meta: PyTree) -> optax.GradientTransformationExtraArgs:
    """Converts an update rule with fixed meta-parameters to an optax optimizer.

    The optimizer's updates are exactly the rule's.

    Args:
      rule: Update rule, learned or not.
      meta: Meta-parameters of the rule.

    Returns:
      A transformation whose state is the rule's, a pytree of arrays. `update` needs `params` where
      the rule looks at them (as those of MLPs do), the loss as `value=` where it looks at that (as
      the LSTM Meta-Learner's does), and the loss function as `value_fn=` where it searches a line.

    Examples:
      >>> import jax.numpy as jnp
      >>> from meta_jax.optimization_based.update_rules import learned_sgd
      >>> optimizer = to_optax(learned_sgd(0.0, 1.0), jnp.array([0.5, 2.0]))
      >>> updates, _ = optimizer.update(jnp.ones(2), optimizer.init(jnp.zeros(2)))
      >>> updates.tolist()
      [-0.5, -2.0]
    """

    def init(params: PyTree) -> PyTree:
        return rule.init(meta, params)

    def update(
        updates: PyTree,
        state: PyTree,
        params: PyTree | None = None,
        *,
        value: Array | None = None,
        value_fn: ValueFn | None = None,
        **extra: Any,
    ) -> tuple[PyTree, PyTree]:
        del extra
        return rule.update(meta, updates, state, params, loss=value, value_fn=value_fn)

    return optax.GradientTransformationExtraArgs(init, update)
