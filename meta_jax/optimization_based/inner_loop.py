"""The one differentiable inner loop: a problem, an update rule, an adjoint and a mask."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from meta_jax.core import Array, PyTree
from meta_jax.optimization_based.adjoints import UNROLLED, Adjoint, Differentiated, Problem
from meta_jax.optimization_based.update_rules import UpdateRule

# Which parameters are adapted: (path, leaf) -> bool, the path as in `jax.tree_util`.
Mask = Callable[[tuple, Array], bool]
# What is looked at after a step: (params, state, step) -> anything.
Observe = Callable[[PyTree, PyTree, Array], PyTree]


class InnerLoopResult(NamedTuple):
    """Where an inner loop ended, and what was seen on the way.

    Attributes:
      params: Parameters after the last step.
      state: State of the problem.
      rule_state: State of the update rule.
      losses: Loss before each step, [steps].
      observed: What `observe` returned after each step, with a leading axis [steps].
    """

    params: PyTree
    state: PyTree
    rule_state: PyTree
    losses: Array
    observed: PyTree


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


def with_proximal_term(problem: Problem, centre: PyTree, weight: float) -> Problem:
    """Adds (weight / 2)||params - centre||^2, which keeps a problem's minimum near a point.

    Args:
      problem: The problem.
      centre: Parameters of the problem's structure; the outer gradient reaches them.
      weight: Weight of the term, lambda of Rajeswaran et al. (2019), equation 3.

    Examples:
      >>> import jax.numpy as jnp
      >>> problem = with_proximal_term(lambda p, state, step: (p, state), jnp.array(1.0), 2.0)
      >>> float(problem(jnp.array(3.0), {}, jnp.array(0))[0])  # 3 + 2 / 2 (3 - 1)^2
      7.0
    """

    def regularised(params: PyTree, state: PyTree, step: Array) -> tuple[Array, PyTree]:
        loss, state = problem(params, state, step)
        squares = jax.tree.map(lambda p, c: ((p - c) ** 2).sum(), params, centre)
        return loss + weight / 2 * sum(jax.tree.leaves(squares)), state

    return regularised


def run_inner_loop(
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
    observe: Observe | None = None,
) -> InnerLoopResult:
    """Minimises a problem for a fixed number of steps, differentiably.

    It is a `lax.scan`, so that compile time does not grow with the steps.

    Args:
      problem: Function (params, state, step) -> (scalar loss, new state), whose state keeps its
        structure. What is random in it takes its key from the step: `jax.random.fold_in`.
      rule: Inner optimizer.
      meta: Meta-parameters of the inner optimizer.
      params: Parameters where the loop starts; the outer gradient reaches them.
      state: State of the problem (moments of normalisation layers).
      steps: Number of inner steps.
      adjoint: How the outer gradient comes back through the loop.
      mask: Which leaves are adapted, all by default. Gradients of the others are not computed.
      rule_state: State of the rule to go on from; by default a fresh one.
      observe: Function (params, state, step) -> anything, called after each step: what an outer
        loss over the whole trajectory needs, as the query loss after every step.

    Returns:
      Where it ended, and what was seen on the way.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from meta_jax.optimization_based.update_rules import from_optax
      >>> quadratic = lambda p, state, step: (0.5 * p**2, state)
      >>> rule = from_optax(optax.sgd(0.5))
      >>> end = lambda p: run_inner_loop(quadratic, rule, {}, p, {}, steps=2).params
      >>> float(end(jnp.array(1.0))), float(jax.grad(end)(jnp.array(1.0)))
      (0.25, 0.25)
    """
    adapted, fixed = (params, None) if mask is None else partition(params, mask)

    def whole(adapted: PyTree) -> PyTree:
        return adapted if mask is None else merge(adapted, fixed)

    def masked(adapted: PyTree, state: PyTree, step: Array) -> tuple[Array, PyTree]:
        return problem(whole(adapted), state, step)

    def make_body(
        differentiated: Differentiated,
    ) -> Callable[[tuple, Array], tuple[tuple, tuple]]:
        def body(carry: tuple, step: Array) -> tuple[tuple, tuple]:
            adapted, before, rule_state = carry
            loss, state, (gradient, seen_loss) = differentiated(adapted, before, step)
            searched = []

            def value_fn(adapted: PyTree) -> Array:
                searched.append(True)
                return masked(adapted, before, step)[0]

            updates, rule_state = rule.update(
                meta, gradient, rule_state, adapted, loss=seen_loss, value_fn=value_fn
            )
            if searched and adjoint.is_first_order:
                # A line search looks at the parameters too, which are no constants.
                updates, rule_state = jax.lax.stop_gradient((updates, rule_state))
            adapted = optax.apply_updates(adapted, updates)
            observed = None if observe is None else observe(whole(adapted), state, step)
            return (adapted, state, rule_state), (loss, observed)

        return body

    rule_state = rule.init(meta, adapted) if rule_state is None else rule_state
    (adapted, state, rule_state), (losses, observed) = adjoint.run(
        masked, make_body, (adapted, state, rule_state), steps
    )
    return InnerLoopResult(whole(adapted), state, rule_state, losses, observed)
