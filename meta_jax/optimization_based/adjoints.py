"""Adjoints: how an inner loop is run, and how the outer gradient comes back through it.

An adjoint is independent of the problem, the update rule and the mask: each gives the same adapted
parameters. They differ in the outer gradient's exactness, time and memory:

- `UNROLLED`: exact; keeps every intermediate value of every step.
- `CHECKPOINTED`: exact; keeps about 2 sqrt(steps) copies of the parameters, runs each step thrice.
- `MIXED_MODE`: exact; keeps one copy of the parameters for each step.
- `truncated(k)`: exact in the last k steps, first order before.
- `FIRST_ORDER`: inner gradients are constants.
- `implicit()`: the gradient of the problem's minimum, whatever path led there.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.scipy.sparse.linalg import cg

from meta_jax.core import Array, PyTree
from meta_jax.lookup import UsageError

# A problem: (params, state, step) -> (loss, new state). Steps count from 0.
Problem = Callable[[PyTree, PyTree, Array], tuple[Array, PyTree]]
# (params, state, step) -> (loss, new state, (gradient, loss) as the update rule sees them)
Differentiated = Callable[[PyTree, PyTree, Array], tuple[Array, PyTree, tuple[PyTree, Array]]]
# Makes the body of a scan over step numbers, (carry, step) -> (carry, outputs).
MakeBody = Callable[[Differentiated], Callable[[PyTree, Array], tuple[PyTree, PyTree]]]


class Run(Protocol):
    """(problem, make_body, carry, steps) -> (carry, outputs)."""

    def __call__(
        self, problem: Problem, make_body: MakeBody, carry: PyTree, steps: int, /
    ) -> tuple[PyTree, PyTree]:
        """The last carry, and the outputs of all steps, stacked.

        The carry is (params, state, rule's state).
        """
        ...


class Adjoint(NamedTuple):
    """How an inner loop is run and differentiated.

    Attributes:
      run: Function that runs the loop and differentiates it its way.
      name: Name by which flags and records call it, as `as_adjoint` reads it.
      is_implicit: Whether the loop's end is taken for a minimum of the problem, wherever the loop
        began.
      is_first_order: Whether the inner gradients of all steps are constants.
    """

    run: Run
    name: str = ""
    is_implicit: bool = False
    is_first_order: bool = False


def _second_order(problem: Problem) -> Differentiated:
    def differentiated(params: PyTree, state: PyTree, step: Array) -> tuple:
        gradient_of = jax.value_and_grad(problem, has_aux=True)
        (loss, state), gradient = gradient_of(params, state, step)
        return loss, state, (gradient, loss)

    return differentiated


def _first_order(problem: Problem) -> Differentiated:
    def differentiated(params: PyTree, state: PyTree, step: Array) -> tuple:
        loss, state, seen = _second_order(problem)(params, state, step)
        return loss, state, jax.lax.stop_gradient(seen)

    return differentiated


def _scan(
    differentiate: Callable[[Problem], Differentiated], name: str, *, is_first_order: bool = False
) -> Adjoint:
    def run(
        problem: Problem, make_body: MakeBody, carry: PyTree, steps: int
    ) -> tuple[PyTree, PyTree]:
        return jax.lax.scan(make_body(differentiate(problem)), carry, jnp.arange(steps))

    return Adjoint(run, name, is_first_order=is_first_order)


#: Back-propagation through every step, all intermediate values kept.
UNROLLED = _scan(_second_order, "unrolled")
#: Inner gradients are constants (Finn et al. 2017, section 5.2): no second derivatives.
FIRST_ORDER = _scan(_first_order, "first_order", is_first_order=True)


def _run_checkpointed(
    problem: Problem, make_body: MakeBody, carry: PyTree, steps: int
) -> tuple[PyTree, PyTree]:
    step, consts, _ = _explicit(make_body(_second_order(problem)), carry, jnp.arange(1)[0])

    def run(consts: list, carry: PyTree, numbers: Array) -> tuple[PyTree, PyTree]:
        body = jax.checkpoint(functools.partial(step, consts), prevent_cse=False)
        return jax.lax.scan(body, carry, numbers)

    segment = functools.partial(jax.checkpoint(run, prevent_cse=False), consts)
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


#: As `UNROLLED`, but the backward pass runs the steps again: segments of about sqrt(steps) steps
#: keep what they began with, and so does every step of the segment that is being differentiated.
CHECKPOINTED = Adjoint(_run_checkpointed, "checkpointed")


def truncated(last: int) -> Adjoint:
    """Back-propagation through the last steps; the inner gradients of earlier ones are constants.

    truncated(0) is `FIRST_ORDER`, truncated(steps) is `UNROLLED`. The start still gets its gradient
    through the sum of the updates, as in first order.

    Args:
      last: Number of last steps that are differentiated to second order.

    Raises:
      ValueError: a number below zero.
    """
    if last < 0:
        raise ValueError(f"the {last} last steps of a truncated adjoint must not be negative")

    def run(
        problem: Problem, make_body: MakeBody, carry: PyTree, steps: int
    ) -> tuple[PyTree, PyTree]:
        early = max(0, steps - last)
        carry, first = jax.lax.scan(make_body(_first_order(problem)), carry, jnp.arange(early))
        second = make_body(_second_order(problem))
        carry, rest = jax.lax.scan(second, carry, jnp.arange(early, steps))
        return carry, _concatenate(first, rest)

    return Adjoint(run, f"truncated:{last}", is_first_order=last == 0)


def annealed(first_order: Array) -> Adjoint:
    """`FIRST_ORDER` where a boolean scalar, known only when it runs, is true, else `UNROLLED`.

    The derivative-order annealing of Antoniou et al. (2019): while the scalar is true, the second
    derivatives are not computed.
    """

    def differentiate(problem: Problem) -> Differentiated:
        first, second = _first_order(problem), _second_order(problem)
        return lambda *arguments: jax.lax.cond(first_order, first, second, *arguments)

    return _scan(differentiate, "annealed")


class _Split(NamedTuple):
    """A tree's leaves that can be differentiated, and how to put others back among them."""

    real: list[Array]
    join: Callable[..., PyTree]  # (real, others=the tree's own) -> tree


def _split(tree: PyTree) -> _Split:
    leaves, treedef = jax.tree.flatten(tree)
    is_real = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def join(real: list[Any], others: list[Any] = leaves) -> PyTree:
        rest = iter(real)
        found = [next(rest) if r else o for r, o in zip(is_real, others, strict=True)]
        return jax.tree.unflatten(treedef, found)

    return _Split([leaf for leaf, r in zip(leaves, is_real, strict=True) if r], join)


def _cotangent(tree: PyTree, real: list[Array]) -> PyTree:
    """Cotangents of a tree's real leaves, with None (no gradient) for its others."""
    return _split(tree).join(real, [None] * len(jax.tree.leaves(tree)))


def _explicit(function: Callable, *arguments: PyTree) -> tuple[Callable, list, Jaxpr]:
    """A function with all that it closes over as its first argument, those values, its jaxpr.

    The backward pass of a `custom_vjp` must not close over what is being differentiated. Random
    keys travel as their numbers: the checker of reused keys takes a key that enters a `custom_vjp`
    or a checkpoint for used up, though a step only folds its number in.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
    treedef, jaxpr = jax.tree.structure(shape), closed.jaxpr
    # The function outlives the trace, so it must not hold the values, which are tracers.
    jaxpr = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
    impls = [_key_impl(value) for value in closed.consts]

    def explicit(consts: list, *arguments: PyTree) -> PyTree:
        values = [
            value if impl is None else jax.random.wrap_key_data(value, impl=impl)
            for value, impl in zip(consts, impls, strict=True)
        ]
        found = jax.core.eval_jaxpr(jaxpr, [], *values, *jax.tree.leaves(arguments))
        return jax.tree.unflatten(treedef, found)

    consts = [
        value if impl is None else jax.random.key_data(value)
        for value, impl in zip(closed.consts, impls, strict=True)
    ]
    return explicit, consts, jaxpr


def _key_impl(value: Any) -> Any:
    """How a random key's numbers make it; None for what is no key."""
    is_key = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return jax.random.key_impl(value) if is_key else None


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


def _mixed_mode(problem: Problem) -> Differentiated:
    def differentiated(params: PyTree, state: PyTree, step: Array) -> tuple:
        explicit, consts, jaxpr = _explicit(problem, params, state, step)
        _refuse_custom_vjp(jaxpr)
        (loss, state), gradient = _value_and_gradient(
            lambda params, others: explicit(others[2], params, *others[:2]),
            params,
            (state, step, consts),
        )
        return loss, state, (gradient, loss)

    return differentiated


#: As `UNROLLED`, but Hessian products are taken forwards over backwards: of a step its start is
#: kept, and nothing of it runs twice but its gradient (Kemaev et al. 2025, arXiv:2505.00793). Not
#: for networks with a custom_vjp, as the library's convolutions have: ValueError.
MIXED_MODE = _scan(_mixed_mode, "mixed_mode")


def implicit(*, cg_steps: int = 5, damping: float = 0.0) -> Adjoint:
    """The gradient of a minimum of the problem (Rajeswaran et al. 2019, arXiv:1909.04630).

    With F the problem's loss, phi the loop's end and psi whatever else F depends on, the cotangent
    v of phi becomes -d/dpsi <u, grad_phi F(phi, psi)> where (H + damping I) u = v and H is F's
    Hessian at phi. The loop's path is forgotten, so its start, the rule's meta-parameters, the
    losses and the states get no gradient; a start gets one as part of psi, by a proximal term
    (lambda / 2)||phi - theta||^2 in the problem: then it is (I + H_L / lambda)^-1 v.

    Args:
      cg_steps: Number of steps of conjugate gradients for u; as many as phi has numbers are exact.
      damping: Number added to the Hessian's diagonal in the backward pass.

    Raises:
      ValueError: less than one step of conjugate gradients, or a damping below zero.
    """
    if cg_steps < 1 or damping < 0:
        raise ValueError(
            f"conjugate gradients with {cg_steps} steps and damping {damping}: give at least one "
            "step, and a damping that is not negative"
        )

    def run(
        problem: Problem, make_body: MakeBody, carry: PyTree, steps: int
    ) -> tuple[PyTree, PyTree]:
        last = jnp.asarray(max(0, steps - 1))
        loop, loop_consts, _ = _explicit(
            lambda carry: UNROLLED.run(problem, make_body, carry, steps), carry
        )
        gradient, consts, _ = _explicit(
            lambda params, state: jax.grad(problem, has_aux=True)(params, state, last)[0],
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
            of_params = cotangents[0][0]
            of_consts = _implicit_cotangent(gradient, residuals, of_params, cg_steps, damping)
            return None, None, of_consts

        solve.defvjp(forward, backward)
        return solve(carry, loop_consts, consts)

    return Adjoint(run, f"implicit:{cg_steps},{float(damping)}", is_implicit=True)


def _implicit_cotangent(
    gradient: Callable[[list, PyTree, PyTree], PyTree],
    residuals: tuple[PyTree, PyTree, list],
    cotangent: PyTree,
    cg_steps: int,
    damping: float,
) -> PyTree:
    """-d/dconsts <u, gradient(consts, params, state)> where (H + damping I) u = cotangent.

    The residuals are (params, state, consts).
    """
    params, state, consts = residuals
    inputs = _split(consts)
    _, pullback = jax.vjp(
        lambda params, real: gradient(inputs.join(real), params, state), params, inputs.real
    )

    def damped_hessian(u: PyTree) -> PyTree:
        product = pullback(_cast_like(u, cotangent))[0]
        return jax.tree.map(lambda h, u: h + damping * u, _at_least_single(product), u)

    u, _ = cg(damped_hessian, _at_least_single(cotangent), tol=0.0, maxiter=cg_steps)
    direction = _cast_like(jax.tree.map(jnp.negative, u), cotangent)
    return _cotangent(consts, pullback(direction)[1])


def _at_least_single(tree: PyTree) -> PyTree:
    """Half precision made single: conjugate gradients lose their directions in it."""
    return jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)), tree)


