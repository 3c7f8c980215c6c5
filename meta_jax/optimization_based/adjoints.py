"""Adjoints: how an inner loop is run, and how the outer gradient comes back through it.

An adjoint is orthogonal to the problem, the update rule and the mask: each gives the same adapted
parameters. They differ in the outer gradient's exactness, time and memory:

- `UNROLLED`: exact; keeps every intermediate value of every step.
- `CHECKPOINTED`: exact; keeps about 2 sqrt(steps) copies of the parameters, runs each step thrice.
- `MIXED_MODE`: exact; keeps one copy of the parameters for each step.
- `truncated(k)`: exact in the last k steps, first order before.
- `FIRST_ORDER`: inner gradients are constants.
- `implicit()`: of the problem's minimum, whatever path led there.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.scipy.sparse.linalg import cg

from meta_jax.core import PyTree

# (adapted, state, step) -> (loss, new state)
Objective = Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, PyTree]]
# (adapted, state, step) -> (loss, new state, (gradient, loss) as the update rule sees them)
Evaluate = Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, PyTree, tuple]]
# evaluate -> the body of a scan over step numbers
Step = Callable[[Evaluate], Callable[[PyTree, jax.Array], tuple[PyTree, PyTree]]]


class Adjoint(NamedTuple):
    """How an inner loop is run and differentiated.

    `run` takes (objective, step, carry, steps); the carry is (adapted, state, rule's state). It
    returns the last carry and the outputs of all steps, stacked.
    """

    run: Callable[[Objective, Step, PyTree, int], tuple[PyTree, PyTree]]
    # Whether the loop's end is taken for a minimum of the problem, wherever the loop began.
    is_implicit: bool = False


def _second_order(objective: Objective) -> Evaluate:
    def evaluate(adapted: PyTree, state: PyTree, step: jax.Array) -> tuple:
        gradient_of = jax.value_and_grad(objective, has_aux=True)
        (loss, state), gradient = gradient_of(adapted, state, step)
        return loss, state, (gradient, loss)

    return evaluate


def _first_order(objective: Objective) -> Evaluate:
    def evaluate(adapted: PyTree, state: PyTree, step: jax.Array) -> tuple:
        loss, state, seen = _second_order(objective)(adapted, state, step)
        return loss, state, jax.lax.stop_gradient(seen)

    return evaluate


def _scan(make_evaluate: Callable[[Objective], Evaluate]) -> Adjoint:
    return Adjoint(
        lambda objective, step, carry, steps: jax.lax.scan(
            step(make_evaluate(objective)), carry, jnp.arange(steps)
        )
    )


# Back-propagation through every step, all intermediate values kept.
UNROLLED = _scan(_second_order)
# Inner gradients are constants (Finn et al. 2017, section 5.2): no second derivatives.
FIRST_ORDER = _scan(_first_order)


def _run_checkpointed(
    objective: Objective, step: Step, carry: PyTree, steps: int
) -> tuple[PyTree, PyTree]:
    body = jax.checkpoint(step(_second_order(objective)), prevent_cse=False)
    segment = jax.checkpoint(
        lambda carry, numbers: jax.lax.scan(body, carry, numbers), prevent_cse=False
    )
    size = max(1, math.isqrt(steps))
    whole = steps - steps % size
    carry, outputs = jax.lax.scan(segment, carry, jnp.arange(whole).reshape(whole // size, size))
    outputs = jax.tree.map(lambda o: o.reshape(whole, *o.shape[2:]), outputs)
    if whole == steps:
        return carry, outputs
    carry, last = segment(carry, jnp.arange(whole, steps))
    return carry, _concatenate(outputs, last)


def _concatenate(first: PyTree, last: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, last)


# As unrolled, but the backward pass runs the steps again: segments of about sqrt(steps) steps keep
# what they began with, and so does every step of the segment that is being differentiated.
CHECKPOINTED = Adjoint(_run_checkpointed)


def truncated(last: int) -> Adjoint:
    """Back-propagation through the last steps; the inner gradients of earlier ones are constants.

    truncated(0) is `FIRST_ORDER`, truncated(steps) is `UNROLLED`. The start still gets its gradient
    through the sum of the updates, as in first order.

    Args:
      last: how many steps are differentiated to second order.

    Raises:
      ValueError: for a number below zero.
    """
    if last < 0:
        raise ValueError(f"the {last} last steps of a truncated adjoint must not be negative")

    def run(objective: Objective, step: Step, carry: PyTree, steps: int) -> tuple[PyTree, PyTree]:
        early = max(0, steps - last)
        carry, first = jax.lax.scan(step(_first_order(objective)), carry, jnp.arange(early))
        second = step(_second_order(objective))
        carry, rest = jax.lax.scan(second, carry, jnp.arange(early, steps))
        return carry, _concatenate(first, rest)

    return Adjoint(run)


def annealed(first_order: jax.Array) -> Adjoint:
    """`FIRST_ORDER` where a boolean scalar, known only when it runs, is true, else `UNROLLED`.

    The derivative-order annealing of Antoniou et al. (2019): while the scalar is true, the second
    derivatives are not computed.
    """

    def make_evaluate(objective: Objective) -> Evaluate:
        first, second = _first_order(objective), _second_order(objective)
        return lambda *arguments: jax.lax.cond(first_order, first, second, *arguments)

    return _scan(make_evaluate)


class _Split(NamedTuple):
    """A tree's leaves that can be differentiated, and how to put others back among them."""

    real: list[jax.Array]
    join: Callable[..., PyTree]  # (real, others=the tree's own) -> tree


def _split(tree: PyTree) -> _Split:
    leaves, treedef = jax.tree.flatten(tree)
    is_real = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def join(real: list[Any], others: list[Any] = leaves) -> PyTree:
        real = iter(real)
        found = [next(real) if r else o for r, o in zip(is_real, others, strict=True)]
        return jax.tree.unflatten(treedef, found)

    return _Split([leaf for leaf, r in zip(leaves, is_real, strict=True) if r], join)


def _cotangent(tree: PyTree, real: list[jax.Array]) -> PyTree:
    """Cotangents of a tree's real leaves, with None (no gradient) for its others."""
    return _split(tree).join(real, [None] * len(jax.tree.leaves(tree)))


def _explicit(function: Callable, *arguments: PyTree) -> tuple[Callable, list, Jaxpr]:
    """A function with all that it closes over as its first argument, those values, its jaxpr.

    The backward pass of a `custom_vjp` must not close over what is being differentiated.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    treedef = jax.tree.structure(shape)

    def explicit(consts: list, *arguments: PyTree) -> PyTree:
        found = jax.core.eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(treedef, found)

    return explicit, list(closed.consts), closed.jaxpr


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _value_and_gradient(function: Callable, adapted: PyTree, others: PyTree) -> tuple:
    """((loss, state), gradient in `adapted`) of function(adapted, others) -> (loss, state)."""
    return jax.value_and_grad(function, has_aux=True)(adapted, others)


def _keep_inputs(function: Callable, adapted: PyTree, others: PyTree) -> tuple:
    return _value_and_gradient(function, adapted, others), (adapted, others)


def _hessian_product(function: Callable, residuals: tuple, cotangents: tuple) -> tuple:
    """The gradient's cotangent v comes back as H v, which a symmetric H gives forwards.

    With the pullback p(z, c) of the function at z, linear in c, all of it is one directional
    derivative: that of p(z, (1, 0)) in the directions (v, 0) of z and (loss's, state's) of c.
    """
    _, others = residuals
    (loss_bar, state_bar), direction = cotangents
    inputs = _split(residuals)

    def outputs(real: list) -> list:
        return _split(function(*inputs.join(real))).real

    def pullback(real: list, cotangent: list) -> list:
        return jax.vjp(outputs, real)[1](cotangent)[0]

    one = [jnp.ones_like(loss_bar)]
    state_bar = [s for s in jax.tree.leaves(state_bar) if s.dtype != jax.dtypes.float0]
    still = [jnp.zeros_like(leaf) for leaf in _split(others).real]
    _, real = jax.jvp(
        pullback,
        (inputs.real, one + [jnp.zeros_like(s) for s in state_bar]),
        (jax.tree.leaves(direction) + still, [loss_bar, *state_bar]),
    )
    return _cotangent(residuals, real)


_value_and_gradient.defvjp(_keep_inputs, _hessian_product)


def _refuse_custom_vjp(jaxpr: Jaxpr) -> None:
    """Raises what JAX would say only when it compiles, and not of whom."""
    for equation in jaxpr.eqns:
        if "custom_vjp" in equation.primitive.name:
            raise ValueError(
                "the mixed-mode adjoint differentiates forwards over backwards, which a network "
                "with a custom_vjp (as the library's convolutions) refuses: use the checkpointed "
                "adjoint, or a network like mlp"
            )
        for inner in jaxprs_in_params(equation.params):
            _refuse_custom_vjp(inner)


def _mixed_mode(objective: Objective) -> Evaluate:
    def evaluate(adapted: PyTree, state: PyTree, step: jax.Array) -> tuple:
        explicit, consts, jaxpr = _explicit(objective, adapted, state, step)
        _refuse_custom_vjp(jaxpr)
        (loss, state), gradient = _value_and_gradient(
            lambda adapted, others: explicit(others[2], adapted, *others[:2]),
            adapted,
            (state, step, consts),
        )
        return loss, state, (gradient, loss)

    return evaluate


# As unrolled, but Hessian products are taken forwards over backwards: of a step its start is kept,
# and nothing of it runs twice but its gradient (Kemaev et al. 2025, arXiv:2505.00793). Not for
# networks with a custom_vjp, as the library's convolutions have: ValueError.
MIXED_MODE = _scan(_mixed_mode)


def implicit(*, cg_steps: int = 5, damping: float = 0.0) -> Adjoint:
    """The gradient of a minimum of the problem (Rajeswaran et al. 2019, arXiv:1909.04630).

    With F the problem's loss, phi the loop's end and psi whatever else F depends on, the cotangent
    v of phi becomes -d/dpsi <u, grad_phi F(phi, psi)> where (H + damping I) u = v and H is F's
    Hessian at phi. The loop's path is forgotten, so its start, the rule's meta-parameters, the
    losses and the states get no gradient; a start gets one as part of psi, by a proximal term
    (lambda / 2)||phi - theta||^2 in the problem: then it is (I + H_L / lambda)^-1 v.

    Args:
      cg_steps: steps of conjugate gradients for u; as many as phi has numbers are exact.
      damping: added to the Hessian's diagonal.

    Raises:
      ValueError: for less than one step of conjugate gradients, or a damping below zero.
    """
    if cg_steps < 1 or damping < 0:
        raise ValueError(
            f"conjugate gradients with {cg_steps} steps and damping {damping}: give at least one "
            "step, and a damping that is not negative"
        )

    def run(objective: Objective, step: Step, carry: PyTree, steps: int) -> tuple[PyTree, PyTree]:
        loop, loop_consts, _ = _explicit(
            lambda carry: UNROLLED.run(objective, step, carry, steps), carry
        )
        gradient, consts, _ = _explicit(
            lambda adapted, state: jax.grad(objective, has_aux=True)(
                adapted, state, jnp.asarray(max(0, steps - 1))
            )[0],
            *carry[:2],
        )

        @jax.custom_vjp
        def solve(carry: PyTree, loop_consts: list, consts: list) -> tuple[PyTree, PyTree]:
            del consts
            return loop(loop_consts, carry)

        def forward(carry: PyTree, loop_consts: list, consts: list) -> tuple[tuple, tuple]:
            end, outputs = loop(loop_consts, carry)
            return (end, outputs), (*end[:2], consts)

        def backward(residuals: tuple, cotangents: tuple) -> tuple:
            adapted, state, consts = residuals
            inputs = _split(consts)
            _, pullback = jax.vjp(
                lambda adapted, real: gradient(inputs.join(real), adapted, state),
                adapted,
                inputs.real,
            )

            def damped_hessian(u: PyTree) -> PyTree:
                return jax.tree.map(lambda h, u: h + damping * u, pullback(u)[0], u)

            u, _ = cg(damped_hessian, cotangents[0][0], tol=0.0, maxiter=cg_steps)
            return None, None, _cotangent(consts, jax.tree.map(jnp.negative, pullback(u)[1]))

        solve.defvjp(forward, backward)
        return solve(carry, loop_consts, consts)

    return Adjoint(run, is_implicit=True)


# Those without a setting of their own, by name.
ADJOINTS = {
    "unrolled": UNROLLED,
    "first_order": FIRST_ORDER,
    "checkpointed": CHECKPOINTED,
    "mixed_mode": MIXED_MODE,
}
