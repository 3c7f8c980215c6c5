"""The one differentiable inner loop: problem x update rule x adjoint x mask x objective."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from meta_jax.core import PyTree
from meta_jax.optimization_based.adjoints import UNROLLED, Adjoint, Evaluate
from meta_jax.optimization_based.update_rules import UpdateRule

# A problem: (params, state, step) -> (loss, new state). Steps count from 0.
Problem = Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, PyTree]]
# Which parameters are adapted: (path, leaf) -> bool, path as of `jax.tree_util`.
Mask = Callable[[tuple, jax.Array], bool]


class Unrolled(NamedTuple):
    """Where an inner loop ended, and what was seen on the way."""

    params: PyTree
    state: PyTree  # the problem's
    rule_state: PyTree  # the update rule's
    losses: jax.Array  # [steps], before each step
    observed: PyTree  # what `observe` returned after each step, with a leading axis [steps]


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


def proximal(problem: Problem, centre: PyTree, strength: float) -> Problem:
    """A problem plus (strength / 2)||params - centre||^2, which keeps its minimum near a point.

    Args:
      problem: the problem.
      centre: parameters of the problem's structure; the outer gradient reaches them.
      strength: lambda of Rajeswaran et al. (2019), equation 3.
    """

    def regularised(params: PyTree, state: PyTree, step: jax.Array) -> tuple[jax.Array, PyTree]:
        loss, state = problem(params, state, step)
        squares = jax.tree.map(lambda p, c: ((p - c) ** 2).sum(), params, centre)
        return loss + strength / 2 * sum(jax.tree.leaves(squares)), state

    return regularised


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
    rule_state: PyTree | None = None,
    observe: Callable[[PyTree, PyTree, jax.Array], PyTree] | None = None,
) -> Unrolled:
    """Minimises a problem for a fixed number of steps, differentiably.

    It is a `lax.scan`, so that compile time does not grow with the steps.

    Args:
      problem: (params, state, step) -> (scalar loss, new state), the state's structure unchanged.
      rule: the inner optimizer.
      meta: its meta-parameters.
      params: where the loop starts; the outer gradient reaches it.
      state: the problem's state (batch-norm statistics).
      steps: number of inner steps.
      adjoint: how the outer gradient comes back through the loop.
      mask: which leaves are adapted, all by default. Gradients of the others are not computed.
      rule_state: the rule's state to go on from; by default a fresh one.
      observe: (params, state, step) -> anything, called after each step: what an objective over
        the whole trajectory needs, as the query loss after every step.

    Returns:
      Where it ended, and what was seen on the way.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from meta_jax.optimization_based.update_rules import from_optax
      >>> quadratic = lambda p, state, step: (0.5 * p**2, state)
      >>> rule = from_optax(optax.sgd(0.5))
      >>> end = lambda p: unroll(quadratic, rule, {}, p, {}, steps=2).params
      >>> float(end(jnp.array(1.0))), float(jax.grad(end)(jnp.array(1.0)))
      (0.25, 0.25)
    """
    adapted, fixed = (params, None) if mask is None else partition(params, mask)

    def whole(adapted: PyTree) -> PyTree:
        return adapted if mask is None else merge(adapted, fixed)

    def objective(adapted: PyTree, state: PyTree, number: jax.Array) -> tuple[jax.Array, PyTree]:
        return problem(whole(adapted), state, number)

    def step(evaluate: Evaluate) -> Callable[[tuple, jax.Array], tuple[tuple, tuple]]:
        def body(carry: tuple, number: jax.Array) -> tuple[tuple, tuple]:
            adapted, state, rule_state = carry
            loss, state, (gradient, seen_loss) = evaluate(adapted, state, number)
            updates, rule_state = rule.update(meta, gradient, rule_state, adapted, loss=seen_loss)
            adapted = optax.apply_updates(adapted, updates)
            observed = None if observe is None else observe(whole(adapted), state, number)
            return (adapted, state, rule_state), (loss, observed)

        return body

    rule_state = rule.init(meta, adapted) if rule_state is None else rule_state
    (adapted, state, rule_state), (losses, observed) = adjoint.run(
        objective, step, (adapted, state, rule_state), steps
    )
    return Unrolled(whole(adapted), state, rule_state, losses, observed)