def _cast_like(tree: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: a.astype(b.dtype), tree, like)


#: The adjoints without a setting of their own, by name.
ADJOINTS = {adjoint.name: adjoint for adjoint in (UNROLLED, CHECKPOINTED, MIXED_MODE, FIRST_ORDER)}


def as_adjoint(adjoint: Adjoint | str) -> Adjoint:
    """An adjoint by its name.

    Args:
      adjoint: 'unrolled', 'checkpointed', 'mixed_mode', 'first_order', 'truncated:K' with the
        number of last steps that are differentiated, or 'implicit:STEPS,DAMPING' with the settings
        of `implicit`, both of which may be left out; or an adjoint, which is returned.

    Raises:
      UsageError: an unknown name, or settings that the adjoint cannot have.

    Examples:
      >>> as_adjoint("unrolled") is UNROLLED
      True
      >>> as_adjoint("implicit:3").name
      'implicit:3,0.0'
    """
    if isinstance(adjoint, Adjoint):
        return adjoint
    if adjoint in ADJOINTS:
        return ADJOINTS[adjoint]
    name, _, given = adjoint.partition(":")
    try:
        if name == "truncated" and given:
            return truncated(int(given))
        if name == "implicit":
            cg_steps, _, damping = given.partition(",")
            return implicit(cg_steps=int(cg_steps or 5), damping=float(damping or 0))
    except ValueError as error:
        raise UsageError(f"adjoint '{adjoint}': {error}") from error
    raise UsageError(
        f"unknown adjoint '{adjoint}': choose one of {', '.join(ADJOINTS)}, truncated:K (K last "
        "steps) or implicit:STEPS,DAMPING (of conjugate gradients)"
    )
