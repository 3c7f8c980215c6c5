import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meta_jax.optimization_based.adjoints import FIRST_ORDER
from meta_jax.optimization_based.inner_loop import run_inner_loop
from meta_jax.optimization_based.update_rules import from_optax


def test_it_has_no_meta_parameters():
    rule = from_optax(optax.adam(0.1))
    assert rule.init_meta(jax.random.key(0), jnp.ones(2)) == {}


@pytest.mark.parametrize("optimizer", [optax.sgd(0.5), optax.adamw(0.1, weight_decay=0.2)])
def test_updates_are_optax_s_own(optimizer):
    rule = from_optax(optimizer)
    params, gradient = jnp.array([1.0, -2.0]), jnp.array([0.3, 4.0])
    state, expected_state = rule.init({}, params), optimizer.init(params)
    for _ in range(2):
        updates, state = rule.update({}, gradient, state, params, loss=jnp.float32(1))
        expected, expected_state = optimizer.update(gradient, expected_state, params)
        np.testing.assert_array_equal(updates, expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)


def scale_by_loss():
    def update(updates, state, params=None, *, value, **_):
        return jax.tree.map(lambda u: -value * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def test_the_loss_as_a_function_reaches_a_transformation_that_asks_for_it():
    def update(updates, state, params=None, *, value, grad, value_fn, **_):
        # Halfway to where the gradient leads, if that is better.
        ahead = value_fn(params - grad)
        return jnp.where(ahead < value, -grad / 2, 0.0 * updates), state

    rule = from_optax(optax.GradientTransformationExtraArgs(lambda params: (), update))
    run = run_inner_loop(lambda p, s, _: (0.5 * p**2, s), rule, {}, jnp.ones(()), {}, steps=2)
    assert float(run.params) == 0.25


def test_a_line_search_inside_finds_a_minimum():
    scales, centre = jnp.array([1.0, 10.0, 100.0]), jnp.array([1.0, 2.0, 3.0])

    def end(start):
        problem = lambda p, s, _: ((scales * (p - centre) ** 2).sum() / 2, s)  # noqa: E731
        rule = from_optax(optax.lbfgs())
        settings = {"steps": 12, "adjoint": FIRST_ORDER}
        return run_inner_loop(problem, rule, {}, start, {}, **settings).params

    np.testing.assert_allclose(jax.jit(end)(jnp.zeros(3)), centre, rtol=1e-3)
    # Its steps are constants: the start's gradient is that of the sum of start and updates.
    np.testing.assert_array_equal(jax.jit(jax.jacobian(end))(jnp.zeros(3)), jnp.eye(3))


def test_the_loss_reaches_a_transformation_that_asks_for_it():
    # p <- p - (p^2 / 2) p, from 1: 1/2, then 1/2 - 1/16.
    end = run_inner_loop(
        lambda p, s, _: (0.5 * p**2, s), from_optax(scale_by_loss()), {}, jnp.ones(()), {}, steps=2
    )
    assert float(end.params) == 0.4375
    np.testing.assert_array_equal(end.losses, [0.5, 0.125])
