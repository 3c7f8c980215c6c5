import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from meta_jax.networks.layers import linear
from meta_jax.networks.mlp import mlp
from meta_jax.objectives import cross_entropy, cross_entropy_loss, squared_error
from meta_jax.optimization_based.adjoints import UNROLLED
from meta_jax.optimization_based.imaml import imaml
from tests.optimization_based.tasks import (
    KEY,
    assert_trees_close,
    loss_and_gradient,
    tanh_network,
    vectors,
)

pytestmark = pytest.mark.usefixtures("x64")


def start():
    params, state = imaml(tanh_network(2)).init(KEY, vectors())
    return params, state, vectors(), KEY


def by_dense_solve(theta, proximity):
    """(I + H / lambda)^-1 grad L_B(phi*), phi* by Newton's method."""
    flat, unravel = ravel_pytree(theta)

    def loss(flat, batch):
        p = unravel(flat)
        z = jnp.tanh(batch.x @ p["network"]["w"] + p["network"]["b"])
        return cross_entropy_loss(linear(p["head"], z), batch.y)[0]

    support, query = vectors()

    @jax.jit
    def newton(phi):
        slope = jax.grad(loss)(phi, support) + proximity * (phi - flat)
        curvature = jax.hessian(loss)(phi, support) + proximity * jnp.eye(flat.size)
        return phi - jnp.linalg.solve(curvature, slope)

    phi = flat
    for _ in range(12):
        phi = newton(phi)
    hessian = jax.jit(jax.hessian(loss))(phi, support)
    value, of_queries = jax.value_and_grad(loss)(phi, query)
    gradient = jnp.linalg.solve(jnp.eye(flat.size) + hessian / proximity, of_queries)
    return value, unravel(gradient), of_queries


def test_the_meta_gradient_agrees_with_a_dense_solve():
    params, *rest = start()
    size = ravel_pytree(params)[0].size
    exact = {"steps": 300, "cg_steps": size, "damping": 0.0}
    learner = imaml(tanh_network(2), inner_lr=0.3, proximity=2.0, **exact)
    value, gradient = loss_and_gradient(learner, params, *rest)
    wanted_value, wanted, of_queries = by_dense_solve(params["learner"], 2.0)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-10)
    assert_trees_close(gradient["learner"], wanted, rtol=1e-8, atol=1e-10)
    # Neither first-order MAML's gradient nor a multiple of it.
    found = ravel_pytree(gradient)[0]
    cosine = found @ of_queries / jnp.linalg.norm(found) / jnp.linalg.norm(of_queries)
    assert cosine < 0.999


def test_an_infinite_proximity_gives_the_query_gradient_at_the_start():
    params, *rest = start()
    strong = imaml(tanh_network(2), inner_lr=1e-8, proximity=1e8, cg_steps=5)
    still = imaml(tanh_network(2), steps=0, adjoint=UNROLLED)
    _, found = loss_and_gradient(strong, params, *rest)
    _, wanted = loss_and_gradient(still, params, *rest)
    assert_trees_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_the_solve_is_in_single_precision_for_half_precision():
    with jax.enable_x64(False):
        params, *rest = start()
        learner = imaml(tanh_network(2), inner_lr=0.3, proximity=2.0, cg_steps=4, damping=0.0)
        _, wanted = loss_and_gradient(learner, params, *rest)

        def half(tree):
            return jax.tree.map(
                lambda a: a.astype(jnp.bfloat16) if jnp.issubdtype(a.dtype, jnp.floating) else a,
                tree,
            )

        loss, found = loss_and_gradient(learner, half(params), *half(tuple(rest)))
    assert loss.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    a, b = (
        ravel_pytree(jax.tree.map(lambda g: g.astype(jnp.float32), t))[0] for t in (found, wanted)
    )
    assert a @ b > 0.99 * jnp.linalg.norm(a) * jnp.linalg.norm(b)


def test_its_own_settings_follow_the_objective():
    classifies, curves = (imaml(mlp(), objective=o).config for o in (cross_entropy, squared_error))
    assert (classifies["proximity"], classifies["inner_lr"]) == (0.05, 0.1)
    assert (curves["proximity"], curves["inner_lr"]) == (2.0, 0.005)


@pytest.mark.parametrize("proximity", [0.0, -1.0])
def test_a_proximity_that_is_not_positive_is_refused(proximity):
    with pytest.raises(ValueError, match=r"proximity=.* must be greater than 0"):
        imaml(mlp(), proximity=proximity)
