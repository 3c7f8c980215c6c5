import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meta_jax.networks.layers import linear
from meta_jax.objectives import cross_entropy_loss
from meta_jax.optimization_based.maml import maml
from meta_jax.optimization_based.meta_sgd import meta_sgd
from tests.optimization_based.tasks import (
    KEY,
    assert_trees_close,
    loss_and_gradient,
    tanh_network,
    vectors,
)

pytestmark = pytest.mark.usefixtures("x64")


def start(learner):
    params, state = learner.init(KEY, vectors())
    return params, state, vectors(), KEY


def test_rates_start_uniform_up_to_the_inner_rate():
    params, *_ = start(meta_sgd(tanh_network(200), inner_lr=0.1))
    rates = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params["rule"])])
    assert jax.tree.structure(params["rule"]) == jax.tree.structure(params["learner"])
    assert 0.005 <= rates.min() < 0.0055 < 0.0995 < rates.max() < 0.1
    np.testing.assert_allclose(rates.mean(), 0.0525, rtol=0.05)


@pytest.mark.parametrize("steps", [1, 3])
def test_constant_rates_are_maml(steps):
    learner = meta_sgd(tanh_network(), steps=steps)
    params, *rest = start(learner)
    params["rule"] = jax.tree.map(lambda r: jnp.full_like(r, 0.5), params["rule"])
    value, gradient = loss_and_gradient(learner, params, *rest)
    plain = maml(tanh_network(), inner_lr=0.5, steps=steps, mask=None)
    expected, wanted = loss_and_gradient(plain, {**params, "rule": {}}, *rest)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert_trees_close(gradient["learner"], wanted["learner"])


def test_the_gradient_of_the_rates():
    """d/d alpha_j = -(grad L_S)_j (grad L_B(theta'))_j after one step."""
    learner = meta_sgd(tanh_network(), inner_lr=2.0)
    params, *rest = start(learner)
    _, gradient = loss_and_gradient(learner, params, *rest)

    def loss(p, batch):
        z = jnp.tanh(batch.x @ p["network"]["w"] + p["network"]["b"])
        return cross_entropy_loss(linear(p["head"], z), batch.y)[0]

    theta, alpha = params["learner"], params["rule"]
    of_support = jax.grad(loss)(theta, vectors().support)
    adapted = jax.tree.map(lambda t, a, g: t - a * g, theta, alpha, of_support)
    of_queries = jax.grad(loss)(adapted, vectors().query)
    wanted = jax.tree.map(lambda s, q: -s * q, of_support, of_queries)
    assert_trees_close(gradient["rule"], wanted)
    assert min(abs(g).max() for g in jax.tree.leaves(wanted)) > 1e-4
