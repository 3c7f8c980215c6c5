import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.optimization_based.adjoints import (
    ADJOINTS,
    CHECKPOINTED,
    FIRST_ORDER,
    MIXED_MODE,
    UNROLLED,
    implicit,
    truncated,
)
from meta_jax.optimization_based.inner_loop import merge, partition, run_inner_loop
from meta_jax.optimization_based.update_rules import from_optax
from tests.optimization_based.tasks import THETA, A, B, C, D

pytestmark = pytest.mark.usefixtures("x64")

ALPHA = 0.1


def quadratic(p, state, step):
    del step
    return 0.5 * (p - C) @ A @ (p - C), state


def meta_loss(theta, steps, adjoint):
    rule = from_optax(optax.sgd(ALPHA))
    p = run_inner_loop(quadratic, rule, {}, theta, {}, steps=steps, adjoint=adjoint).params
    return 0.5 * (p - D) @ B @ (p - D), p


def contraction(k):
    return np.linalg.matrix_power(np.eye(4) - ALPHA * A, k)


def assert_exact(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@functools.cache
def meta_gradient(steps, name):
    gradient = jax.jit(jax.grad(meta_loss, has_aux=True), static_argnums=(1, 2))
    return gradient(jnp.asarray(THETA), steps, ADJOINTS[name])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["unrolled", "checkpointed", "mixed_mode"])
def test_the_meta_gradient_of_a_quadratic(steps, name):
    gradient, p = meta_gradient(steps, name)
    adapted = C + contraction(steps) @ (THETA - C)
    assert_exact(p, adapted)
    assert_exact(gradient, contraction(steps) @ B @ (adapted - D))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_the_first_order_meta_gradient_of_a_quadratic(steps):
    gradient, p = meta_gradient(steps, "first_order")
    assert_exact(p, C + contraction(steps) @ (THETA - C))
    assert_exact(gradient, B @ (p - D))
    assert abs(gradient - meta_gradient(steps, "unrolled")[0]).max() > 0.05


def test_no_step_leaves_the_start():
    gradient, p = meta_gradient(0, "unrolled")
    assert_exact(p, THETA)
    assert_exact(gradient, B @ (THETA - D))


X, Y = np.random.default_rng(3).normal(size=(2, 6, 3))


def network_problem(params, state, step):
    del step
    h = jnp.tanh(X @ params["w1"] + params["b1"])
    loss = ((h @ params["w2"] - Y) ** 2).mean()
    return loss, {"seen": state["seen"] + h.mean(), "steps": state["steps"] + 1}


def network_params():
    rng = np.random.default_rng(4)
    shapes = {"w1": (3, 5), "b1": (5,), "w2": (5, 3)}
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


STATE = {"seen": 0.0, "steps": 0}


def start_state():
    return jax.tree.map(jnp.asarray, STATE)


def outer(params):
    return jnp.sin(sum(p.sum() for p in jax.tree.leaves(params)))


def python_loop(params, state, optimizer, steps, gradient_of=lambda g: g):
    opt_state, losses = optimizer.init(params), []
    for _ in range(steps):
        (loss, state), gradient = jax.value_and_grad(network_problem, has_aux=True)(
            params, state, 0
        )
        updates, opt_state = optimizer.update(gradient_of(gradient), opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss)
    return params, state, jnp.stack(losses)


OPTIMIZERS = {
    "sgd": optax.sgd(0.3),
    "adam": optax.adam(0.05, b1=0.5),
    # Rates that are exact in float32, in which schedules are worked out.
    "momentum": optax.sgd(optax.linear_schedule(0.5, 0.25, 4), momentum=0.9),
}


@pytest.mark.parametrize(
    ("optimizer", "adjoint"),
    [
        ("sgd", "unrolled"),
        ("sgd", "first_order"),
        ("sgd", "checkpointed"),
        ("adam", "unrolled"),
        ("adam", "first_order"),
        ("momentum", "checkpointed"),
        ("adam", "mixed_mode"),
    ],
)
def test_the_scan_equals_a_python_loop(optimizer, adjoint):
    optimizer = OPTIMIZERS[optimizer]
    stop = jax.lax.stop_gradient if adjoint == "first_order" else lambda g: g

    def ours(params):
        end = run_inner_loop(
            network_problem,
            from_optax(optimizer),
            {},
            params,
            start_state(),
            steps=4,
            adjoint=ADJOINTS[adjoint],
        )
        return end.params, end.state, end.losses

    def loop(params):
        return python_loop(params, start_state(), optimizer, 4, stop)

    results = []
    for f in (ours, loop):
        meta = jax.grad(lambda p, f=f: outer(f(p)[0]))
        results.append(jax.jit(lambda p, f=f, meta=meta: (*f(p), meta(p)))(network_params()))
    jax.tree.map(assert_exact, *results)
    params, state, losses, _ = results[0]
    assert state["steps"] == 4
    assert losses.shape == (4,)
    assert_exact(losses[0], network_problem(network_params(), start_state(), 0)[0])
    assert network_problem(params, start_state(), 0)[0] < losses[0]


