"""Update rules out into the world: any of them as an optax transformation."""

import jax
import optax

from meta_jax.core import PyTree
from meta_jax.optimization_based.update_rules import UpdateRule


def as_optax(rule: UpdateRule, meta: PyTree) -> optax.GradientTransformationExtraArgs:
    """An update rule with its meta-parameters fixed, as an optax optimizer; exact to the rule.

    Args:
      rule: the rule, learned or not.
      meta: its meta-parameters.

    Returns:
      A transformation whose state is the rule's, a pytree of arrays. `update` needs `params` where
      the rule looks at them (as those of MLPs do), and the loss as `value=` where it looks at that
      (as the LSTM Meta-Learner's does).

    Examples:
      >>> import jax.numpy as jnp
      >>> from meta_jax.optimization_based.update_rules import learned_sgd
      >>> optimizer = as_optax(learned_sgd(0.0, 1.0), jnp.array([0.5, 2.0]))
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
        value: jax.Array | None = None,
        **extra: object,
    ) -> tuple[PyTree, PyTree]:
        del extra
        return rule.update(meta, updates, state, params, loss=value)

    return optax.GradientTransformationExtraArgs(init, update)
