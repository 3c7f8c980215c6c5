"""The one differentiable inner loop: problem x update rule x adjoint x parameter mask."""

from collections.abc import Callable

import jax
import optax

from meta_jax.core import PyTree
from meta_jax.optimization_based.adjoints import UNROLLED, Adjoint
from meta_jax.optimization_based.update_rules import UpdateRule

# A problem: (params, state) -> (loss, new state).
Problem = Callable[[PyTree, PyTree], tuple[jax.Array, PyTree]]
# Which parameters are adapted: (path, leaf) -> bool, path as of `jax.tree_util`.
Mask = Callable[[tuple, jax.Array], bool]


def partition(params: PyTree, mask: Mask) -> tuple[PyTree, PyTree]:
    """Splits a tree into the leaves that a mask selects and the others, `None` in their places."""
    chosen = jax.tree_util.tree_map_with_path(lambda path, p: p if mask(path, p) else None, params)
    others = jax.tree_util.tree_map_with_path(lambda path, p: None if mask(path, p) else p, params)
    return chosen, others


def merge(chosen: PyTree, others: PyTree) -> PyTree:
    """The inverse of `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, chosen, others, is_leaf=lambda x: x is None
    )


def unroll(
    problem: Problem,
    rule: UpdateRule,
    meta: PyTree,
    params: PyTree,
    state: PyTree,
    *,
    steps: int,
    adjoint: Adjoint = UNROLLED,
    mask: Mask | None = None,
) -> tuple[PyTree, PyTree, jax.Array]:
    """Minimises a problem for a fixed number of steps, differentiably.

    It is one `lax.scan`, so that compile time does not grow with the steps.

    Args:
      problem: (params, state) -> (scalar loss, new state), the state's structure unchanged.
      rule: the inner optimizer.
      meta: its meta-parameters.
      params: where the loop starts; the outer gradient reaches it.
      state: the problem's state (batch-norm statistics).
      steps: number of inner steps.
      adjoint: how the outer gradient comes back through the loop.
      mask: which leaves are adapted, all by default. Gradients of the others are not computed.

    Returns:
      The adapted parameters, the last state, and the losses [steps] before each step.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from meta_jax.optimization_based.update_rules import from_optax
      >>> quadratic = lambda p, s: (0.5 * p**2, s)
      >>> end = lambda p: unroll(quadratic, from_optax(optax.sgd(0.5)), {}, p, {}, steps=2)[0]
      >>> float(end(jnp.array(1.0))), float(jax.grad(end)(jnp.array(1.0)))
      (0.25, 0.25)
    """
    adapted, fixed = (params, None) if mask is None else partition(params, mask)

    def objective(adapted: PyTree, state: PyTree) -> tuple[jax.Array, PyTree]:
        return problem(adapted if mask is None else merge(adapted, fixed), state)

    def step(carry: tuple, _: None) -> tuple[tuple, jax.Array]:
        adapted, state, rule_state = carry
        (loss, state), gradient = jax.value_and_grad(objective, has_aux=True)(adapted, state)
        updates, rule_state = rule.update(
            meta, adjoint.gradient(gradient), rule_state, adapted, loss=loss
        )
        return (optax.apply_updates(adapted, updates), state, rule_state), loss

    carry = (adapted, state, rule.init(meta, adapted))
    (adapted, state, _), losses = jax.lax.scan(adjoint.step(step), carry, length=steps)
    return (adapted if mask is None else merge(adapted, fixed)), state, losses