def biases(path, leaf):
    assert leaf.ndim
    return path[-1].key == "b1"


def test_a_mask_adapts_its_leaves_only_and_the_others_still_get_a_gradient():
    def adapt(params):
        return run_inner_loop(
            network_problem,
            from_optax(optax.sgd(0.3)),
            {},
            params,
            start_state(),
            steps=2,
            mask=biases,
        ).params

    def by_hand(params):
        b1 = params["b1"]
        for _ in range(2):
            b1 -= 0.3 * jax.grad(lambda b: network_problem({**params, "b1": b}, STATE, 0)[0])(b1)
        return {**params, "b1": b1}

    def adapted_and_gradient(adapt, params):
        gradient = jax.grad(lambda p: network_problem(adapt(p), STATE, 0)[0])(params)
        return adapt(params), gradient

    params = network_params()
    both = jax.jit(lambda p: [adapted_and_gradient(f, p) for f in (adapt, by_hand)])
    found, expected = jax.tree.map(np.asarray, both(params))
    adapted, gradient = found
    for name in ("w1", "w2"):
        np.testing.assert_array_equal(adapted[name], params[name])
    assert abs(adapted["b1"] - np.asarray(params["b1"])).max() > 1e-3
    jax.tree.map(assert_exact, found, expected)
    assert all(abs(g).max() > 1e-4 for g in jax.tree.leaves(gradient))


def test_partition_and_merge_are_inverse():
    params = {"a": {"kernel": jnp.ones(2), "bias": jnp.zeros(1)}, "b": [jnp.ones(3), jnp.ones(4)]}

    def mask(path, leaf):
        return leaf.size % 2 == 1

    chosen, others = partition(params, mask)
    assert chosen["a"]["kernel"] is None
    assert others["a"]["bias"] is None
    assert [p.size for p in jax.tree.leaves(chosen)] == [1, 3]
    assert [p.size for p in jax.tree.leaves(others)] == [2, 4]
    merged = merge(chosen, others)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(
        a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True)
    )


def equations(jaxpr):
    """Number of equations, those of inner jaxprs included."""
    inner = [
        value
        for equation in jaxpr.eqns
        for parameter in equation.params.values()
        for value in (parameter if isinstance(parameter, (tuple, list)) else [parameter])
    ]
    return len(jaxpr.eqns) + sum(
        equations(getattr(value, "jaxpr", value))
        for value in inner
        if hasattr(getattr(value, "jaxpr", value), "eqns")
    )


@pytest.mark.parametrize(
    "adjoint", [UNROLLED, FIRST_ORDER, CHECKPOINTED, MIXED_MODE, truncated(1), implicit()]
)
def test_the_program_does_not_grow_with_the_steps(adjoint):
    def count(steps):
        gradient = jax.grad(lambda theta: meta_loss(theta, steps, adjoint)[0])
        return equations(jax.make_jaxpr(gradient)(jnp.asarray(THETA)).jaxpr)

    assert count(2) == count(20) > 20


def test_a_mask_saves_backward_work():
    def products(mask):
        def adapt(params):
            return run_inner_loop(
                network_problem,
                from_optax(optax.sgd(0.3)),
                {},
                params,
                start_state(),
                steps=2,
                mask=mask,
            ).params

        return str(jax.make_jaxpr(adapt)(network_params())).count("dot_general")

    # Forward two; backward two weights and the hidden layer, or the last weight alone.
    assert products(None) == 5
    assert products(lambda path, leaf: path[-1].key == "w2") == 3


def test_what_is_observed_follows_each_step():
    def observe(params, state, step):
        return {"step": step, "loss": network_problem(params, state, step)[0]}

    loop = functools.partial(
        run_inner_loop, network_problem, from_optax(OPTIMIZERS["adam"]), {}, observe=observe
    )
    whole = loop(network_params(), start_state(), steps=5)
    np.testing.assert_array_equal(whole.observed["step"], np.arange(5))
    assert_exact(whole.observed["loss"][:-1], whole.losses[1:])
    assert_exact(whole.observed["loss"][-1], network_problem(whole.params, STATE, 5)[0])
    # The rule's state goes on where another loop left it.
    half = loop(network_params(), start_state(), steps=2)
    again = loop(half.params, half.state, rule_state=half.rule_state, steps=3)
    jax.tree.map(assert_exact, again.params, whole.params)
    forgetful = loop(half.params, half.state, steps=3)
    assert abs(forgetful.params["w1"] - whole.params["w1"]).max() > 1e-3
